//! 16 rows of weights at once: what the algorithms on tiles are written over.
//!
//! A lane is a row of weights, an output feature, so that no sum ever goes across lanes. Integer sums
//! are exact; each level then does the same operations on f32 in the same order.

use crate::pack::TILE_ROWS;

/// 16 f32 numbers, one for each row, in one ISA's registers.
///
/// An implementation for an instruction set may be used only inside functions that enable it: the
/// `#[target_feature]` instances in that set's folder.
pub(super) trait Rows16: Copy {
    /// A number for each row.
    type Floats: Copy;

    fn splat(value: f32) -> Self::Floats;
    fn load(values: &[f32; TILE_ROWS]) -> Self::Floats;
    fn store(values: Self::Floats, out: &mut [f32; TILE_ROWS]);
    fn add(a: Self::Floats, b: Self::Floats) -> Self::Floats;
    fn mul(a: Self::Floats, b: Self::Floats) -> Self::Floats;
    /// `a * b + c`; rounded once where the instruction set has FMA.
    fn mul_add(a: Self::Floats, b: Self::Floats, c: Self::Floats) -> Self::Floats;
    /// `c`, plus both products of the pairs of bf16 in `a` and `b`. Only at levels whose table says so.
    fn dot_bf16(a: Self::Floats, b: Self::Floats, c: Self::Floats) -> Self::Floats;
    /// Turns 16 rows, each `stride` behind the one before, of 16 columns: column `k` becomes `out[k]`.
    fn transpose(rows: &[f32], stride: usize, out: &mut [[f32; TILE_ROWS]; TILE_ROWS]);
}

/// Instructions for 16 rows of packed weights. The scalar reference has none: its `packed` is plain Rust.
pub(super) trait PackedRows16: Rows16 {
    /// 4 unsigned bytes of each row.
    type Bytes: Copy;
    /// An integer sum for each row, perhaps in parts.
    type Sums: Copy;
    /// What [`PackedRows16::dot_signed`] adds to a weight of 8 bits: the sums are that much too large, times
    /// the sum of the activations.
    const SIGNED_OFFSET: i32;

    fn bytes(bytes: &[u8; 64]) -> Self::Bytes;
    /// The low and the high half of every byte.
    fn nibbles(bytes: Self::Bytes) -> (Self::Bytes, Self::Bytes);
    /// `nibbles`, plus 16 in every byte of which `plane` has bit `BIT`.
    fn with_high_bit<const BIT: usize>(nibbles: Self::Bytes, plane: Self::Bytes) -> Self::Bytes;

    /// Every sum is `start`.
    fn start(start: i32) -> Self::Sums;
    /// Adds for each row the products of its 4 bytes, below 32, and the 4 signed bytes of `x`, from -127 on.
    /// After 8 calls (4 where a byte may be above 15) comes a [`PackedRows16::fold`].
    fn dot(sums: Self::Sums, bytes: Self::Bytes, x: u32) -> Self::Sums;
    /// As [`PackedRows16::dot`], for bytes that stand for themselves less 128, without a fold.
    fn dot_signed(sums: Self::Sums, bytes: Self::Bytes, x: u32) -> Self::Sums;
    /// Makes room in the parts.
    fn fold(sums: Self::Sums) -> Self::Sums;
    /// The sums less `FLOAT_START`, after a fold, times `scale`, rounded once. `offset` is as in
    /// `quantized_rows.rs`.
    fn scaled(sums: Self::Sums, scale: f32, offset: f32) -> Self::Floats;
    /// Little-endian f16 numbers.
    fn halves(bytes: &[u8; 2 * TILE_ROWS]) -> Self::Floats;

    /// Asks for the lines that a stream of weights, now at `address`, will come to; never faults. Processors' own
    /// prefetchers lose a tenth of the speed without it, some a third or half.
    fn prefetch_stream(address: *const u8);
}
