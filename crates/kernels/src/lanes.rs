//! The vector that the algorithms in `generic/` are written over: 32 lanes of f32.
//!
//! 32 is the block length of ggml's small types and two registers of AVX-512 (four of AVX2), so a
//! dot product of one row has enough independent chains to hide the latency of its FMAs. An output
//! is always summed in the same order, lane by lane, then across lanes in a fixed tree: a row's
//! result depends neither on the other rows nor on how the work was cut.

use super::generic::decode;

/// Elements per vector.
pub(super) const LANES: usize = 32;

/// 32 lanes of f32.
///
/// An implementation for an instruction set may be used only inside functions that enable it: the
/// `#[target_feature]` instances in that set's folder.
pub(super) trait Lanes: Copy {
    fn splat(value: f32) -> Self;
    fn load(values: &[f32; LANES]) -> Self;
    fn store(self, out: &mut [f32; LANES]);
    fn add(self, other: Self) -> Self;
    fn mul(self, other: Self) -> Self;
    /// `self * factor + addend`; rounded once where the instruction set has FMA.
    fn mul_add(self, factor: Self, addend: Self) -> Self;
    /// The larger of both, lane by lane; `self` where either is NaN.
    fn max(self, other: Self) -> Self;
    /// 2^n, for lanes that hold `1.5 * 2^23 + n`; 0 for n = -127, which is the least.
    fn two_to(self) -> Self;
    /// The largest lane; there is no NaN.
    fn largest(self) -> f32;
    /// The sum over the lanes, halving: lanes i and i + 16, then i + 8, and so on.
    fn sum(self) -> f32;
    /// Brings the cache line at `address` nearer; never faults.
    fn prefetch(address: *const u8);
    /// As [`Lanes::prefetch`], no nearer than the second-level cache: more lines can be on their way there.
    fn prefetch_far(address: *const u8);
    /// Asks for the lines that a stream of weights, now at `address`, will come to; never faults. Processors' own
    /// prefetchers lose a tenth of the speed without it, some a third or half.
    fn prefetch_stream(address: *const u8);

    // 32 stored weights, as documented in `blocks.rs`. Dequantising rounds after the product and
    // after the sum, as ggml's reference does, so every instruction set yields the same weights.
    fn f32(unit: &[u8; 128]) -> Self;
    fn f16(unit: &[u8; 64]) -> Self;
    fn bf16(unit: &[u8; 64]) -> Self;
    fn q8_0(unit: &[u8; 34]) -> Self;
    fn q4_0(unit: &[u8; 18]) -> Self;
    fn q4_1(unit: &[u8; 20]) -> Self;
}

/// A storage type at compile time: how its blocks become lanes.
pub(super) trait Storage {
    /// Bytes of a block; of the float types, of 32 elements.
    const BLOCK_BYTES: usize;
    /// How often 32 elements a block holds.
    const UNITS: usize;
    /// Whether elements are floats, not blocks of integers.
    const FLOATS: bool;
    /// The bytes of a block.
    type Block: AsRef<[u8]>;
    /// The whole blocks of a row. Loops over blocks of a length that the compiler knows have no way to panic,
    /// which would keep their sums in memory.
    fn blocks(row: &[u8]) -> &[Self::Block];
    /// Decodes one unit of a block of `BLOCK_BYTES` bytes.
    fn lanes<L: Lanes>(block: &[u8], unit: usize) -> L;
}

/// Types that every level decodes in its own way.
macro_rules! storage_of_lanes {
    ($($name:ident, $bytes:literal, $floats:literal, $decode:ident;)*) => {$(
        pub(super) struct $name;
        impl Storage for $name {
            const BLOCK_BYTES: usize = $bytes;
            const UNITS: usize = 1;
            const FLOATS: bool = $floats;
            type Block = [u8; $bytes];
            #[inline(always)]
            fn blocks(row: &[u8]) -> &[Self::Block] {
                row.as_chunks().0
            }
            #[inline(always)]
            fn lanes<L: Lanes>(block: &[u8], _unit: usize) -> L {
                L::$decode(block.try_into().expect("a block is cut by its own length"))
            }
        }
    )*};
}

/// Types that all levels decode alike.
macro_rules! storage_of_decode {
    ($($name:ident, $bytes:literal, $units:literal, $decode:ident;)*) => {$(
        #[allow(non_camel_case_types)] // ggml's spelling
        pub(super) struct $name;
        impl Storage for $name {
            const BLOCK_BYTES: usize = $bytes;
            const UNITS: usize = $units;
            const FLOATS: bool = false;
            type Block = [u8; $bytes];
            #[inline(always)]
            fn blocks(row: &[u8]) -> &[Self::Block] {
                row.as_chunks().0
            }
            #[inline(always)]
            fn lanes<L: Lanes>(block: &[u8], unit: usize) -> L {
                L::load(&decode::$decode(block.try_into().expect("a block is cut by its own length"), unit))
            }
        }
    )*};
}

storage_of_lanes! {
    F32, 128, true, f32;
    F16, 64, true, f16;
    Bf16, 64, true, bf16;
    Q8_0, 34, false, q8_0;
    Q4_0, 18, false, q4_0;
    Q4_1, 20, false, q4_1;
}

storage_of_decode! {
    Q5_0, 22, 1, q5_0;
    Q5_1, 24, 1, q5_1;
    Q2_K, 84, 8, q2_k;
    Q3_K, 110, 8, q3_k;
    Q4_K, 144, 8, q4_k;
    Q5_K, 176, 8, q5_k;
    Q6_K, 210, 8, q6_k;
}

/// Calls `$function::<..., Storage>($args)` for a [`super::WeightType`] known at run time.
macro_rules! with_storage {
    ($dtype:expr, $function:ident::<$lanes:ty>($($arg:expr),* $(,)?)) => {{
        use $crate::{WeightType, lanes};
        match $dtype {
            WeightType::F32 => $function::<$lanes, lanes::F32>($($arg),*),
            WeightType::F16 => $function::<$lanes, lanes::F16>($($arg),*),
            WeightType::BF16 => $function::<$lanes, lanes::Bf16>($($arg),*),
            WeightType::Q8_0 => $function::<$lanes, lanes::Q8_0>($($arg),*),
            WeightType::Q4_0 => $function::<$lanes, lanes::Q4_0>($($arg),*),
            WeightType::Q4_1 => $function::<$lanes, lanes::Q4_1>($($arg),*),
            WeightType::Q5_0 => $function::<$lanes, lanes::Q5_0>($($arg),*),
            WeightType::Q5_1 => $function::<$lanes, lanes::Q5_1>($($arg),*),
            WeightType::Q2_K => $function::<$lanes, lanes::Q2_K>($($arg),*),
            WeightType::Q3_K => $function::<$lanes, lanes::Q3_K>($($arg),*),
            WeightType::Q4_K => $function::<$lanes, lanes::Q4_K>($($arg),*),
            WeightType::Q5_K => $function::<$lanes, lanes::Q5_K>($($arg),*),
            WeightType::Q6_K => $function::<$lanes, lanes::Q6_K>($($arg),*),
        }
    }};
}
pub(super) use with_storage;

/// Fewer than `LANES` values, with zeros behind.
#[inline(always)]
pub(super) fn padded(values: &[f32]) -> [f32; LANES] {
    let mut padded = [0.0; LANES];
    padded[..values.len()].copy_from_slice(values);
    padded
}

/// `values` in the first lanes, zeros behind.
#[inline(always)]
pub(super) fn load_partial<L: Lanes>(values: &[f32]) -> L {
    L::load(&padded(values))
}
