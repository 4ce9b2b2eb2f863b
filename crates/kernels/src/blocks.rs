//! The storage types of weights and the layout of their blocks.
//!
//! Every type stores a row of weights as blocks of [`WeightType::block_len`] elements. Each block takes
//! [`WeightType::block_bytes`] bytes, little-endian. Rows follow each other without gaps.
//!
//! | type | block | bytes | contents, in order | element `i` |
//! |---|---|---|---|---|
//! | F32, F16, BF16 | 1 | 4, 2, 2 | the number | itself |
//! | Q4_0 | 32 | 18 | d f16; 16 bytes of nibbles | `(q - 8) * d` |
//! | Q4_1 | 32 | 20 | d f16; m f16; 16 bytes of nibbles | `q * d + m` |
//! | Q5_0 | 32 | 22 | d f16; 32 high bits; 16 bytes of nibbles | `(q - 16) * d` |
//! | Q5_1 | 32 | 24 | d f16; m f16; 32 high bits; 16 bytes of nibbles | `q * d + m` |
//! | Q8_0 | 32 | 34 | d f16; 32 i8 | `q * d` |
//! | Q2_K | 256 | 84 | 16 bytes of scales and mins; 64 of pairs; d, dmin f16 | `d * s * q - dmin * m` |
//! | Q3_K | 256 | 110 | 32 bytes of high bits; 64 of pairs; 12 of scales; d f16 | `d * (s - 32) * (q - 4)` |
//! | Q4_K | 256 | 144 | d, dmin f16; 12 bytes of scales and mins; 128 of nibbles | `d * s * q - dmin * m` |
//! | Q5_K | 256 | 176 | as Q4_K, with 32 bytes of high bits before the nibbles | the same |
//! | Q6_K | 256 | 210 | 128 bytes of nibbles; 64 of pairs; 16 i8 scales; d f16 | `d * s * (q - 32)` |
//! | IQ4_NL | 32 | 18 | as Q4_0 | `d * value[q]` |
//! | IQ4_XS | 256 | 136 | d f16; 6 bytes of scales; 128 of nibbles | `d * (s - 32) * value[q]` |
//!
//! `q` is the stored integer; `s` and `m` are the scale and the minimum of a part of the block; `value` is
//! the table `IQ4_VALUES`. In the nibble types with blocks of 32, byte `j` holds element `j` (low half) and
//! element `j + 16` (high half). IQ4_XS has eight such runs of 16 bytes. The blocks of 256 have a scale for
//! every 16 (Q2_K, Q3_K, Q6_K) or 32 elements (Q4_K, Q5_K, IQ4_XS). These scales have 4 bits in Q2_K, 8 in
//! Q6_K, 6 in the others. "Pairs" are 2 bits of each element: all of Q2_K's, the low ones of Q3_K's, the
//! high ones of Q6_K's. `generic/dequantize_block.rs` shows which bits belong to which element.
//!
//! Source: ggml, `ggml-common.h`.

use half::f16;

/// The values of the 16 quants of IQ4_NL and IQ4_XS, to be multiplied with a scale. They are closer to each
/// other near 0, where most weights are.
///
/// Source: ggml, `ggml-common.h`, `kvalues_iq4nl`.
pub const IQ4_VALUES: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// The little-endian f16 at byte `at`.
#[inline(always)]
pub(super) fn f16_at(bytes: &[u8], at: usize) -> f32 {
    // The const conversion, because the other one checks for F16C at run time on every call.
    f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32_const()
}

/// The 6-bit scale and minimum of part `part` of a block of Q4_K or Q5_K, from its 12 bytes of scales.
#[inline(always)]
pub(super) fn scale_and_min(packed: &[u8], part: usize) -> (u8, u8) {
    if part < 4 {
        (packed[part] & 63, packed[part + 4] & 63)
    } else {
        let (low, scale_high, min_high) = (packed[part + 4], packed[part - 4] >> 6, packed[part] >> 6);
        (low & 15 | scale_high << 4, low >> 4 | min_high << 4)
    }
}

/// The 6-bit scale of part `part` of a block of Q3_K, minus 32, from the block's 12 bytes of scales.
#[inline(always)]
pub(super) fn q3_k_scale(packed: &[u8], part: usize) -> i8 {
    let low_bits = if part < 8 { packed[part] & 15 } else { packed[part - 8] >> 4 };
    let high_bits = packed[8 + part % 4] >> (2 * (part / 4)) & 3;
    (low_bits | high_bits << 4) as i8 - 32
}

/// The 6-bit scale of part `part` of a block of IQ4_XS, minus 32.
#[inline(always)]
pub(super) fn iq4_xs_scale(block: &[u8], part: usize) -> i8 {
    let high_bits = block[2 + part / 4] >> (2 * (part % 4)) & 3;
    let low_bits = block[4 + part / 2] >> (4 * (part % 2)) & 15;
    (low_bits | high_bits << 4) as i8 - 32
}

/// How a weight matrix is stored. The names are ggml's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(non_camel_case_types)] // ggml's spelling
pub enum WeightType {
    /// IEEE 754 single precision.
    F32,
    /// IEEE 754 half precision.
    F16,
    /// The upper half of a single-precision number.
    BF16,
    /// 8 bits, one scale per 32.
    Q8_0,
    /// 4 bits, one scale per 32.
    Q4_0,
    /// 4 bits, one scale and one minimum per 32.
    Q4_1,
    /// 5 bits, one scale per 32.
    Q5_0,
    /// 5 bits, one scale and one minimum per 32.
    Q5_1,
    /// 2 bits, a scale and a minimum per 16.
    Q2_K,
    /// 3 bits, a scale per 16.
    Q3_K,
    /// 4 bits, a scale and a minimum per 32.
    Q4_K,
    /// 5 bits, a scale and a minimum per 32.
    Q5_K,
    /// 6 bits, a scale per 16.
    Q6_K,
    /// 4 bits for one of 16 unevenly spaced values, one scale per 32.
    IQ4_NL,
    /// 4 bits for one of the same values, a scale per 32 and another per 256.
    IQ4_XS,
}

impl WeightType {
    /// Every type, for tests and tables.
    pub const ALL: [WeightType; 15] = {
        use WeightType::*;
        [F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS]
    };

    /// The type with this name in ggml.
    pub fn named(name: &str) -> Option<Self> {
        WeightType::ALL.into_iter().find(|dtype| dtype.name() == name)
    }

    /// Elements per block; a row's length is a multiple of it.
    pub const fn block_len(self) -> usize {
        match self {
            WeightType::F32 | WeightType::F16 | WeightType::BF16 => 1,
            WeightType::Q8_0
            | WeightType::Q4_0
            | WeightType::Q4_1
            | WeightType::Q5_0
            | WeightType::Q5_1
            | WeightType::IQ4_NL => 32,
            WeightType::Q2_K
            | WeightType::Q3_K
            | WeightType::Q4_K
            | WeightType::Q5_K
            | WeightType::Q6_K
            | WeightType::IQ4_XS => 256,
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
            WeightType::Q5_0 => 22,
            WeightType::Q5_1 => 24,
            WeightType::Q2_K => 84,
            WeightType::Q3_K => 110,
            WeightType::Q4_K => 144,
            WeightType::Q5_K => 176,
            WeightType::Q6_K => 210,
            WeightType::IQ4_NL => 18,
            WeightType::IQ4_XS => 136,
        }
    }

    /// Bytes of `len` elements. None if `len` is not a whole number of blocks, or if the product overflows.
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
            WeightType::Q5_0 => "Q5_0",
            WeightType::Q5_1 => "Q5_1",
            WeightType::Q2_K => "Q2_K",
            WeightType::Q3_K => "Q3_K",
            WeightType::Q4_K => "Q4_K",
            WeightType::Q5_K => "Q5_K",
            WeightType::Q6_K => "Q6_K",
            WeightType::IQ4_NL => "IQ4_NL",
            WeightType::IQ4_XS => "IQ4_XS",
        }
    }
}

impl std::fmt::Display for WeightType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}
