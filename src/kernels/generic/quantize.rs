//! f32 activations to 8 bits; the layout is in `activations.rs`.

use crate::kernels::activations::{
    BLOCK_WORDS, FLOAT_OFFSET, FLOAT_START, OFFSET, Precision, SCALE, START_8, START_128, TOTAL,
};
use crate::kernels::pack::TILE_COLS;

/// What is smaller counts as 0: its reciprocal would be infinite.
const SMALLEST: f32 = 1e-30;
/// What is larger counts as infinite: the offset of its scale would be.
const LARGEST: f32 = 1e33;

/// Writes one panel: the lines of `x`, `(rows, cols)`.
///
/// The largest of 32 becomes 127. Where one is not finite, neither is the scale, so that every product
/// with the row becomes what it would be without rounding: not finite.
#[inline(always)]
pub(in crate::kernels) fn quantize(x: &[f32], rows: usize, precision: Precision, panel: &mut [u32]) {
    let lines = rows * precision.lines();
    for (index, row) in x.chunks_exact(x.len() / rows).enumerate() {
        let (blocks, _) = row.as_chunks::<TILE_COLS>();
        for (block, words) in blocks.iter().zip(panel.chunks_exact_mut(BLOCK_WORDS * lines)) {
            match precision {
                Precision::Bits8 => _ = quantize_line(block, words, lines, index),
                Precision::Bits16 => {
                    let rest = quantize_line(block, words, lines, 2 * index);
                    quantize_line(&rest, words, lines, 2 * index + 1);
                }
            }
        }
    }
}

/// Writes 32 columns of line `line`, and gives what rounding has lost.
#[inline(always)]
fn quantize_line(block: &[f32; TILE_COLS], words: &mut [u32], lines: usize, line: usize) -> [f32; TILE_COLS] {
    // As integers, because then NaN is the largest.
    let largest = block.iter().fold(0, |largest, x| (x.to_bits() & 0x7fff_ffff).max(largest));
    let largest = f32::from_bits(largest);
    let (scale, inverse) = match largest {
        ..SMALLEST => (0.0, 0.0),
        SMALLEST..=LARGEST => (round_to_22_bits(largest / 127.0), 127.0 / largest),
        _ => (f32::INFINITY, 0.0),
    };
    let mut bytes = [0_u8; TILE_COLS];
    let mut rest = *block;
    let mut sum = 0_i32;
    for ((byte, rest), &x) in bytes.iter_mut().zip(&mut rest).zip(block) {
        // To the nearest integer, ties to even, which then stands in the low bits.
        let shifted = x * inverse + FLOAT_OFFSET;
        *byte = shifted.to_bits() as u8;
        *rest = x - (shifted - FLOAT_OFFSET) * scale;
        // Wrapping, though nothing wraps: a check would keep the loop from being vectorised.
        sum = sum.wrapping_add(i32::from(*byte as i8));
    }
    let (quads, _) = bytes.as_chunks::<4>();
    for (group, quad) in quads.iter().enumerate() {
        words[group * lines + line] = u32::from_le_bytes(*quad);
    }
    words[SCALE * lines + line] = scale.to_bits();
    words[START_8 * lines + line] = (FLOAT_START - 8 * sum) as u32;
    words[START_128 * lines + line] = (FLOAT_START - 128 * sum) as u32;
    words[OFFSET * lines + line] = (FLOAT_OFFSET * scale).to_bits();
    words[TOTAL * lines + line] = (scale * sum as f32).to_bits();
    rest
}

/// The number nearest to `x`, which is positive and finite, whose last two bits are 0.
#[inline(always)]
fn round_to_22_bits(x: f32) -> f32 {
    f32::from_bits((x.to_bits() + 2) & !3)
}
