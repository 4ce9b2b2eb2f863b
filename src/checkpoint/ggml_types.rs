//! ggml's tensor types: number, name, elements per quant block and bytes per quant block.
//!
//! Source: ggml, `ggml.h` (`enum ggml_type`) and `ggml-common.h` (the block structs). The table keeps numbers
//! that ggml has withdrawn, so that old files are refused by the type's name.

use crate::checkpoint::tensor::StoredType;
use crate::kernels::WeightType;

/// One of ggml's types.
#[derive(Clone, Copy, Debug)]
pub(crate) struct GgmlType {
    pub(crate) name: &'static str,
    /// Elements per block.
    pub(crate) block_len: u64,
    /// Bytes per block.
    pub(crate) block_bytes: u64,
}

impl GgmlType {
    /// The same type as a [`StoredType`].
    pub(crate) fn stored(&self) -> StoredType {
        match WeightType::named(self.name) {
            Some(dtype) => StoredType::Weight(dtype),
            None => StoredType::Other(self.name.into()),
        }
    }
}

/// The type with this number.
pub(crate) fn find(number: u32) -> Option<GgmlType> {
    let (name, block_len, block_bytes) = match number {
        0 => ("F32", 1, 4),
        1 => ("F16", 1, 2),
        2 => ("Q4_0", 32, 18),
        3 => ("Q4_1", 32, 20),
        4 => ("Q4_2", 16, 10),
        5 => ("Q4_3", 16, 12),
        6 => ("Q5_0", 32, 22),
        7 => ("Q5_1", 32, 24),
        8 => ("Q8_0", 32, 34),
        9 => ("Q8_1", 32, 36),
        10 => ("Q2_K", 256, 84),
        11 => ("Q3_K", 256, 110),
        12 => ("Q4_K", 256, 144),
        13 => ("Q5_K", 256, 176),
        14 => ("Q6_K", 256, 210),
        15 => ("Q8_K", 256, 292),
        16 => ("IQ2_XXS", 256, 66),
        17 => ("IQ2_XS", 256, 74),
        18 => ("IQ3_XXS", 256, 98),
        19 => ("IQ1_S", 256, 50),
        20 => ("IQ4_NL", 32, 18),
        21 => ("IQ3_S", 256, 110),
        22 => ("IQ2_S", 256, 82),
        23 => ("IQ4_XS", 256, 136),
        24 => ("I8", 1, 1),
        25 => ("I16", 1, 2),
        26 => ("I32", 1, 4),
        27 => ("I64", 1, 8),
        28 => ("F64", 1, 8),
        29 => ("IQ1_M", 256, 56),
        30 => ("BF16", 1, 2),
        31 => ("Q4_0_4_4", 32, 18),
        32 => ("Q4_0_4_8", 32, 18),
        33 => ("Q4_0_8_8", 32, 18),
        34 => ("TQ1_0", 256, 54),
        35 => ("TQ2_0", 256, 66),
        36 => ("IQ4_NL_4_4", 32, 18),
        37 => ("IQ4_NL_4_8", 32, 18),
        38 => ("IQ4_NL_8_8", 32, 18),
        39 => ("MXFP4", 32, 17),
        40 => ("NVFP4", 64, 36),
        41 => ("Q1_0", 128, 18),
        _ => return None,
    };
    Some(GgmlType { name, block_len, block_bytes })
}

/// The number to write for a type.
pub(crate) fn number(dtype: WeightType) -> Option<u32> {
    (0..=LAST).find(|&number| find(number).is_some_and(|found| found.name == dtype.name()))
}

/// The largest number in [`find`]'s table.
const LAST: u32 = 41;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readable_types_agree_with_the_kernels_layout() {
        let types: Vec<GgmlType> = (0..=LAST).filter_map(find).collect();
        for dtype in WeightType::ALL {
            let found = types.iter().find(|found| found.name == dtype.name()).unwrap();
            assert_eq!(found.block_len, dtype.block_len() as u64, "{dtype}");
            assert_eq!(found.block_bytes, dtype.block_bytes() as u64, "{dtype}");
            assert_eq!(found.stored(), StoredType::Weight(dtype));
            assert_eq!(number(dtype).and_then(find).unwrap().name, dtype.name());
        }
        assert!(find(LAST).is_some() && find(LAST + 1).is_none());
    }

    #[test]
    fn other_types_are_known_by_name() {
        assert_eq!(find(39).unwrap().stored(), StoredType::Other("MXFP4".into()));
        assert!(find(99).is_none());
    }
}
