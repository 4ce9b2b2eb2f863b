//! A tensor's bytes, in the file's storage type.

use std::ops::Range;
use std::sync::Arc;

use crate::checkpoint::mmap::Mmap;
use crate::error::{Error, Result};
use crate::kernels::{WeightType, dequantize};

/// A tensor in its storage type. It is cheap to clone: clones share the file's map or the owned bytes.
#[derive(Clone)]
pub struct Tensor {
    dtype: WeightType,
    shape: Vec<usize>,
    data: Data,
}

#[derive(Clone)]
enum Data {
    /// `range` lies inside the map: the readers have checked it.
    Mapped {
        map: Arc<Mmap>,
        range: Range<usize>,
    },
    Owned(Arc<Vec<u8>>),
}

impl Tensor {
    /// The storage type of the elements.
    pub fn dtype(&self) -> WeightType {
        self.dtype
    }

    /// Row-major, in Hugging Face's order: a linear layer's weight is `(out_features, in_features)`.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The stored bytes, row after row, little-endian, in the layout of [`crate::kernels::blocks`]. They may
    /// start at any address.
    pub fn bytes(&self) -> &[u8] {
        match &self.data {
            Data::Mapped { map, range } => &map.bytes()[range.clone()],
            Data::Owned(owned) => owned,
        }
    }

    /// Tells the system that the bytes are unlikely to be read again.
    pub fn forget(&self) {
        if let Data::Mapped { map, range } = &self.data {
            map.forget(range);
        }
    }

    /// The number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// All elements as float32, row-major.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.elements()];
        dequantize(self.dtype, self.bytes(), &mut out);
        out
    }

    /// Writes row `row` as float32 to `out`. A row runs along the last dimension.
    ///
    /// # Panics
    /// If there is no such row, or the length of `out` is not that of a row.
    pub fn row_to_f32(&self, row: usize, out: &mut [f32]) {
        let row_len = self.shape.last().copied().unwrap_or(1);
        assert_eq!(out.len(), row_len, "length of a row");
        let row_bytes = self.dtype.bytes_for(row_len).expect("rows are whole blocks, as the readers check");
        dequantize(self.dtype, &self.bytes()[row * row_bytes..][..row_bytes], out);
    }

    /// Returns a query or key projection with its rows in Hugging Face's order.
    ///
    /// A row is a whole number of quant blocks in every storage type, so moving a row moves its bytes.
    ///
    /// Source: llama.cpp, `convert_hf_to_gguf.py`, `LlamaModel.permute`.
    pub(crate) fn unpermute(self, heads: usize) -> std::result::Result<Self, String> {
        let Some(&rows) = self.shape.first() else {
            return Err("a single number has no rows to reorder".into());
        };
        if heads == 0 || !rows.is_multiple_of(heads) || !(rows / heads).is_multiple_of(2) {
            return Err(format!("{rows} rows cannot be split into {heads} heads of an even size"));
        }
        if self.shape.len() == 1 && self.dtype.block_len() != 1 {
            return Err(format!("blocks of {} span several rows of a vector", self.dtype));
        }
        let bytes = self.bytes();
        if bytes.is_empty() {
            return Ok(self);
        }
        let row_bytes = bytes.len() / rows;
        let head_dim = rows / heads;
        // The file decides the size, which may exceed the memory.
        let mut owned = Vec::new();
        owned.try_reserve_exact(bytes.len()).map_err(|_| format!("no memory for {} bytes", bytes.len()))?;
        for row in 0..rows {
            let source = gguf_row(row, head_dim);
            owned.extend_from_slice(&bytes[source * row_bytes..(source + 1) * row_bytes]);
        }
        self.forget();
        Ok(Self { dtype: self.dtype, shape: self.shape, data: Data::Owned(owned.into()) })
    }
}

/// The row at which a GGUF file stores row `row` of a query or key projection whose heads have `head_dim`
/// rows.
///
/// llama.cpp's converter interleaves the two halves of each head, so that the two rows of a rotated pair are
/// adjacent: its row `2 * j + half` of a head is Hugging Face's row `half * head_dim / 2 + j`.
fn gguf_row(row: usize, head_dim: usize) -> usize {
    let (head, in_head) = (row / head_dim, row % head_dim);
    let (half, pair) = (in_head / (head_dim / 2), in_head % (head_dim / 2));
    head * head_dim + 2 * pair + half
}

/// The inverse of [`gguf_row`]: the row in Hugging Face's order that a GGUF file stores at `row`.
///
/// # Panics
/// If `head_dim` is 0.
pub(crate) fn hf_row(row: usize, head_dim: usize) -> usize {
    let (head, in_head) = (row / head_dim, row % head_dim);
    head * head_dim + in_head % 2 * (head_dim / 2) + in_head / 2
}

/// A storage type, known to this crate or not.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum StoredType {
    /// A type that can be read.
    Weight(WeightType),
    /// A type that can only be listed, by the file's name for it.
    Other(String),
}

impl StoredType {
    pub(crate) fn name(&self) -> &str {
        match self {
            StoredType::Weight(dtype) => dtype.name(),
            StoredType::Other(name) => name,
        }
    }
}

/// Where a tensor's bytes are in a file. `range` is inside the map. If the type can be read, the range's
/// length matches the type and the shape. The readers of both formats check this.
#[derive(Clone)]
pub(crate) struct Stored {
    pub(crate) dtype: StoredType,
    pub(crate) shape: Vec<usize>,
    pub(crate) map: Arc<Mmap>,
    pub(crate) range: Range<usize>,
}

impl Stored {
    /// Returns the tensor. `name` is used in messages.
    pub(crate) fn load(&self, name: &str) -> Result<Tensor> {
        match &self.dtype {
            StoredType::Weight(dtype) => {
                let data = Data::Mapped { map: Arc::clone(&self.map), range: self.range.clone() };
                Ok(Tensor { dtype: *dtype, shape: self.shape.clone(), data })
            }
            StoredType::Other(dtype) => Err(Error::TensorType {
                tensor: name.into(),
                dtype: dtype.clone(),
                path: self.map.path().into(),
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gguf_row_and_hf_row_are_inverses() {
        for head_dim in [2, 4, 10, 64] {
            for row in 0..3 * head_dim {
                assert_eq!(hf_row(gguf_row(row, head_dim), head_dim), row);
                assert_eq!(gguf_row(hf_row(row, head_dim), head_dim), row);
            }
        }
        assert_eq!((0..4).map(|row| hf_row(row, 4)).collect::<Vec<_>>(), [0, 2, 1, 3]);
    }
}
