//! [`Rows16`] in four NEON registers, with 4 rows in each.
//!
//! NEON is part of 64-bit Arm, so its instructions need no check. Every load and store goes through a
//! reference to an array of exactly its width.
//!
//! SAFETY of every block with `sdot` here: [`NeonRows`] with `DOT` is used only inside the
//! `#[target_feature]` functions of `dotprod/` and `i8mm/`, which dispatch.rs reaches only after it has seen
//! the dot product on this CPU.

use super::vectors::from_halves;
use crate::generic::strip::for_each_group;
use crate::prefetch::StreamPrefetch;
use crate::quantized_rows::{FLOAT_OFFSET, FLOAT_START};
use crate::rows16::{PackedRows16, ROW_BYTES, Rows16};
use crate::tile::TILE_ROWS;
use std::arch::aarch64::*;
use std::arch::asm;

/// 16 rows. With `DOT`, one instruction multiplies bytes and adds four products. With `MATRIX`, unpacked
/// weights are stored for one that multiplies 8 columns of two rows.
#[derive(Clone, Copy)]
pub(in crate::aarch64) struct NeonRows<const DOT: bool, const MATRIX: bool = false>;

/// Sums in 32 bits, and, without the dot product, sums in 16 bits, one for each product.
#[derive(Clone, Copy)]
pub(in crate::aarch64) struct Sums {
    wide: [int32x4_t; 4],
    narrow: [[int16x8_t; 2]; 4],
}

type Floats = [float32x4_t; 4];

// No closures here: one that is not inlined would be compiled without the ISA's instructions.

/// Runs code for each of the four registers of 16 rows, with its number as a constant. A loop would be
/// unrolled to the same, but the compiler takes long for the many loops of a microkernel.
macro_rules! for_each_quad {
    ($quad:ident, $run:expr) => {
        for_each_group!([0 1 2 3], $quad, $run)
    };
}

/// The same for the two NEON registers of `$register`, one of [`PackedRows16::REGISTERS`].
macro_rules! for_each_quad_of {
    ($register:expr, $quad:ident, $run:expr) => {
        for_each_group!([0 1], HALF, {
            let $quad = 2 * $register + HALF;
            // SAFETY: NEON is part of 64-bit Arm.
            unsafe { $run }
        })
    };
}

/// `sums` plus, for each row, the products of its 4 bytes and the 4 bytes of element `LANE` of `x`.
#[inline(always)]
fn sdot<const LANE: usize>(mut sums: int32x4_t, bytes: uint8x16_t, x: uint32x4_t) -> int32x4_t {
    // SAFETY: the dot product is enabled; see the top of this file. Nothing but these registers is touched.
    unsafe {
        asm!(
            "sdot {sums:v}.4s, {bytes:v}.16b, {x:v}.4b[{lane}]",
            sums = inout(vreg) sums,
            bytes = in(vreg) bytes,
            x = in(vreg) x,
            lane = const LANE,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sums
}

/// The most rows for which [`load_32`] is assembly. The sums of more rows need so many registers that the
/// compiler has to choose the place of every load.
const FEW_ROWS: usize = 4;

/// 32 bytes from byte `AT` on, which `M` rows are multiplied with.
#[inline(always)]
fn load_32<const AT: usize, const M: usize>(bytes: &[u8; 64]) -> [uint8x16_t; 2] {
    const { assert!(AT <= 32, "the bytes are inside the array") };
    if M > FEW_ROWS {
        // SAFETY: NEON is part of 64-bit Arm; the reference covers what is read.
        return unsafe { [vld1q_u8(bytes.as_ptr().add(AT)), vld1q_u8(bytes.as_ptr().add(AT + 16))] };
    }
    // The compiler would choose `ldp`, which Neoverse processors split into three operations: two loads and
    // an addition for the address. These two need no addition.
    let (low, high);
    // SAFETY: NEON is part of 64-bit Arm; the reference covers what is read.
    unsafe {
        asm!(
            "ldur {low:q}, [{bytes}, {at}]",
            "ldur {high:q}, [{bytes}, {at} + 16]",
            bytes = in(reg) bytes.as_ptr(),
            at = const AT,
            low = out(vreg) low,
            high = out(vreg) high,
            options(pure, readonly, nostack, preserves_flags),
        );
    }
    [low, high]
}

/// [`sdot`] of all rows. `lane` is a constant where it is called, so that one case remains.
#[inline(always)]
fn sdot_rows(mut sums: [int32x4_t; 4], bytes: [uint8x16_t; 4], x: &[u32; 4], lane: usize) -> [int32x4_t; 4] {
    // SAFETY: NEON is part of 64-bit Arm; the reference covers what is read.
    let x = unsafe { vld1q_u32(x.as_ptr()) };
    for_each_quad!(Q, {
        sums[Q] = match lane {
            0 => sdot::<0>(sums[Q], bytes[Q], x),
            1 => sdot::<1>(sums[Q], bytes[Q], x),
            2 => sdot::<2>(sums[Q], bytes[Q], x),
            _ => sdot::<3>(sums[Q], bytes[Q], x),
        };
    });
    sums
}

/// The difference between sums that start at [`FLOAT_START`] and zero, as floats, times `scale`.
#[inline(always)]
pub(in crate::aarch64) fn scaled(sums: int32x4_t, scale: f32) -> float32x4_t {
    // SAFETY: NEON is part of 64-bit Arm.
    unsafe {
        // The difference is exact. FMA would overwrite its addend, which would have to be copied.
        let sums = vsubq_f32(vreinterpretq_f32_s32(sums), vdupq_n_f32(FLOAT_OFFSET));
        vmulq_n_f32(sums, scale)
    }
}

/// The sums of the first row of x, from registers that have those of two rows of x and two rows of weights.
#[inline(always)]
fn first_row(a: float32x4_t, b: float32x4_t) -> float32x4_t {
    // SAFETY: NEON is part of 64-bit Arm.
    unsafe { vreinterpretq_f32_f64(vzip1q_f64(vreinterpretq_f64_f32(a), vreinterpretq_f64_f32(b))) }
}

/// The sums of the second row of x.
#[inline(always)]
fn second_row(a: float32x4_t, b: float32x4_t) -> float32x4_t {
    // SAFETY: NEON is part of 64-bit Arm.
    unsafe { vreinterpretq_f32_f64(vzip2q_f64(vreinterpretq_f64_f32(a), vreinterpretq_f64_f32(b))) }
}

/// The four bytes of `x`, four times.
#[inline(always)]
fn repeated(x: u32) -> int8x16_t {
    // SAFETY: NEON is part of 64-bit Arm.
    unsafe { vreinterpretq_s8_u32(vdupq_n_u32(x)) }
}

/// Shifts every byte. `count` is a constant where it is called, so that one instruction remains.
#[inline(always)]
fn shift_right(bytes: uint8x16_t, count: usize) -> uint8x16_t {
    // SAFETY: NEON is part of 64-bit Arm.
    unsafe {
        match count {
            0 => bytes,
            1 => vshrq_n_u8::<1>(bytes),
            2 => vshrq_n_u8::<2>(bytes),
            3 => vshrq_n_u8::<3>(bytes),
            4 => vshrq_n_u8::<4>(bytes),
            5 => vshrq_n_u8::<5>(bytes),
            6 => vshrq_n_u8::<6>(bytes),
            _ => vshrq_n_u8::<7>(bytes),
        }
    }
}

/// Like [`shift_right`].
#[inline(always)]
fn shift_left(bytes: uint8x16_t, count: usize) -> uint8x16_t {
    // SAFETY: NEON is part of 64-bit Arm.
    unsafe {
        match count {
            0 => bytes,
            1 => vshlq_n_u8::<1>(bytes),
            2 => vshlq_n_u8::<2>(bytes),
            3 => vshlq_n_u8::<3>(bytes),
            4 => vshlq_n_u8::<4>(bytes),
            5 => vshlq_n_u8::<5>(bytes),
            6 => vshlq_n_u8::<6>(bytes),
            _ => vshlq_n_u8::<7>(bytes),
        }
    }
}

/// Floats from 16-bit integers.
#[inline(always)]
fn from_wide(low: int16x8_t, high: int16x8_t) -> Floats {
    // SAFETY: NEON is part of 64-bit Arm.
    unsafe {
        [
            vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))),
            vcvtq_f32_s32(vmovl_high_s16(low)),
            vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))),
            vcvtq_f32_s32(vmovl_high_s16(high)),
        ]
    }
}

impl<const DOT: bool, const MATRIX: bool> Rows16 for NeonRows<DOT, MATRIX> {
    type Floats = Floats;
    const BF16_WORDS: usize = if MATRIX { 2 } else { 1 };

    #[inline(always)]
    fn splat(value: f32) -> Self::Floats {
        // SAFETY: NEON is part of 64-bit Arm.
        unsafe { [vdupq_n_f32(value); 4] }
    }

    #[inline(always)]
    fn load(values: &[f32; TILE_ROWS]) -> Self::Floats {
        // SAFETY: NEON is part of 64-bit Arm; the reference covers what is read.
        unsafe {
            let at = values.as_ptr();
            [vld1q_f32(at), vld1q_f32(at.add(4)), vld1q_f32(at.add(8)), vld1q_f32(at.add(12))]
        }
    }

    #[inline(always)]
    fn store([a, b, c, d]: Self::Floats, out: &mut [f32; TILE_ROWS]) {
        // SAFETY: NEON is part of 64-bit Arm; the reference covers what is written.
        unsafe {
            let at = out.as_mut_ptr();
            vst1q_f32(at, a);
            vst1q_f32(at.add(4), b);
            vst1q_f32(at.add(8), c);
            vst1q_f32(at.add(12), d);
        }
    }

    #[inline(always)]
    fn add(a: Self::Floats, b: Self::Floats) -> Self::Floats {
        // SAFETY: NEON is part of 64-bit Arm.
        unsafe {
            [vaddq_f32(a[0], b[0]), vaddq_f32(a[1], b[1]), vaddq_f32(a[2], b[2]), vaddq_f32(a[3], b[3])]
        }
    }

    #[inline(always)]
    fn mul(a: Self::Floats, b: Self::Floats) -> Self::Floats {
        // SAFETY: NEON is part of 64-bit Arm.
        unsafe {
            [vmulq_f32(a[0], b[0]), vmulq_f32(a[1], b[1]), vmulq_f32(a[2], b[2]), vmulq_f32(a[3], b[3])]
        }
    }

    #[inline(always)]
    fn mul_add(a: Self::Floats, b: Self::Floats, c: Self::Floats) -> Self::Floats {
        // SAFETY: NEON is part of 64-bit Arm.
        unsafe {
            [
                vfmaq_f32(c[0], a[0], b[0]),
                vfmaq_f32(c[1], a[1], b[1]),
                vfmaq_f32(c[2], a[2], b[2]),
                vfmaq_f32(c[3], a[3], b[3]),
            ]
        }
    }

    #[inline(always)]
    fn dot_bf16(_a: Self::Floats, _b: Self::Floats, _c: Self::Floats) -> Self::Floats {
        unreachable!("the matrix instructions multiply pairs of words")
    }

    #[inline(always)]
    fn dot_bf16_pairs(a: Self::Floats, x: &[u32; 4], mut c: Self::Floats) -> Self::Floats {
        // SAFETY: NEON is part of 64-bit Arm; the reference covers what is read.
        let x = unsafe { vld1q_u32(x.as_ptr()) };
        for q in 0..4 {
            // SAFETY: BF16 is enabled: only the table of `i8mm/` has such products, which dispatch.rs reaches
            // only after it has seen BF16 on this CPU. Nothing but these registers is touched.
            unsafe {
                asm!(
                    "bfmmla {c:v}.4s, {x:v}.8h, {a:v}.8h",
                    c = inout(vreg) c[q],
                    x = in(vreg) x,
                    a = in(vreg) a[q],
                    options(pure, nomem, nostack, preserves_flags),
                );
            }
        }
        c
    }

    #[inline(always)]
    fn apart([[a, b, c, d], [e, f, g, h]]: [Self::Floats; 2]) -> [Self::Floats; 2] {
        [
            [first_row(a, b), first_row(c, d), first_row(e, f), first_row(g, h)],
            [second_row(a, b), second_row(c, d), second_row(e, f), second_row(g, h)],
        ]
    }

    #[inline(always)]
    fn round_to_bf16(numbers: &[f32; 2 * TILE_ROWS], words: &mut [u32; TILE_ROWS]) {
        for (numbers, words) in numbers.as_chunks::<8>().0.iter().zip(words.as_chunks_mut::<4>().0) {
            // SAFETY: BF16 is enabled, as in `dot_bf16_pairs`; the references cover what is read and written.
            unsafe {
                let (low, high) = (vld1q_f32(numbers.as_ptr()), vld1q_f32(numbers.as_ptr().add(4)));
                let mut rounded: uint32x4_t;
                asm!(
                    "bfcvtn {rounded:v}.4h, {low:v}.4s",
                    "bfcvtn2 {rounded:v}.8h, {high:v}.4s",
                    low = in(vreg) low,
                    high = in(vreg) high,
                    rounded = out(vreg) rounded,
                    options(pure, nomem, nostack, preserves_flags),
                );
                vst1q_u32(words.as_mut_ptr(), rounded);
            }
        }
    }

    #[inline(always)]
    fn transpose(rows: [&[u8; ROW_BYTES]; TILE_ROWS], out: &mut [[f32; TILE_ROWS]; TILE_ROWS]) {
        for lane in (0..TILE_ROWS).step_by(4) {
            for column in (0..TILE_ROWS).step_by(4) {
                transpose_4x4::<MATRIX>(&rows, lane, column, out);
            }
        }
    }
}

/// Transposes 4 rows from `lane` on and 4 words from `column` on. Interleaves words, if `PAIRS` is false, and
/// then pairs of words.
#[inline(always)]
fn transpose_4x4<const PAIRS: bool>(
    rows: &[&[u8; ROW_BYTES]; TILE_ROWS],
    lane: usize,
    column: usize,
    out: &mut [[f32; TILE_ROWS]; TILE_ROWS],
) {
    // SAFETY: NEON is part of 64-bit Arm; the reference covers what is read.
    unsafe {
        let mut words = [vdupq_n_u32(0); 4];
        for (words, row) in words.iter_mut().zip(&rows[lane..]) {
            let row: &[u8; 16] = row[4 * column..][..16].try_into().expect("the slice has this length");
            *words = vreinterpretq_u32_u8(vld1q_u8(row.as_ptr()));
        }
        let [a, b, c, d] = words;
        if PAIRS {
            let [a, b, c, d] = words.map(|x| vreinterpretq_f32_u32(x));
            let pairs = [[first_row(a, b), first_row(c, d)], [second_row(a, b), second_row(c, d)]];
            for (pair, rows) in pairs.into_iter().enumerate() {
                let out = &mut out[column + 2 * pair + lane / 8][2 * (lane % 8)..][..8];
                vst1q_f32(out.as_mut_ptr(), rows[0]);
                vst1q_f32(out.as_mut_ptr().add(4), rows[1]);
            }
            return;
        }
        let even = [vtrn1q_u32(a, b), vtrn1q_u32(c, d)].map(|x| vreinterpretq_u64_u32(x));
        let odd = [vtrn2q_u32(a, b), vtrn2q_u32(c, d)].map(|x| vreinterpretq_u64_u32(x));
        let columns = [
            vtrn1q_u64(even[0], even[1]),
            vtrn1q_u64(odd[0], odd[1]),
            vtrn2q_u64(even[0], even[1]),
            vtrn2q_u64(odd[0], odd[1]),
        ];
        for (words, out) in columns.into_iter().zip(&mut out[column..]) {
            let out: &mut [f32; 4] = (&mut out[lane..][..4]).try_into().expect("the slice has this length");
            vst1q_f32(out.as_mut_ptr(), vreinterpretq_f32_u64(words));
        }
    }
}

impl<const DOT: bool, const MATRIX: bool> PackedRows16 for NeonRows<DOT, MATRIX> {
    type Bytes = [uint8x16_t; 4];
    type Sums = Sums;
    /// With the dot product, the sums of 6 rows fit into registers.
    const REGISTERS: usize = if DOT { 1 } else { 2 };
    const SIGNED_OFFSET: i32 = 0;
    const UNPACKS: bool = DOT;
    const COUNTS_TILES: bool = true;

    /// The assembly has no instructions, but the compiler does not know that.
    #[inline(always)]
    fn read_index(mut index: usize) -> usize {
        // SAFETY: nothing is touched.
        unsafe { asm!("/* {0} */", inout(reg) index, options(nomem, nostack, preserves_flags)) }
        index
    }

    #[inline(always)]
    fn bytes<const M: usize>(bytes: &[u8; 64]) -> Self::Bytes {
        let ([a, b], [c, d]) = (load_32::<0, M>(bytes), load_32::<32, M>(bytes));
        [a, b, c, d]
    }

    #[inline(always)]
    fn store_bytes(bytes: Self::Bytes, out: &mut [u8; 64]) {
        // SAFETY: NEON is part of 64-bit Arm; the reference covers what is written.
        unsafe {
            for_each_quad!(Q, vst1q_u8(out.as_mut_ptr().add(16 * Q), bytes[Q]));
        }
    }

    /// With `MATRIX`, each register has 8 columns of two rows.
    #[inline(always)]
    fn store_groups([first, second]: [Self::Bytes; 2], out: &mut [[u8; 64]; 2]) {
        let mut pairs = [first, second];
        if MATRIX {
            for q in 0..4 {
                // SAFETY: NEON is part of 64-bit Arm.
                unsafe {
                    let (first, second) = (vreinterpretq_u32_u8(first[q]), vreinterpretq_u32_u8(second[q]));
                    pairs[q / 2][2 * (q % 2)] = vreinterpretq_u8_u32(vzip1q_u32(first, second));
                    pairs[q / 2][2 * (q % 2) + 1] = vreinterpretq_u8_u32(vzip2q_u32(first, second));
                }
            }
        }
        Self::store_bytes(pairs[0], &mut out[0]);
        Self::store_bytes(pairs[1], &mut out[1]);
    }

    #[inline(always)]
    fn plus(mut bytes: Self::Bytes, more: u8) -> Self::Bytes {
        // SAFETY: NEON is part of 64-bit Arm.
        unsafe {
            for_each_quad!(Q, bytes[Q] = vaddq_u8(bytes[Q], vdupq_n_u8(more)));
            bytes
        }
    }

    #[inline(always)]
    fn bits(mut bytes: Self::Bytes, shift: usize, mask: u8) -> Self::Bytes {
        // SAFETY: NEON is part of 64-bit Arm.
        unsafe {
            for_each_quad!(Q, {
                bytes[Q] = shift_right(bytes[Q], shift);
                // The shift alone leaves these bits.
                if mask < u8::MAX >> shift {
                    bytes[Q] = vandq_u8(bytes[Q], vdupq_n_u8(mask));
                }
            });
            bytes
        }
    }

    #[inline(always)]
    fn with_bits(
        mut bytes: Self::Bytes,
        plane: Self::Bytes,
        from: usize,
        to: usize,
        mask: u8,
    ) -> Self::Bytes {
        // SAFETY: NEON is part of 64-bit Arm.
        unsafe {
            for_each_quad!(Q, {
                let shifted = match to.checked_sub(from) {
                    Some(left) => shift_left(plane[Q], left),
                    None => shift_right(plane[Q], from - to),
                };
                // With intrinsics, the compiler would emit a second instruction. The bits are 0 before.
                asm!(
                    "bit {bytes:v}.16b, {shifted:v}.16b, {mask:v}.16b",
                    bytes = inout(vreg) bytes[Q],
                    shifted = in(vreg) shifted,
                    mask = in(vreg) vdupq_n_u8(mask),
                    options(pure, nomem, nostack, preserves_flags),
                );
            });
            bytes
        }
    }

    #[inline(always)]
    fn lookup(mut bytes: Self::Bytes, table: &[u8; 16]) -> Self::Bytes {
        // SAFETY: NEON is part of 64-bit Arm; the reference covers what is read.
        unsafe {
            let table = vld1q_u8(table.as_ptr());
            for_each_quad!(Q, bytes[Q] = vqtbl1q_u8(table, bytes[Q]));
            bytes
        }
    }

    #[inline(always)]
    fn start(start: i32) -> Self::Sums {
        // SAFETY: NEON is part of 64-bit Arm.
        unsafe { Sums { wide: [vdupq_n_s32(start); 4], narrow: [[vdupq_n_s16(0); 2]; 4] } }
    }

    #[inline(always)]
    fn dot(
        mut sums: Self::Sums,
        register: usize,
        bytes: Self::Bytes,
        x: &[u32; 4],
        lane: usize,
    ) -> Self::Sums {
        if DOT {
            sums.wide = sdot_rows(sums.wide, bytes, x, lane);
            return sums;
        }
        let x = repeated(x[lane]);
        for_each_quad_of!(register, q, {
            let (weights, [low, high]) = (vreinterpretq_s8_u8(bytes[q]), &mut sums.narrow[q]);
            *low = vmlal_s8(*low, vget_low_s8(weights), vget_low_s8(x));
            *high = vmlal_high_s8(*high, weights, x);
        });
        sums
    }

    #[inline(always)]
    fn dot_signed(
        mut sums: Self::Sums,
        register: usize,
        bytes: Self::Bytes,
        x: &[u32; 4],
        lane: usize,
    ) -> Self::Sums {
        if DOT {
            return Self::dot(sums, register, bytes, x, lane);
        }
        let x = repeated(x[lane]);
        for_each_quad_of!(register, q, {
            let weights = vreinterpretq_s8_u8(bytes[q]);
            let low = vmull_s8(vget_low_s8(weights), vget_low_s8(x));
            let high = vmull_high_s8(weights, x);
            // 2 * 128 * 127 fits into 16 bits.
            sums.wide[q] = vpadalq_s16(sums.wide[q], vpaddq_s16(low, high));
        });
        sums
    }

    #[inline(always)]
    fn fold(mut sums: Self::Sums, register: usize) -> Self::Sums {
        if !DOT {
            for_each_quad_of!(register, q, {
                let [low, high] = sums.narrow[q];
                sums.wide[q] = vpadalq_s16(sums.wide[q], vpaddq_s16(low, high));
                sums.narrow[q] = [vdupq_n_s16(0); 2];
            });
        }
        sums
    }

    #[inline(always)]
    fn scaled(Sums { wide, .. }: Self::Sums, scale: f32, _offset: f32) -> Self::Floats {
        let [a, b, c, d] = wide;
        [scaled(a, scale), scaled(b, scale), scaled(c, scale), scaled(d, scale)]
    }

    #[inline(always)]
    fn pairs<const M: usize>(bytes: &[u8; 64], place: usize) -> Self::Bytes {
        // SAFETY: NEON is part of 64-bit Arm.
        unsafe {
            let [first, more, second, second_more] = NeonRows::<false>::joined::<M>(bytes, place);
            [first, more, vaddq_u8(second, vdupq_n_u8(8)), vaddq_u8(second_more, vdupq_n_u8(8))]
        }
    }

    #[inline(always)]
    fn joined<const M: usize>(bytes: &[u8; 64], place: usize) -> Self::Bytes {
        // A constant where it is called.
        let [low, high] = if place == 0 { load_32::<0, M>(bytes) } else { load_32::<32, M>(bytes) };
        // SAFETY: NEON is part of 64-bit Arm.
        unsafe {
            let (first, more) = (vandq_u8(low, vdupq_n_u8(15)), vandq_u8(high, vdupq_n_u8(15)));
            if DOT {
                return [first, more, low, high];
            }
            // Sums of 16 bits would overflow. A shift leaves the second rows' numbers minus 8.
            let second = vshrq_n_s8::<4>(vreinterpretq_s8_u8(low));
            let second_more = vshrq_n_s8::<4>(vreinterpretq_s8_u8(high));
            [first, more, vreinterpretq_u8_s8(second), vreinterpretq_u8_s8(second_more)]
        }
    }

    /// With the dot product, the sum of joined rows is 16 times that of the second row plus the first's.
    #[inline(always)]
    fn start_joined(first: i32, second: i32) -> Self::Sums {
        let joined = second.wrapping_sub(FLOAT_START).wrapping_mul(16).wrapping_add(FLOAT_START);
        let second = if DOT { joined.wrapping_add(first) } else { second };
        // SAFETY: NEON is part of 64-bit Arm.
        unsafe {
            let (first, second) = (vdupq_n_s32(first), vdupq_n_s32(second));
            Sums { wide: [first, first, second, second], narrow: [[vdupq_n_s16(0); 2]; 4] }
        }
    }

    /// Exact like [`PackedRows16::scaled`]: a sixteenth of the scale has the same bits.
    #[inline(always)]
    fn scaled_joined(sums: Self::Sums, scale: f32) -> Self::Floats {
        if !DOT {
            return Self::scaled(sums, scale, 0.0);
        }
        let [a, b, c, d] = sums.wide;
        // SAFETY: NEON is part of 64-bit Arm.
        let (c, d) = unsafe { (vsubq_s32(c, a), vsubq_s32(d, b)) };
        let second = scale * (1.0 / 16.0);
        [scaled(a, scale), scaled(b, scale), scaled(c, second), scaled(d, second)]
    }

    #[inline(always)]
    fn halves(bytes: &[u8; 2 * TILE_ROWS]) -> Self::Floats {
        // SAFETY: NEON is part of 64-bit Arm; the reference covers what is read.
        unsafe {
            let at = bytes.as_ptr();
            let (low, high) = (vld1q_u8(at), vld1q_u8(at.add(16)));
            let ([a, b], [c, d]) =
                (from_halves(vreinterpretq_u16_u8(low)), from_halves(vreinterpretq_u16_u8(high)));
            [a, b, c, d]
        }
    }

    #[inline(always)]
    fn unsigned(bytes: &[u8; TILE_ROWS]) -> Self::Floats {
        // SAFETY: NEON is part of 64-bit Arm; the reference covers what is read.
        unsafe {
            let bytes = vld1q_u8(bytes.as_ptr());
            let (low, high) = (vmovl_u8(vget_low_u8(bytes)), vmovl_high_u8(bytes));
            from_wide(vreinterpretq_s16_u16(low), vreinterpretq_s16_u16(high))
        }
    }

    #[inline(always)]
    fn signed(bytes: &[u8; TILE_ROWS]) -> Self::Floats {
        // SAFETY: NEON is part of 64-bit Arm; the reference covers what is read.
        unsafe {
            let bytes = vld1q_s8(bytes.as_ptr().cast());
            from_wide(vmovl_s8(vget_low_s8(bytes)), vmovl_high_s8(bytes))
        }
    }

    #[inline(always)]
    fn stream_prefetch() -> StreamPrefetch {
        // One line for each tile, which leads the processor's own prefetcher into the next page.
        StreamPrefetch { step: 1024, ..StreamPrefetch::into_l1(2048) }
    }
}
