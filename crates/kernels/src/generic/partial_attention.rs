//! The result of attention over a part of the keys.
//!
//! The softmax over one part of the keys can be merged with that over another part, if each keeps its maximum
//! and its sum (Milakov and Gimelshein, "Online normalizer calculation for softmax", arXiv 1805.02867). This
//! is plain Rust, so that all ISAs give the same bits.

use super::elementwise::exp;
use crate::lanes::LANES;
use std::ops::Range;

/// For every query, the running softmax over its scores and the weighted sum of values.
#[derive(Default)]
pub(crate) struct PartialAttention {
    /// The largest score.
    pub(crate) maximum: Vec<f32>,
    /// The sum of `exp(score - maximum)`.
    pub(crate) sum: Vec<f32>,
    /// `(queries, head_dim)` in vectors (see [`part_start`]): the sum of `exp(score - maximum) * value`.
    pub(crate) weighted: Vec<[f32; LANES]>,
}

impl PartialAttention {
    /// Starts over, with no keys.
    ///
    /// - `width`: vectors of head_dim
    pub(crate) fn clear(&mut self, queries: usize, width: usize) {
        self.maximum.clear();
        self.sum.clear();
        self.weighted.clear();
        self.maximum.resize(queries, f32::NEG_INFINITY);
        self.sum.resize(queries, 0.0);
        self.weighted.resize(queries * width, [0.0; LANES]);
    }

    /// Adds the result over later keys for the queries in `range`.
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

    /// Writes the final result of one query, `(head_dim,)`.
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

/// Where vector `index` of a row of `len` elements begins. If `len` is not a multiple of 32, the last vector
/// begins earlier, so that it ends with the row. Some elements are then in two vectors.
#[inline(always)]
pub(super) fn part_start(index: usize, len: usize) -> usize {
    (index * LANES).min(len.saturating_sub(LANES))
}
