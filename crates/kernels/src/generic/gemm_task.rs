//! Tasks of `gemm.rs`: what is multiplied, and what becomes of the sums.

// The compiler keeps arrays in registers if it unrolls the loops over them. It always does that for counted
// loops with constant bounds, but not always for iterators.
#![allow(clippy::needless_range_loop)]

use super::elementwise::gate_mul;
use super::gemm::{Words, round_to_words, row_words};
use crate::mlp::Mlp;
use crate::output::{Output, SharedOut};
use crate::rows16::Rows16;
use crate::tile::TILE_ROWS;
use crate::weight::{Weight, WeightRows};
use std::ops::Range;

/// Some strips of a weight, to be multiplied with all rows of x. The facade has checked the shapes.
pub(crate) struct GemmTask<'a> {
    /// Panels of `(words, rows)`. The last panel may have another number of rows, see
    /// [`tail_rows`](super::gemm::tail_rows).
    pub(crate) x: &'a [u32],
    /// Rows of x.
    pub(crate) rows: usize,
    pub(crate) weight: Weight<'a>,
    /// The strips of the weight that this task computes.
    pub(crate) strips: Range<usize>,
    /// `(rows, weight.rows)`
    pub(crate) out: &'a SharedOut<'a>,
    pub(crate) output: Output,
}

/// Some strips of a gate and of the weight that it gates, to be multiplied with all rows of x.
pub(crate) struct GatedTask<'a> {
    /// Panels, as in [`GemmTask`].
    pub(crate) x: &'a [u32],
    /// Rows of x. Only AMX needs the number.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
    pub(crate) rows: usize,
    pub(crate) mlp: &'a Mlp<'a>,
    /// The strips that this task computes, the same of both weights.
    pub(crate) strips: Range<usize>,
    /// `activation(x · gateᵀ) * (x · upᵀ)`, as panels for the next product.
    pub(crate) out: &'a SharedOut<'a, u32>,
}

/// Which weights a task multiplies with all rows of x, and what it does with the sums.
pub(crate) trait TaskKind<'a> {
    /// How many weights share x.
    const WEIGHTS: usize;

    /// The panels of x.
    fn x(&self) -> &'a [u32];
    /// The strips that this task computes, the same of all weights.
    fn strips(&self) -> Range<usize>;
    /// A weight. All have the same shape.
    fn weight(&self, number: usize) -> WeightRows<'a>;

    /// Uses the complete sums of one panel, of usually M rows, and the N strips from `strip` on.
    ///
    /// - `sums`: `(weights, rows, N)` of all panels
    /// - `rows`: the rows of the panel
    fn finish<R: Rows16, const M: usize, const N: usize>(
        &self,
        sums: &mut [Words],
        rows: Range<usize>,
        strip: usize,
    );
}

fn unpacked(weight: Weight) -> WeightRows {
    let Weight::Rows(weight) = weight else { unreachable!("this kernel takes unpacked weights") };
    weight
}

/// A plain product: the outputs are the sums.
impl<'a> TaskKind<'a> for GemmTask<'a> {
    const WEIGHTS: usize = 1;

    #[inline(always)]
    fn x(&self) -> &'a [u32] {
        self.x
    }

    #[inline(always)]
    fn strips(&self) -> Range<usize> {
        self.strips.clone()
    }

    #[inline(always)]
    fn weight(&self, _number: usize) -> WeightRows<'a> {
        unpacked(self.weight)
    }

    /// Writes the outputs that exist.
    #[inline(always)]
    fn finish<R: Rows16, const M: usize, const N: usize>(
        &self,
        sums: &mut [Words],
        rows: Range<usize>,
        strip: usize,
    ) {
        let features = self.weight.rows();
        let sums = sums.as_chunks::<N>().0[rows.clone()].iter();
        for (row, sums) in (rows.start..self.rows).zip(sums) {
            for n in 0..N.min(self.strips.end - strip) {
                let feature = (strip + n) * TILE_ROWS;
                let width = TILE_ROWS.min(features - feature);
                // SAFETY: this task alone has the features of its strips.
                let out = unsafe { self.out.slice_mut(row * features + feature, width) };
                let sums = &sums[n].0;
                match (<&mut [f32; TILE_ROWS]>::try_from(&mut *out), self.output) {
                    (Ok(out), Output::Set) => *out = *sums,
                    (Ok(out), Output::Add) => R::store(R::add(R::load(out), R::load(sums)), out),
                    (Err(_), Output::Set) => out.copy_from_slice(&sums[..width]),
                    (Err(_), Output::Add) => out.iter_mut().zip(sums).for_each(|(out, sum)| *out += sum),
                }
            }
        }
    }
}

/// A gate and the weight that it gates; words are bf16.
impl<'a> TaskKind<'a> for GatedTask<'a> {
    const WEIGHTS: usize = 2;

    #[inline(always)]
    fn x(&self) -> &'a [u32] {
        self.x
    }

    #[inline(always)]
    fn strips(&self) -> Range<usize> {
        self.strips.clone()
    }

    #[inline(always)]
    fn weight(&self, number: usize) -> WeightRows<'a> {
        unpacked(if number == 0 { self.mlp.gate } else { self.mlp.up })
    }

    /// Applies the gate and writes words of a panel for the next product.
    #[inline(always)]
    fn finish<R: Rows16, const M: usize, const N: usize>(
        &self,
        sums: &mut [Words],
        rows: Range<usize>,
        strip: usize,
    ) {
        let (gate, up) = sums.split_at_mut(sums.len() / 2);
        let (gate, _) = gate[rows.start * N..rows.end * N].as_chunks_mut::<N>();
        let (up, _) = up[rows.start * N..rows.end * N].as_chunks::<N>();
        let row_len = row_words::<R, true>(self.mlp.gate.rows());
        let first = strip * TILE_ROWS / 2;
        let strips = N.min(self.strips.end - strip);
        let words = (strips * TILE_ROWS / 2).min(row_len - first);
        // SAFETY: this task alone has these features, and panels do not overlap.
        let out =
            unsafe { self.out.slice_mut(rows.start * row_len + first * rows.len(), words * rows.len()) };
        for (gate, up) in gate.as_flattened_mut().iter_mut().zip(up.as_flattened()) {
            gate_mul(self.mlp.activation, &mut gate.0, &up.0);
        }
        let mut lines = [[0; TILE_ROWS]; TILE_ROWS];
        let mut transposed = [[0.0; TILE_ROWS]; TILE_ROWS];
        for (part, out) in out.chunks_mut(TILE_ROWS * rows.len()).enumerate() {
            for (gate, line) in gate.iter().zip(&mut lines) {
                // The last part may be half as long.
                let mut numbers = [[0.0; TILE_ROWS]; 2];
                for (numbers, gate) in numbers.iter_mut().zip(&gate[2 * part..]) {
                    *numbers = gate.0;
                }
                *line = round_to_words::<R>(numbers.as_flattened());
            }
            R::transpose(lines.each_ref().map(bytemuck::cast_ref), &mut transposed);
            let columns = transposed.iter().step_by(R::BF16_WORDS);
            for (out, column) in out.chunks_exact_mut(R::BF16_WORDS * rows.len()).zip(columns) {
                let column: &[u32; TILE_ROWS] = bytemuck::cast_ref(column);
                match <&mut [u32; M]>::try_from(&mut *out) {
                    Ok(out) => out.copy_from_slice(&column[..M]),
                    Err(_) => out.copy_from_slice(&column[..out.len()]),
                }
            }
        }
    }
}
