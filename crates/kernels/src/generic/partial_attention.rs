//! What queries attend to, as far as the keys have been read.
//!
//! A softmax over a part of the keys can be put together with one over other keys, if both keep their
//! maximum and their sum (Milakov and Gimelshein, "Online normalizer calculation for softmax", arXiv
//! 1805.02867). Plain Rust, so that it gives the same bits whatever instructions it is compiled for.

use super::elementwise::exp;
use crate::lanes::LANES;
use std::ops::Range;

/// For each query the running softmax over its scores, and the values summed with its weights.
#[derive(Default)]
pub(crate) struct PartialAttention {
    /// The largest score.
    pub(super) maximum: Vec<f32>,
    /// Of `exp(score - maximum)`.
    pub(super) sum: Vec<f32>,
    /// `(queries, head_dim)` in parts ([`part_start`]): the sum of `exp(score - maximum) * value`.
    pub(super) weighted: Vec<[f32; LANES]>,
}

impl PartialAttention {
    /// Begins anew, with no keys.
    ///
    /// - `width`: parts of head_dim
    pub(crate) fn clear(&mut self, queries: usize, width: usize) {
        self.maximum.clear();
        self.sum.clear();
        self.weighted.clear();
        self.maximum.resize(queries, f32::NEG_INFINITY);
        self.sum.resize(queries, 0.0);
        self.weighted.resize(queries * width, [0.0; LANES]);
    }

    /// Adds what the queries in `range` attend to in later keys.
    #[inline(always)]
    pub(crate) fn merge(&mut self, later: &PartialAttention, range: Range<usize>) {
        let width = self.weighted.len() / self.sum.len().max(1);
        for query in range {
            let (before, after) = (self.maximum[query], later.maximum[query]);
            let maximum = if after > before { after } else { before };
            let (rescale, rescale_later) = (exp(before - maximum), exp(after - maximum));
            self.maximum[query] = maximum;
            self.sum[query] = self.sum[query] * rescale + later.sum[query] * rescale_later;
            let weighted = self.weighted[query * width..][..width].as_flattened_mut();
            let later = later.weighted[query * width..][..width].as_flattened();
            for (weighted, &later) in weighted.iter_mut().zip(later) {
                *weighted = *weighted * rescale + later * rescale_later;
            }
        }
    }

    /// Writes the outcome for one query, `(head_dim,)`.
    #[inline(always)]
    pub(crate) fn write(&self, query: usize, out: &mut [f32]) {
        let width = self.weighted.len() / self.sum.len().max(1);
        let inverse = 1.0 / self.sum[query];
        for (index, weighted) in self.weighted[query * width..][..width].iter().enumerate() {
            let start = part_start(index, out.len());
            for (out, &value) in out[start..].iter_mut().zip(weighted) {
                *out = value * inverse;
            }
        }
    }
}

/// Where part `index` of a row of `len` elements begins. The last part of a row that is no multiple of 32 long
/// begins earlier: some elements are in two parts, and none is beyond the row.
#[inline(always)]
pub(super) fn part_start(index: usize, len: usize) -> usize {
    (index * LANES).min(len.saturating_sub(LANES))
}
