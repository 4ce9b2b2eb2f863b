//! Attention over the slots of the KV cache.
//!
//! What depends on positions only is planned once for all layers: masks, and where keys and values go.
//!
//! - Rows that are the only ones of their sequence in a pass, such as those that decode, go together: one
//!   product for all slots from the first of them to the last. Slots between that take no part are computed
//!   too, and ignored. On Metal, one row alone is a single kernel, Candle's `sdpa`.
//! - Other spans go one by one, in tiles of rows, so that scores take a bounded amount of memory. Where there
//!   are flash-attn kernels, these compute a whole span.
//!
//! Source: Vaswani et al., "Attention Is All You Need", arXiv 1706.03762, equation 1; the heads share keys
//! and values as in Ainslie et al., "GQA", arXiv 2305.13245.

use super::slots::Slots;
use crate::device::{flash_attention, has_flash_attention};
use candle_core::{D, DType, Device, Result, Tensor};
use candle_nn::ops::{sdpa, softmax_last_dim};

/// The most scores that are computed at once, unless a single row has more.
pub(super) const MAX_SCORES: usize = 1 << 24;

/// The most rows of a tile. In smaller tiles, fewer scores are computed that the mask then hides.
const TILE_ROWS: usize = 256;

/// For which `head_dim` Candle's `sdpa` has kernels for one query. They read keys and values by the stride of
/// heads, and know neither masks nor other slots. Its kernels for several queries are not used: in Candle
/// 0.11, they hide too few positions from some spans that do not begin at position 0.
const SDPA_HEAD_DIMS: [usize; 5] = [32, 64, 96, 128, 256];

/// Rows of one sequence: those from position `start` on.
#[derive(Clone, Copy)]
pub(super) struct Place {
    pub(super) slot: usize,
    pub(super) start: usize,
    pub(super) rows: usize,
}

/// The number of query heads and the like.
#[derive(Clone, Copy)]
pub(super) struct Heads {
    pub(super) query: usize,
    pub(super) kv: usize,
    pub(super) dim: usize,
}

/// Attention of the rows of a pass, for any layer.
pub(super) struct Plan {
    heads: Heads,
    batch: Option<Batch>,
    spans: Vec<PlannedSpan>,
}

/// The leading rows of a pass: one of each of several sequences.
struct Batch {
    rows: usize,
    /// The slots from the first to the last that takes part.
    first_slot: usize,
    slots: usize,
    /// The positions that the longest of the sequences has now.
    len: usize,
    /// `(rows * kv_heads, head_dim)`: where the keys and values go among all positions of all heads and slots
    write_at: Tensor,
    /// The row of each slot, and the slot of each row, if not all slots take part.
    rows_of_slots: Option<[Tensor; 2]>,
    /// `(slots, 1, 1, len)`: added to the scores
    mask: Tensor,
}

struct PlannedSpan {
    place: Place,
    /// None: the flash-attn kernels compute it.
    tiles: Option<Vec<Tile>>,
}

struct Tile {
    rows: usize,
    /// The positions that its last row sees.
    len: usize,
    /// `(rows, len)`: added to the scores
    mask: Option<Tensor>,
}

impl Plan {
    /// Plans attention for rows in this order. The first `batched` places have one row each, and ascending
    /// slots.
    pub(super) fn new(
        places: &[Place],
        batched: usize,
        heads: Heads,
        slots: &Slots,
        device: &Device,
    ) -> Result<Self> {
        let (together, alone) = places.split_at(batched);
        let batch = match together {
            [] => None,
            places => Some(Batch::new(places, heads, slots.capacity(), device)?),
        };
        let spans = alone.iter().map(|place| PlannedSpan::new(*place, heads, slots.dtype(), device));
        Ok(Plan { heads, batch, spans: spans.collect::<Result<_>>()? })
    }

    /// Writes keys and values to the layer's slots, and attends to them.
    ///
    /// - `queries`: `(rows, query_heads, head_dim)`, divided by the root of `head_dim`
    /// - `keys`, `values`: `(rows, kv_heads, head_dim)`
    ///
    /// Returns `(rows, query_heads * head_dim)`.
    pub(super) fn run(
        &self,
        queries: &Tensor,
        [keys, values]: [&Tensor; 2],
        layer: &[Tensor; 2],
    ) -> Result<Tensor> {
        let mut parts = Vec::with_capacity(1 + self.spans.len());
        let mut row = 0;
        if let Some(batch) = &self.batch {
            let of_batch = |tensor: &Tensor| tensor.narrow(0, 0, batch.rows);
            batch.write(&of_batch(keys)?, &layer[0])?;
            batch.write(&of_batch(values)?, &layer[1])?;
            parts.push(batch.attend(&of_batch(queries)?, layer, self.heads)?);
            row = batch.rows;
        }
        for span in &self.spans {
            let of_span = |tensor: &Tensor| tensor.narrow(0, row, span.place.rows);
            span.write(&of_span(keys)?, &layer[0])?;
            span.write(&of_span(values)?, &layer[1])?;
            span.attend(&of_span(queries)?, layer, self.heads, &mut parts)?;
            row += span.place.rows;
        }
        match parts.as_slice() {
            [only] => Ok(only.clone()),
            several => Tensor::cat(several, 0),
        }
    }
}

impl Batch {
    fn new(places: &[Place], heads: Heads, capacity: usize, device: &Device) -> Result<Self> {
        let rows = places.len();
        let first_slot = places.first().map_or(0, |place| place.slot);
        let slots = places.last().map_or(0, |place| place.slot) + 1 - first_slot;
        let len = places.iter().map(|place| place.start + 1).max().unwrap_or(0);
        let write_at = places.iter().flat_map(|place| {
            let at = move |head| ((place.slot * heads.kv + head) * capacity + place.start) as u32;
            (0..heads.kv).flat_map(move |head| std::iter::repeat_n(at(head), heads.dim))
        });
        let write_at = Tensor::from_iter(write_at, device)?.reshape((rows * heads.kv, heads.dim))?;
        // A slot that takes no part sees what is in it, like the longest sequence.
        let mut mask = vec![0_f32; slots * len];
        let (mut row_of_slot, mut slot_of_row) = (vec![0_u32; slots], Vec::with_capacity(rows));
        for (row, place) in places.iter().enumerate() {
            let slot = place.slot - first_slot;
            mask[slot * len + place.start + 1..(slot + 1) * len].fill(f32::NEG_INFINITY);
            row_of_slot[slot] = row as u32;
            slot_of_row.push(slot as u32);
        }
        let rows_of_slots = match rows == slots {
            true => None,
            false => Some([Tensor::new(row_of_slot, device)?, Tensor::new(slot_of_row, device)?]),
        };
        let mask = Tensor::from_vec(mask, (slots, 1, 1, len), device)?;
        Ok(Batch { rows, first_slot, slots, len, write_at, rows_of_slots, mask })
    }

    /// `rows`: `(rows, kv_heads, head_dim)`
    fn write(&self, rows: &Tensor, slots: &Tensor) -> Result<()> {
        let source = rows.reshape(self.write_at.shape())?;
        slots.flatten_to(D::Minus2)?.scatter_set(&self.write_at, &source, 0)
    }

    fn attend(&self, queries: &Tensor, layer: &[Tensor; 2], heads: Heads) -> Result<Tensor> {
        let [keys, values] = layer;
        let seen = |slots: &Tensor| slots.narrow(0, self.first_slot, self.slots)?.narrow(2, 0, self.len);
        if self.slots == 1 && queries.device().is_metal() && SDPA_HEAD_DIMS.contains(&heads.dim) {
            let queries = queries.contiguous()?.reshape((1, heads.query, 1, heads.dim))?;
            let attended = sdpa(&queries, &seen(keys)?, &seen(values)?, None, false, 1.0, 1.0)?;
            return attended.reshape((1, heads.query * heads.dim));
        }
        let queries = match &self.rows_of_slots {
            Some([row_of_slot, _]) => queries.contiguous()?.index_select(row_of_slot, 0)?,
            None => queries.contiguous()?,
        };
        let queries = queries.reshape((self.slots, heads.kv, heads.query / heads.kv, heads.dim))?;
        let scores = queries.matmul(&seen(keys)?.transpose(2, 3)?)?.to_dtype(DType::F32)?;
        let weights = softmax_last_dim(&scores.broadcast_add(&self.mask)?)?.to_dtype(queries.dtype())?;
        let attended = weights.matmul(&seen(values)?)?.reshape((self.slots, heads.query * heads.dim))?;
        match &self.rows_of_slots {
            Some([_, slot_of_row]) => attended.index_select(slot_of_row, 0),
            None => Ok(attended),
        }
    }
}

impl PlannedSpan {
    fn new(place: Place, heads: Heads, dtype: DType, device: &Device) -> Result<Self> {
        // What the kernels are made for.
        let fits = dtype != DType::F32 && heads.dim.is_multiple_of(8) && heads.dim <= 256;
        if fits && has_flash_attention(device) {
            return Ok(PlannedSpan { place, tiles: None });
        }
        let end = place.start + place.rows;
        let most = (MAX_SCORES / heads.query / end).clamp(1, TILE_ROWS);
        let mut tiles = Vec::with_capacity(place.rows.div_ceil(most));
        let mut first = place.start;
        while first < end {
            let rows = most.min(end - first);
            let len = first + rows;
            let mask = match rows {
                1 => None,
                rows => {
                    let hidden = |row, position| if position > first + row { f32::NEG_INFINITY } else { 0.0 };
                    let mask = (0..rows).flat_map(|row| (0..len).map(move |at| hidden(row, at)));
                    Some(Tensor::from_vec(mask.collect::<Vec<_>>(), (rows, len), device)?)
                }
            };
            tiles.push(Tile { rows, len, mask });
            first = len;
        }
        Ok(PlannedSpan { place, tiles: Some(tiles) })
    }

    /// `rows`: `(rows, kv_heads, head_dim)`
    fn write(&self, rows: &Tensor, slots: &Tensor) -> Result<()> {
        let Place { slot, start, .. } = self.place;
        let source = rows.transpose(0, 1)?.contiguous()?.unsqueeze(0)?;
        slots.narrow(0, slot, 1)?.slice_set(&source, 2, start)
    }

    fn attend(
        &self,
        queries: &Tensor,
        layer: &[Tensor; 2],
        heads: Heads,
        parts: &mut Vec<Tensor>,
    ) -> Result<()> {
        let Some(tiles) = &self.tiles else {
            let Place { slot, start, rows } = self.place;
            let seen =
                |slots: &Tensor| slots.get(slot)?.narrow(1, 0, start + rows)?.transpose(0, 1)?.unsqueeze(0);
            let queries = queries.contiguous()?.unsqueeze(0)?;
            let attended = flash_attention(&queries, &seen(&layer[0])?, &seen(&layer[1])?)?;
            parts.push(attended.reshape((rows, heads.query * heads.dim))?);
            return Ok(());
        };
        let group = heads.query / heads.kv;
        let mut row = 0;
        for tile in tiles {
            let seen = |slots: &Tensor| slots.get(self.place.slot)?.narrow(1, 0, tile.len);
            // The rows of all heads that share keys and values are the rows of one product.
            let queries = queries.narrow(0, row, tile.rows)?.transpose(0, 1)?.contiguous()?;
            let queries = queries.reshape((heads.kv, group * tile.rows, heads.dim))?;
            let mut scores = queries.matmul(&seen(&layer[0])?.transpose(1, 2)?)?.to_dtype(DType::F32)?;
            if let Some(mask) = &tile.mask {
                let by_head = scores.reshape((heads.query, tile.rows, tile.len))?;
                scores = by_head.broadcast_add(mask)?.reshape(scores.shape())?;
            }
            let weights = softmax_last_dim(&scores)?.to_dtype(queries.dtype())?;
            let attended = weights.matmul(&seen(&layer[1])?)?;
            let attended = attended.reshape((heads.query, tile.rows, heads.dim))?.transpose(0, 1)?;
            parts.push(attended.reshape((tile.rows, heads.query * heads.dim))?);
            row += tile.rows;
        }
        Ok(())
    }
}
