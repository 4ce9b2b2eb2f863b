//! The product with packed weights in plain Rust: the reference, written to be read.

use crate::generic::packed::PackedTask;
use crate::quantized_rows::{GROUPS, Panel, SCALE, block_words, group_word};
use crate::tile::{TILE_COLS, TILE_ROWS, TileLayout};

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
fn dot(layout: &TileLayout, strip: &[u8], lane: usize, panel: &Panel, row: usize) -> f32 {
    let mut sum = 0.0;
    for block in panel.blocks.chunks_exact(block_words(panel.rows)) {
        let (index, words) = (block[0] as usize, &block[1..]);
        let tile = layout.tile(strip, index);
        let word = |kind: usize| words[kind * panel.rows + row];
        let groups = (0..GROUPS).map(|group| words[group_word(group, panel.rows, row)]);
        let bytes = groups.flat_map(u32::to_le_bytes).map(|byte| i32::from(byte as i8));
        let bytes: Vec<i32> = bytes.collect();
        let scale = f32::from_bits(word(SCALE));
        // A part shares a scale.
        let len = TILE_COLS / layout.scales;
        for (start, bytes) in (0..TILE_COLS).step_by(len).zip(bytes.chunks_exact(len)) {
            let products = |(i, x): (usize, &i32)| x * layout.quant(tile.1, lane, start + i);
            let products: i32 = bytes.iter().enumerate().map(products).sum();
            sum += products as f32 * scale * layout.scale(tile, lane, start);
            if let Some(min) = layout.min(tile, lane, start) {
                sum += min * (bytes.iter().sum::<i32>() as f32 * scale);
            }
        }
    }
    sum
}
