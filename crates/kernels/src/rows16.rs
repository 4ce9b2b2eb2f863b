//! The vector that the algorithms on tiles are written over: one lane for each of 16 rows of weights.
//!
//! A lane is a row of weights, that is, an output feature, so no sum goes across lanes. Sums of integers are
//! exact. Every ISA then does the same f32 operations in the same order.

use crate::prefetch::StreamPrefetch;
use crate::tile::TILE_ROWS;

/// Bytes of a row of [`Rows16::transpose`]: 16 words.
pub(super) const ROW_BYTES: usize = 4 * TILE_ROWS;

/// 16 f32 numbers, one for each row, in the registers of one ISA.
///
/// An implementation may be used only inside functions that enable its ISA: the `#[target_feature]` functions
/// in the ISA's folder.
pub(super) trait Rows16: Copy {
    /// A number for each row.
    type Floats: Copy;
    /// Words of bf16 that are multiplied together: 1 with [`Rows16::dot_bf16`], 2 with
    /// [`Rows16::dot_bf16_pairs`].
    const BF16_WORDS: usize = 1;

    fn splat(value: f32) -> Self::Floats;
    fn load(values: &[f32; TILE_ROWS]) -> Self::Floats;
    fn store(values: Self::Floats, out: &mut [f32; TILE_ROWS]);
    fn add(a: Self::Floats, b: Self::Floats) -> Self::Floats;
    fn mul(a: Self::Floats, b: Self::Floats) -> Self::Floats;
    /// `a * b + c`; rounded once where the ISA has FMA.
    fn mul_add(a: Self::Floats, b: Self::Floats, c: Self::Floats) -> Self::Floats;
    /// `c` plus the two products of the bf16 in each word of `a` and `b`. Called only if the ISA's table has
    /// products of bf16.
    fn dot_bf16(a: Self::Floats, b: Self::Floats, c: Self::Floats) -> Self::Floats;
    /// `c` plus the products of two words of 8 rows of weights, `a`, and two words of each of two rows of x.
    /// `a` is what [`Rows16::transpose`] wrote.
    #[inline(always)]
    fn dot_bf16_pairs(_a: Self::Floats, _x: &[u32; 4], _c: Self::Floats) -> Self::Floats {
        unreachable!("this ISA multiplies single words")
    }
    /// The sums of each of two rows of x, from their sums with rows 0 to 7 and with rows 8 to 15 of weights.
    #[inline(always)]
    fn apart(_sums: [Self::Floats; 2]) -> [Self::Floats; 2] {
        unreachable!("this ISA multiplies single words")
    }
    /// Rounds to bf16, ties to even. Two neighbours form a word. Called only if the ISA's table has products
    /// of bf16.
    fn round_to_bf16(numbers: &[f32; 2 * TILE_ROWS], words: &mut [u32; TILE_ROWS]);
    /// Transposes 16 rows of 16 words of 32 bits: word `k` of every row becomes `out[k]`. With two
    /// [`Rows16::BF16_WORDS`], words `2 k` and `2 k + 1` of rows 0 to 7 become `out[2 k]`, one row after the
    /// other, and those of rows 8 to 15 `out[2 k + 1]`.
    fn transpose(rows: [&[u8; ROW_BYTES]; TILE_ROWS], out: &mut [[f32; TILE_ROWS]; TILE_ROWS]);
}

/// Instructions for packed weights. The scalar ISA does not implement them: its packed product is plain Rust.
pub(super) trait PackedRows16: Rows16 {
    /// 4 unsigned bytes of each row.
    type Bytes: Copy;
    /// An integer sum for each row. It may consist of several numbers.
    type Sums: Copy;
    /// Registers that 16 rows take, which are multiplied one after the other: with the sums of both halves of
    /// the rows, some would be in memory.
    const REGISTERS: usize;
    /// The value that [`PackedRows16::dot_signed`] adds to every 8-bit weight. The sums are too large by this
    /// value times the sum of the activations.
    const SIGNED_OFFSET: i32;
    /// Whether products of several panels unpack the weights first, see `generic/unpacked.rs`.
    const UNPACKS: bool;
    /// Whether unpacked tiles have the numbers of packed ones. Otherwise they have the bytes that
    /// [`PackedRows16::dot_signed`] takes.
    const UNPACKED_AS_STORED: bool = false;
    /// Whether products count tiles instead of reading their indices. Loads of weights then do not wait for
    /// that of the index.
    const COUNTS_TILES: bool = false;

    /// The same index. If tiles are counted, the compiler must not see that, or it would always read it.
    #[inline(always)]
    fn read_index(index: usize) -> usize {
        index
    }

    /// Loads bytes that `M` rows are multiplied with.
    fn bytes<const M: usize>(bytes: &[u8; 64]) -> Self::Bytes;
    fn store_bytes(bytes: Self::Bytes, out: &mut [u8; 64]);
    /// Stores the bytes of two neighbouring groups as products of many rows need them.
    #[inline(always)]
    fn store_groups([first, second]: [Self::Bytes; 2], out: &mut [[u8; 64]; 2]) {
        Self::store_bytes(first, &mut out[0]);
        Self::store_bytes(second, &mut out[1]);
    }
    /// Adds `more` to every byte, without overflow.
    fn plus(bytes: Self::Bytes, more: u8) -> Self::Bytes;
    /// The bits `mask` of every byte that is shifted right by `shift`.
    fn bits(bytes: Self::Bytes, shift: usize, mask: u8) -> Self::Bytes;
    /// `bytes`, or'ed with the bits `mask` of every byte of `plane`, whose bit `from` becomes bit `to`. The
    /// bits of a mask come from one byte.
    fn with_bits(bytes: Self::Bytes, plane: Self::Bytes, from: usize, to: usize, mask: u8) -> Self::Bytes;

    /// The element of `table` that each byte, below 16, is the index of.
    fn lookup(bytes: Self::Bytes, table: &[u8; 16]) -> Self::Bytes;

    /// Sets every sum to `start`.
    fn start(start: i32) -> Self::Sums;
    /// Adds, for each row of register `register`, the products of its 4 bytes (below 64) and the 4 signed
    /// bytes of `x[lane]` (-127 or more). After 8 calls, 4 if bytes can be above 15, or 2 if they can be
    /// above 31, [`PackedRows16::fold`] must follow.
    fn dot(sums: Self::Sums, register: usize, bytes: Self::Bytes, x: &[u32; 4], lane: usize) -> Self::Sums;
    /// Like [`PackedRows16::dot`], for signed bytes, which are stored as [`SIGN`](crate::tile::SIGN) says.
    /// Needs no fold.
    fn dot_signed(
        sums: Self::Sums,
        register: usize,
        bytes: Self::Bytes,
        x: &[u32; 4],
        lane: usize,
    ) -> Self::Sums;
    /// Adds up the numbers that the sums of register `register` consist of, so that they cannot overflow.
    fn fold(sums: Self::Sums, register: usize) -> Self::Sums;
    /// `(sums - FLOAT_START) * scale`, rounded once. Call it after a fold. `quantized_rows.rs` explains
    /// `offset`.
    fn scaled(sums: Self::Sums, scale: f32, offset: f32) -> Self::Floats;
    /// Little-endian f16 numbers.
    fn halves(bytes: &[u8; 2 * TILE_ROWS]) -> Self::Floats;
    /// Unsigned bytes as numbers.
    fn unsigned(bytes: &[u8; TILE_ROWS]) -> Self::Floats;
    /// Signed bytes as numbers.
    fn signed(bytes: &[u8; TILE_ROWS]) -> Self::Floats;

    /// The numbers of group `place`, 0 or 1, of two that are stored as pairs of rows. Called only on Arm.
    fn pairs<const M: usize>(_bytes: &[u8; 64], _place: usize) -> Self::Bytes {
        unreachable!("only Arm's tiles have pairs of rows")
    }
    /// The same for [`PackedRows16::dot`]: rows 8 to 15 may stay joined with rows 0 to 7. This and the next
    /// two are called only on Arm, so other ISAs have none.
    fn joined<const M: usize>(_bytes: &[u8; 64], _place: usize) -> Self::Bytes {
        unreachable!("only Arm's tiles have pairs of rows")
    }
    /// Starts the sums of joined rows, so that those that [`PackedRows16::scaled_joined`] scales start at
    /// `first` for rows 0 to 7, and at `second` for rows 8 to 15. The stored numbers of the latter count as 8
    /// less than they are.
    fn start_joined(_first: i32, _second: i32) -> Self::Sums {
        unreachable!("only Arm's tiles have pairs of rows")
    }
    /// [`PackedRows16::scaled`] of the sums of joined rows.
    fn scaled_joined(_sums: Self::Sums, _scale: f32) -> Self::Floats {
        unreachable!("only Arm's tiles have pairs of rows")
    }

    /// How streams of packed weights are prefetched. Loops ask before they begin, because the answer may be
    /// in memory.
    fn stream_prefetch() -> StreamPrefetch;
}
