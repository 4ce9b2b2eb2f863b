//! The product with packed weights in plain Rust: the reference, written to be read.

use crate::generic::packed::PackedTask;
use crate::pack::{TILE_COLS, TILE_ROWS, TileLayout};
use crate::quantized_rows::{GROUPS, Panel, SCALE, TOTAL, block_words};

/// Runs one task: multiplies every row of x with every weight row of the task's strips.
pub(super) fn packed(task: &PackedTask) {
    let layout = task.weight.layout();
    for strip in task.strips.clone() {
        let tiles = task.weight.strip(strip);
        let lanes = TILE_ROWS.min(task.weight.rows() - strip * TILE_ROWS);
        for panel in task.x.panels() {
            for row in 0..panel.rows {
                for lane in 0..lanes {
                    let value = dot(&layout, tiles, lane, &panel, row);
                    let (row, feature) = (panel.first + row, strip * TILE_ROWS + lane);
                    // SAFETY: this task alone has the features of its strips.
                    unsafe { task.out.put(row * task.weight.rows() + feature, value, task.output) }
                }
            }
        }
    }
}

/// The product of one row of weights and one row of x.
fn dot(layout: &TileLayout, tiles: &[u8], lane: usize, panel: &Panel, row: usize) -> f32 {
    let mut sum = 0.0;
    for block in panel.blocks.chunks_exact(block_words(panel.rows)) {
        let (index, words) = (block[0] as usize, &block[1..]);
        let tile = &tiles[index * layout.bytes..][..layout.bytes];
        let word = |kind: usize| words[kind * panel.rows + row];
        let bytes = (0..GROUPS).flat_map(|group| word(group).to_le_bytes()).map(|byte| i32::from(byte as i8));
        let quants = (0..TILE_COLS).map(|column| layout.quant(tile, lane, column));
        let products: i32 = bytes.zip(quants).map(|(x, quant)| x * quant).sum();
        sum += products as f32 * f32::from_bits(word(SCALE)) * layout.scale(tile, lane);
        if let Some(min) = layout.min(tile, lane) {
            sum += min * f32::from_bits(word(TOTAL));
        }
    }
    sum
}
