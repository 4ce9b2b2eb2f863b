//! The storage types of weights and the layout of their blocks.
//!
//! Every type stores a row of weights as blocks of [`WeightType::block_len`] elements, each
//! [`WeightType::block_bytes`] bytes long, little-endian, one row after the other.
//!
//! | type | block | bytes | contents, in order | element `i` |
//! |---|---|---|---|---|
//! | F32, F16, BF16 | 1 | 4, 2, 2 | the number | itself |
//! | Q4_0 | 32 | 18 | d f16; 16 bytes of nibbles | `(q - 8) * d` |
//! | Q4_1 | 32 | 20 | d f16; m f16; 16 bytes of nibbles | `q * d + m` |
//! | Q8_0 | 32 | 34 | d f16; 32 i8 | `q * d` |
//!
//! In the nibble types, byte `j` holds element `j` (low half) and element `j + 16` (high half).
//!
//! Source: ggml, `ggml-common.h`.

/// How a weight matrix is stored. The names are ggml's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(non_camel_case_types)] // ggml's spelling
pub enum WeightType {
    /// IEEE 754 single precision.
    F32,
    /// IEEE 754 half precision.
    F16,
    /// The upper half of a single.
    BF16,
    /// 8 bits, one scale per 32.
    Q8_0,
    /// 4 bits, one scale per 32.
    Q4_0,
    /// 4 bits, one scale and one minimum per 32.
    Q4_1,
}

impl WeightType {
    /// Every type, for tests and tables.
    pub const ALL: [WeightType; 6] = [
        WeightType::F32,
        WeightType::F16,
        WeightType::BF16,
        WeightType::Q8_0,
        WeightType::Q4_0,
        WeightType::Q4_1,
    ];

    /// Elements per block; a row's length is a multiple of it.
    pub const fn block_len(self) -> usize {
        match self {
            WeightType::F32 | WeightType::F16 | WeightType::BF16 => 1,
            WeightType::Q8_0 | WeightType::Q4_0 | WeightType::Q4_1 => 32,
        }
    }

    /// Bytes per block.
    pub const fn block_bytes(self) -> usize {
        match self {
            WeightType::F32 => 4,
            WeightType::F16 | WeightType::BF16 => 2,
            WeightType::Q8_0 => 34,
            WeightType::Q4_0 => 18,
            WeightType::Q4_1 => 20,
        }
    }

    /// Bytes of `len` elements, or None if `len` is not a whole number of blocks or the product
    /// overflows.
    pub const fn bytes_for(self, len: usize) -> Option<usize> {
        if !len.is_multiple_of(self.block_len()) {
            return None;
        }
        (len / self.block_len()).checked_mul(self.block_bytes())
    }

    /// ggml's name, such as "Q4_0".
    pub const fn name(self) -> &'static str {
        match self {
            WeightType::F32 => "F32",
            WeightType::F16 => "F16",
            WeightType::BF16 => "BF16",
            WeightType::Q8_0 => "Q8_0",
            WeightType::Q4_0 => "Q4_0",
            WeightType::Q4_1 => "Q4_1",
        }
    }
}

impl std::fmt::Display for WeightType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}
