//! Weight matrices: as they are stored, or packed.

use crate::blocks::WeightType;
use crate::pack::PackedRows;

/// A weight matrix in its storage type, `(rows, cols)`, row-major.
#[derive(Clone, Copy, Debug)]
pub struct WeightRows<'a> {
    pub(crate) dtype: WeightType,
    bytes: &'a [u8],
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    row_bytes: usize,
}

impl<'a> WeightRows<'a> {
    /// A view of `bytes`, or None if they are not `rows` x `cols` elements of `dtype`, or `cols` is 0.
    pub fn new(dtype: WeightType, bytes: &'a [u8], rows: usize, cols: usize) -> Option<Self> {
        let row_bytes = dtype.bytes_for(cols).filter(|_| cols > 0)?;
        (rows.checked_mul(row_bytes)? == bytes.len()).then_some(WeightRows {
            dtype,
            bytes,
            rows,
            cols,
            row_bytes,
        })
    }

    /// The storage type.
    pub fn dtype(&self) -> WeightType {
        self.dtype
    }

    /// Output features.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input features.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The bytes of one row.
    ///
    /// # Panics
    /// If there is no such row.
    #[inline(always)]
    pub fn row(&self, row: usize) -> &'a [u8] {
        &self.bytes[row * self.row_bytes..][..self.row_bytes]
    }
}

/// A weight matrix that products accept, `(out_features, in_features)`.
#[derive(Clone, Copy)]
pub enum Weight<'a> {
    /// In its storage type.
    Rows(WeightRows<'a>),
    /// In tiles.
    Packed(&'a PackedRows),
}

impl Weight<'_> {
    /// Output features.
    #[inline(always)]
    pub fn rows(&self) -> usize {
        match self {
            Weight::Rows(weight) => weight.rows(),
            Weight::Packed(weight) => weight.rows(),
        }
    }

    /// Input features.
    #[inline(always)]
    pub fn cols(&self) -> usize {
        match self {
            Weight::Rows(weight) => weight.cols(),
            Weight::Packed(weight) => weight.cols(),
        }
    }
}
