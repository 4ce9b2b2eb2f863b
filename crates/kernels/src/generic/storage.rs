//! The storage types at compile time: how each one's blocks are dequantised to vectors.

use super::dequantize_block;
use crate::lanes::Lanes;

/// A storage type at compile time.
pub(crate) trait Storage {
    /// Bytes of a block. For float types a block is 32 elements here.
    const BLOCK_BYTES: usize;
    /// Vectors of 32 elements in a block.
    const VECTORS: usize;
    /// Whether the elements are floats instead of quantised integers.
    const IS_FLOAT: bool;
    /// The bytes of a block, as an array.
    type Block: AsRef<[u8]>;
    /// The whole blocks of a row, as arrays. Loops over arrays have no bounds checks, which would keep sums
    /// in memory.
    fn blocks(row: &[u8]) -> &[Self::Block];
    /// Dequantises one vector of a block of `BLOCK_BYTES` bytes.
    fn lanes<L: Lanes>(block: &[u8], vector: usize) -> L;
}

/// Types that each ISA dequantises with code of its own.
macro_rules! dequantized_per_isa {
    ($($name:ident, $bytes:literal, $is_float:literal, $dequantize:ident;)*) => {$(
        pub(crate) struct $name;
        impl Storage for $name {
            const BLOCK_BYTES: usize = $bytes;
            const VECTORS: usize = 1;
            const IS_FLOAT: bool = $is_float;
            type Block = [u8; $bytes];
            #[inline(always)]
            fn blocks(row: &[u8]) -> &[Self::Block] {
                row.as_chunks().0
            }
            #[inline(always)]
            fn lanes<L: Lanes>(block: &[u8], _vector: usize) -> L {
                L::$dequantize(block.try_into().expect("the slice has the length of a block"))
            }
        }
    )*};
}

/// Types that all ISAs dequantise with the same code.
macro_rules! dequantized_alike {
    ($($name:ident, $bytes:literal, $vectors:literal, $dequantize:ident;)*) => {$(
        #[allow(non_camel_case_types)] // ggml's spelling
        pub(crate) struct $name;
        impl Storage for $name {
            const BLOCK_BYTES: usize = $bytes;
            const VECTORS: usize = $vectors;
            const IS_FLOAT: bool = false;
            type Block = [u8; $bytes];
            #[inline(always)]
            fn blocks(row: &[u8]) -> &[Self::Block] {
                row.as_chunks().0
            }
            #[inline(always)]
            fn lanes<L: Lanes>(block: &[u8], vector: usize) -> L {
                let block = block.try_into().expect("the slice has the length of a block");
                L::load(&dequantize_block::$dequantize(block, vector))
            }
        }
    )*};
}

dequantized_per_isa! {
    F32, 128, true, f32;
    F16, 64, true, f16;
    Bf16, 64, true, bf16;
    Q8_0, 34, false, q8_0;
    Q4_0, 18, false, q4_0;
    Q4_1, 20, false, q4_1;
}

dequantized_alike! {
    Q5_0, 22, 1, q5_0;
    Q5_1, 24, 1, q5_1;
    Q2_K, 84, 8, q2_k;
    Q3_K, 110, 8, q3_k;
    Q4_K, 144, 8, q4_k;
    Q5_K, 176, 8, q5_k;
    Q6_K, 210, 8, q6_k;
    IQ4_NL, 18, 1, iq4_nl;
    IQ4_XS, 136, 8, iq4_xs;
}

/// Calls `$function::<..., Storage>($args)` for a [`WeightType`](crate::blocks::WeightType) known at run
/// time.
macro_rules! with_storage {
    ($dtype:expr, $function:ident::<$lanes:ty>($($arg:expr),* $(,)?)) => {{
        use $crate::{blocks::WeightType, generic::storage};
        match $dtype {
            WeightType::F32 => $function::<$lanes, storage::F32>($($arg),*),
            WeightType::F16 => $function::<$lanes, storage::F16>($($arg),*),
            WeightType::BF16 => $function::<$lanes, storage::Bf16>($($arg),*),
            WeightType::Q8_0 => $function::<$lanes, storage::Q8_0>($($arg),*),
            WeightType::Q4_0 => $function::<$lanes, storage::Q4_0>($($arg),*),
            WeightType::Q4_1 => $function::<$lanes, storage::Q4_1>($($arg),*),
            WeightType::Q5_0 => $function::<$lanes, storage::Q5_0>($($arg),*),
            WeightType::Q5_1 => $function::<$lanes, storage::Q5_1>($($arg),*),
            WeightType::Q2_K => $function::<$lanes, storage::Q2_K>($($arg),*),
            WeightType::Q3_K => $function::<$lanes, storage::Q3_K>($($arg),*),
            WeightType::Q4_K => $function::<$lanes, storage::Q4_K>($($arg),*),
            WeightType::Q5_K => $function::<$lanes, storage::Q5_K>($($arg),*),
            WeightType::Q6_K => $function::<$lanes, storage::Q6_K>($($arg),*),
            WeightType::IQ4_NL => $function::<$lanes, storage::IQ4_NL>($($arg),*),
            WeightType::IQ4_XS => $function::<$lanes, storage::IQ4_XS>($($arg),*),
        }
    }};
}
pub(crate) use with_storage;

/// The same for a type that KV blocks have.
macro_rules! with_kv_storage {
    ($dtype:expr, $function:ident::<$lanes:ty>($($arg:expr),* $(,)?)) => {{
        use $crate::{blocks::WeightType, generic::storage};
        match $dtype {
            WeightType::F32 => $function::<$lanes, storage::F32>($($arg),*),
            WeightType::F16 => $function::<$lanes, storage::F16>($($arg),*),
            WeightType::Q8_0 => $function::<$lanes, storage::Q8_0>($($arg),*),
            _ => $function::<$lanes, storage::Bf16>($($arg),*),
        }
    }};
}
pub(crate) use with_kv_storage;
