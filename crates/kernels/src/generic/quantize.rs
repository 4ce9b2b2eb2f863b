//! f32 activations to 8 bits; the layout is in `quantized_rows.rs`.

use crate::pack::TILE_COLS;
use crate::quantized_rows::{
    FLOAT_OFFSET, FLOAT_START, MAX_PANEL_ROWS, OFFSET, Precision, SCALE, START_8, START_128, TOTAL,
    block_words,
};

/// What is smaller counts as 0: its reciprocal would be infinite.
const SMALLEST: f32 = 1e-30;
/// What is larger counts as infinite: the offset of its scale would be.
const LARGEST: f32 = 1e33;
/// How many times the mean magnitude of a row one of 32 must be for their rest to count. Of normally distributed
/// numbers none is; docs/kernels.md has what it costs and gives in models.
const OUTLIER_FACTOR: f32 = 15.0;

/// Writes one panel: `x`, `(rows, cols)`.
///
/// The largest of 32 becomes 127. Where one is not finite, neither is the scale, so that every product
/// with the row becomes what it would be without rounding: not finite.
#[inline(always)]
pub(crate) fn quantize(x: &[f32], rows: usize, precision: Precision, panel: &mut [u32]) {
    let cols = x.len() / rows;
    // Where the largest of 32 is not above it, their rest does not count.
    let mut residual_above = [0.0; MAX_PANEL_ROWS];
    for (residual_above, row) in residual_above.iter_mut().zip(x.chunks_exact(cols)) {
        *residual_above = match precision {
            Precision::Bits8 => f32::INFINITY,
            Precision::Mixed => SMALLEST.max(OUTLIER_FACTOR * mean_magnitude(row)),
            Precision::Bits16 => SMALLEST,
        };
    }
    let (count, blocks) = panel.split_first_mut().expect("a panel has a word for their number");
    let mut blocks = blocks.chunks_exact_mut(block_words(rows));
    let mut next = |index: usize| {
        let (at, words) = blocks.next()?.split_first_mut()?;
        *at = index as u32;
        Some(words)
    };
    *count = 0;
    for index in 0..cols / TILE_COLS {
        let words = next(index).expect("there is room for all columns twice");
        let blocks = x.chunks_exact(cols).map(|row| &row.as_chunks().0[index]);
        let mut has_residuals = false;
        for (row, block) in blocks.clone().enumerate() {
            quantize_block(block, words, rows, row);
            has_residuals |= largest(block) > residual_above[row];
        }
        *count += 1;
        if has_residuals {
            let words = next(index).expect("there is room for all columns twice");
            for (row, block) in blocks.enumerate() {
                let residual =
                    if largest(block) > residual_above[row] { residual(block) } else { [0.0; TILE_COLS] };
                quantize_block(&residual, words, rows, row);
            }
            *count += 1;
        }
    }
}

#[inline(always)]
fn mean_magnitude(row: &[f32]) -> f32 {
    // Side by side, for the compiler to vectorise.
    let mut sums = [0.0; TILE_COLS];
    for block in row.as_chunks::<TILE_COLS>().0 {
        for (sum, x) in sums.iter_mut().zip(block) {
            *sum += x.abs();
        }
    }
    sums.iter().sum::<f32>() / row.len() as f32
}

/// Writes 32 columns of row `row`.
#[inline(always)]
fn quantize_block(block: &[f32; TILE_COLS], words: &mut [u32], rows: usize, row: usize) {
    let (scale, inverse) = scale(largest(block));
    let mut bytes = [0_u8; TILE_COLS];
    let mut sum = 0_i32;
    for (byte, &x) in bytes.iter_mut().zip(block) {
        *byte = shifted(x, inverse).to_bits() as u8;
        // Wrapping, though nothing wraps: a check would keep the loop from being vectorised.
        sum = sum.wrapping_add(i32::from(*byte as i8));
    }
    let (quads, _) = bytes.as_chunks::<4>();
    for (group, quad) in quads.iter().enumerate() {
        words[group * rows + row] = u32::from_le_bytes(*quad);
    }
    words[SCALE * rows + row] = scale.to_bits();
    words[START_8 * rows + row] = (FLOAT_START - 8 * sum) as u32;
    words[START_128 * rows + row] = (FLOAT_START - 128 * sum) as u32;
    words[OFFSET * rows + row] = (FLOAT_OFFSET * scale).to_bits();
    words[TOTAL * rows + row] = (scale * sum as f32).to_bits();
}

/// What [`quantize_block`] loses.
#[inline(always)]
fn residual(block: &[f32; TILE_COLS]) -> [f32; TILE_COLS] {
    let (scale, inverse) = scale(largest(block));
    block.map(|x| x - (shifted(x, inverse) - FLOAT_OFFSET) * scale)
}

/// The largest without its sign, or what is not a number.
#[inline(always)]
fn largest(block: &[f32; TILE_COLS]) -> f32 {
    // As integers, because then NaN is the largest.
    f32::from_bits(block.iter().fold(0, |largest, x| (x.to_bits() & 0x7fff_ffff).max(largest)))
}

/// That of 32 columns, and what they are multiplied by to be bytes.
#[inline(always)]
fn scale(largest: f32) -> (f32, f32) {
    match largest {
        ..SMALLEST => (0.0, 0.0),
        SMALLEST..=LARGEST => (round_to_22_bits(largest / 127.0), 127.0 / largest),
        _ => (f32::INFINITY, 0.0),
    }
}

/// `x` times `inverse`, to the nearest integer, ties to even, which then stands in the low bits.
#[inline(always)]
fn shifted(x: f32, inverse: f32) -> f32 {
    x * inverse + FLOAT_OFFSET
}

/// The number nearest to `x`, which is positive and finite, whose last two bits are 0.
#[inline(always)]
fn round_to_22_bits(x: f32) -> f32 {
    f32::from_bits((x.to_bits() + 2) & !3)
}
