//! Quantises f32 activations to 8 bits. `quantized_rows.rs` describes the layout.

use crate::quantized_rows::{
    FLOAT_OFFSET, FLOAT_START, HALF_SUM, MAX_PANEL_ROWS, OFFSET, Precision, SCALE, START_8, START_128, TOTAL,
    block_words, group_word,
};
use crate::tile::TILE_COLS;

/// Blocks whose largest number is smaller count as zeros, because the inverse of their scale would be
/// infinite.
const SMALLEST: f32 = 1e-30;
/// Blocks whose largest number is larger count as infinite, because the offset of their scale would be.
const LARGEST: f32 = 1e33;
/// A block has a residual if one of its numbers is larger than this factor times the mean magnitude of the
/// row. Normally distributed rows have none. docs/experiments.md compares factors.
const OUTLIER_FACTOR: f32 = 15.0;

/// Writes one panel: `x`, `(rows, cols)`, with the precision of each row.
///
/// The largest number of a block becomes 127. If one is not finite, the scale is not finite either, so every
/// product with the row is not finite, as it would be without quantising.
#[inline(always)]
pub(crate) fn quantize(x: &[f32], precisions: &[Precision], panel: &mut [u32]) {
    let rows = precisions.len();
    let cols = x.len() / rows;
    // A block whose largest number is not above its row's value has no residual.
    let mut residual_above = [0.0; MAX_PANEL_ROWS];
    for ((residual_above, row), precision) in
        residual_above.iter_mut().zip(x.chunks_exact(cols)).zip(precisions)
    {
        *residual_above = match precision {
            Precision::Bits8 => f32::INFINITY,
            Precision::Mixed => SMALLEST.max(OUTLIER_FACTOR * mean_magnitude(row)),
            Precision::Bits16 => SMALLEST,
        };
    }
    let (count, blocks) = panel.split_first_mut().expect("a panel begins with its number of blocks");
    let mut blocks = blocks.chunks_exact_mut(block_words(rows));
    let mut next = |index: usize| {
        let (at, words) = blocks.next()?.split_first_mut()?;
        *at = index as u32;
        Some(words)
    };
    *count = 0;
    for index in 0..cols / TILE_COLS {
        let words = next(index).expect("a panel has room for all columns and their residuals");
        let blocks = x.chunks_exact(cols).map(|row| &row.as_chunks().0[index]);
        let mut has_residuals = false;
        for (row, block) in blocks.clone().enumerate() {
            quantize_block(block, words, rows, row);
            has_residuals |= largest(block) > residual_above[row];
        }
        *count += 1;
        if has_residuals {
            let words = next(index).expect("a panel has room for all columns and their residuals");
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
    // Parallel sums, so that the compiler vectorises the loop.
    let mut sums = [0.0; TILE_COLS];
    for block in row.as_chunks::<TILE_COLS>().0 {
        for (sum, x) in sums.iter_mut().zip(block) {
            *sum += x.abs();
        }
    }
    sums.iter().sum::<f32>() / row.len() as f32
}

/// What each byte counts in a number with the sum of all 32 in its lower half, and that of the first 16 in
/// its upper half. Both are below 2^15.
const SUM_PLACES: [i32; TILE_COLS] = {
    let mut places = [1; TILE_COLS];
    let mut i = 0;
    while i < TILE_COLS / 2 {
        places[i] += 1 << 16;
        i += 1;
    }
    places
};

/// Quantises 32 columns of row `row`.
#[inline(always)]
fn quantize_block(block: &[f32; TILE_COLS], words: &mut [u32], rows: usize, row: usize) {
    let (scale, inverse) = scale(largest(block));
    let mut bytes = [0_u8; TILE_COLS];
    // Both sums in one number, because a loop with two of them would not be vectorised.
    let mut sums = 0_i32;
    for ((byte, &x), &places) in bytes.iter_mut().zip(block).zip(&SUM_PLACES) {
        *byte = shifted(x, inverse).to_bits() as u8;
        // Wrapping, although nothing overflows: a check would prevent vectorisation.
        sums = sums.wrapping_add(i32::from(*byte as i8).wrapping_mul(places));
    }
    let sum = i32::from(sums as i16);
    let half_sum = (sums - sum) >> 16;
    let (quads, _) = bytes.as_chunks::<4>();
    for (pair, quads) in quads.as_chunks::<2>().0.iter().enumerate() {
        // Two groups are neighbours.
        words[group_word(2 * pair, rows, row)..][..2].copy_from_slice(&quads.map(u32::from_le_bytes));
    }
    words[SCALE * rows + row] = scale.to_bits();
    words[START_8 * rows + row] = (FLOAT_START - 8 * sum) as u32;
    words[START_128 * rows + row] = (FLOAT_START - 128 * sum) as u32;
    words[OFFSET * rows + row] = (FLOAT_OFFSET * scale).to_bits();
    words[TOTAL * rows + row] = (scale * sum as f32).to_bits();
    words[HALF_SUM * rows + row] = half_sum as u32;
}

/// The residual of [`quantize_block`]: the numbers minus their rounded values.
#[inline(always)]
fn residual(block: &[f32; TILE_COLS]) -> [f32; TILE_COLS] {
    let (scale, inverse) = scale(largest(block));
    block.map(|x| x - (shifted(x, inverse) - FLOAT_OFFSET) * scale)
}

/// The largest magnitude, or NaN if there is one.
#[inline(always)]
fn largest(block: &[f32; TILE_COLS]) -> f32 {
    // Compared as integers, because then NaN is the largest.
    f32::from_bits(block.iter().fold(0, |largest, x| (x.to_bits() & 0x7fff_ffff).max(largest)))
}

/// The scale of a block with this largest magnitude, and the factor that turns numbers into bytes.
#[inline(always)]
fn scale(largest: f32) -> (f32, f32) {
    match largest {
        ..SMALLEST => (0.0, 0.0),
        SMALLEST..=LARGEST => (round_to_22_bits(largest / 127.0), 127.0 / largest),
        _ => (f32::INFINITY, 0.0),
    }
}

/// `x * inverse` rounded to the nearest integer, ties to even. The integer is in the low bits.
#[inline(always)]
fn shifted(x: f32, inverse: f32) -> f32 {
    x * inverse + FLOAT_OFFSET
}

/// The number nearest to `x` whose last two bits are 0. `x` is positive and finite.
#[inline(always)]
fn round_to_22_bits(x: f32) -> f32 {
    f32::from_bits((x.to_bits() + 2) & !3)
}
