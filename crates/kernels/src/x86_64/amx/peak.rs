//! Throughput of AMX tiles of bytes and of bf16.

use super::tiles::{AMX_TILE_LEN, AmxTiles};
use crate::peaks::{PeakLoop, Peaks};
use crate::x86_64::avx512;

/// The loops of this ISA.
pub(super) const PEAKS: Peaks = Peaks {
    int8: PeakLoop { run: int8, operations: 2 * 4 * (64 * AMX_TILE_LEN) as u64 },
    bf16: || Some(PeakLoop { run: bf16, operations: 2 * 4 * (32 * AMX_TILE_LEN) as u64 }),
    ..avx512::PEAKS
};

fn int8(iterations: usize) -> f64 {
    let ones = [0x0101_0101; AMX_TILE_LEN];
    // SAFETY: this table is reached only after dispatch.rs has seen that AMX is available.
    let sums = unsafe { AmxTiles::configure().repeat::<true>(&ones, iterations) };
    sums.iter().map(|&sum| f64::from(sum)).sum()
}

fn bf16(iterations: usize) -> f64 {
    let ones = [0x3f80_3f80; AMX_TILE_LEN];
    // SAFETY: as above.
    let sums = unsafe { AmxTiles::configure().repeat::<false>(&ones, iterations) };
    sums.iter().map(|&sum| f64::from(f32::from_bits(sum))).sum()
}
