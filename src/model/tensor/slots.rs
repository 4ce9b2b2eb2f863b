//! The KV cache: a slot for each sequence, in two tensors per layer, for keys and for values:
//! `(slots, kv_heads, capacity, head_dim)`.
//!
//! Keys and values are written in place, and attention reads them where they are: it narrows a tensor to some
//! slots and positions, without a copy. Slots and capacity double when they do not suffice, and only then is
//! anything copied. Tensors of one shape for all sequences let a single matrix product serve all of them.

use super::on_device;
use crate::error::{Error, Result};
use crate::model::SeqId;
use candle_core::{DType, Device, Tensor};
use std::collections::HashMap;

/// The fewest positions of a slot.
const MIN_CAPACITY: usize = 64;

/// The size of a KV cache.
#[derive(Clone, Copy, Debug)]
pub(super) struct SlotShape {
    pub(super) layers: usize,
    pub(super) kv_heads: usize,
    pub(super) head_dim: usize,
    pub(super) dtype: DType,
    /// The most sequences.
    pub(super) max_slots: usize,
    /// The most positions of a sequence.
    pub(super) max_capacity: usize,
}

/// The keys and values of all sequences.
pub(super) struct Slots {
    shape: SlotShape,
    device: Device,
    /// Keys and values, layer by layer.
    layers: Vec<[Tensor; 2]>,
    capacity: usize,
    /// Whose each slot is.
    owners: Vec<Option<SeqId>>,
    /// Whether a slot has had an owner before.
    written: Vec<bool>,
    places: HashMap<SeqId, usize>,
}

impl Slots {
    /// An empty cache. Allocates nothing yet.
    pub(super) fn new(shape: SlotShape, device: &Device) -> Self {
        Slots {
            shape,
            device: device.clone(),
            layers: Vec::new(),
            capacity: 0,
            owners: Vec::new(),
            written: Vec::new(),
            places: HashMap::new(),
        }
    }

    /// The slot of a sequence that has one.
    pub(super) fn place(&self, seq: SeqId) -> usize {
        self.places[&seq]
    }

    /// The keys and the values of a layer.
    pub(super) fn layer(&self, layer: usize) -> &[Tensor; 2] {
        &self.layers[layer]
    }

    /// The type of keys and values.
    pub(super) fn dtype(&self) -> DType {
        self.shape.dtype
    }

    /// The number of positions in a slot.
    pub(super) fn capacity(&self) -> usize {
        self.capacity
    }

    /// Gives each sequence a slot with room for so many positions.
    ///
    /// # Errors
    /// [`Error::Generation`] if there may be no more slots or positions; [`Error::Device`] if the device has
    /// no memory.
    pub(super) fn reserve(&mut self, ends: &[(SeqId, usize)]) -> Result<()> {
        let positions = ends.iter().map(|(_, end)| *end).max().unwrap_or(0);
        let new = ends.iter().filter(|(seq, _)| !self.places.contains_key(seq)).count();
        let slots = self.places.len() + new;
        let SlotShape { max_slots, max_capacity, .. } = self.shape;
        if slots > max_slots || positions > max_capacity {
            let reason = format!(
                "no room for {slots} sequences of up to {positions} positions: the KV cache holds \
                 {max_slots} of up to {max_capacity}"
            );
            return Err(Error::Generation { reason });
        }
        if slots > self.owners.len() || positions > self.capacity {
            self.grow(
                doubled(slots, self.owners.len(), max_slots),
                doubled(positions.max(MIN_CAPACITY), self.capacity, max_capacity),
            )?;
        }
        for (seq, _) in ends {
            if !self.places.contains_key(seq) {
                self.take(*seq)?;
            }
        }
        Ok(())
    }

    /// Releases a sequence's slot.
    pub(super) fn free(&mut self, seq: SeqId) {
        if let Some(slot) = self.places.remove(&seq) {
            self.owners[slot] = None;
        }
    }

    fn take(&mut self, seq: SeqId) -> Result<()> {
        let slot = self.owners.iter().position(Option::is_none).expect("there are enough slots");
        if self.written[slot] {
            // Attention gives positions beyond a sequence's end the weight 0. That must not meet an infinity
            // of an earlier sequence.
            self.clear(slot).map_err(on_device(&self.device, "keys and values".into()))?;
        }
        (self.owners[slot], self.written[slot]) = (Some(seq), true);
        self.places.insert(seq, slot);
        Ok(())
    }

    fn clear(&self, slot: usize) -> candle_core::Result<()> {
        let SlotShape { kv_heads, head_dim, dtype, .. } = self.shape;
        let zeros = Tensor::zeros((1, kv_heads, self.capacity, head_dim), dtype, &self.device)?;
        self.layers.iter().flatten().try_for_each(|tensor| tensor.slice_set(&zeros, 0, slot))
    }

    /// Moves keys and values to larger tensors, one after the other.
    fn grow(&mut self, slots: usize, capacity: usize) -> Result<()> {
        let SlotShape { layers, kv_heads, head_dim, dtype, .. } = self.shape;
        let elements = [2, layers, slots, kv_heads, capacity, head_dim];
        let bytes = elements.iter().fold(dtype.size_in_bytes(), |bytes, n| bytes.saturating_mul(*n));
        let what = format!("keys and values of {slots} sequences of {capacity} positions: {bytes} bytes");
        let failed = on_device(&self.device, what);
        let old_slots = self.owners.len();
        let old_rows = (old_slots * kv_heads, self.capacity, head_dim);
        let larger = |old: Option<&Tensor>| -> candle_core::Result<Tensor> {
            let new = Tensor::zeros((slots, kv_heads, capacity, head_dim), dtype, &self.device)?;
            if let Some(old) = old {
                let rows =
                    new.narrow(0, 0, old_slots)?.reshape((old_slots * kv_heads, capacity, head_dim))?;
                rows.slice_set(&old.reshape(old_rows)?, 1, 0)?;
            }
            Ok(new)
        };
        let grown = (0..layers).map(|layer| {
            let old = self.layers.get(layer);
            Ok([larger(old.map(|[keys, _]| keys))?, larger(old.map(|[_, values]| values))?])
        });
        self.layers = grown.collect::<candle_core::Result<_>>().map_err(failed)?;
        self.capacity = capacity;
        self.owners.resize(slots, None);
        self.written.resize(slots, false);
        Ok(())
    }
}

/// At least `wanted`; if that is more than `present`, a power of two up to `limit`.
fn doubled(wanted: usize, present: usize, limit: usize) -> usize {
    if wanted <= present { present } else { wanted.next_power_of_two().min(limit).max(wanted.min(limit)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: SlotShape =
        SlotShape { layers: 2, kv_heads: 2, head_dim: 4, dtype: DType::F32, max_slots: 3, max_capacity: 200 };

    fn write(slots: &Slots, seq: SeqId, number: f32) {
        for tensor in slots.layers.iter().flatten() {
            let own = tensor.narrow(0, slots.place(seq), 1).unwrap();
            let filled = own.ones_like().unwrap().affine(f64::from(number), 0.0).unwrap();
            tensor.slice_set(&filled, 0, slots.place(seq)).unwrap();
        }
    }

    /// The numbers at the first and at the last position of a sequence's slot.
    fn read(slots: &Slots, seq: SeqId) -> Vec<(f32, f32)> {
        let ends = |tensor: &Tensor| {
            let own = tensor.get(slots.place(seq)).unwrap().get(1).unwrap().to_vec2::<f32>().unwrap();
            (own[0][3], own[own.len() - 1][3])
        };
        slots.layers.iter().flatten().map(ends).collect()
    }

    #[test]
    fn growing_keeps_what_is_written_and_doubles() {
        let mut slots = Slots::new(SHAPE, &Device::Cpu);
        slots.reserve(&[(SeqId(1), 5)]).unwrap();
        assert_eq!((slots.owners.len(), slots.capacity), (1, 64));
        write(&slots, SeqId(1), 3.0);
        let before: Vec<_> = slots.layers.iter().flatten().map(Tensor::id).collect();
        for end in 6..=64 {
            slots.reserve(&[(SeqId(1), end)]).unwrap();
        }
        let after: Vec<_> = slots.layers.iter().flatten().map(Tensor::id).collect();
        assert_eq!(after, before, "tokens that fit allocate nothing");
        slots.reserve(&[(SeqId(2), 65)]).unwrap();
        assert_eq!((slots.owners.len(), slots.capacity), (2, 128));
        assert_eq!(read(&slots, SeqId(1)), [(3.0, 0.0); 4]);
        assert_eq!(read(&slots, SeqId(2)), [(0.0, 0.0); 4]);
        slots.reserve(&[(SeqId(3), 200)]).unwrap();
        assert_eq!((slots.owners.len(), slots.capacity), (3, 200), "up to the limits");
        assert_eq!(read(&slots, SeqId(1)), [(3.0, 0.0); 4]);
    }

    #[test]
    fn a_slot_is_cleared_for_its_next_owner() {
        let mut slots = Slots::new(SHAPE, &Device::Cpu);
        slots.reserve(&[(SeqId(1), 5), (SeqId(2), 5)]).unwrap();
        write(&slots, SeqId(1), f32::NAN);
        write(&slots, SeqId(2), 2.0);
        slots.free(SeqId(1));
        slots.free(SeqId(7));
        slots.reserve(&[(SeqId(3), 5)]).unwrap();
        assert_eq!(slots.place(SeqId(3)), 0);
        assert_eq!(read(&slots, SeqId(3)), [(0.0, 0.0); 4]);
        assert_eq!(read(&slots, SeqId(2)), [(2.0, 2.0); 4]);
    }

    #[test]
    fn the_limits_are_errors() {
        let mut slots = Slots::new(SHAPE, &Device::Cpu);
        assert!(matches!(slots.reserve(&[(SeqId(1), 201)]), Err(Error::Generation { .. })));
        let four: Vec<_> = (1..=4).map(|n| (SeqId(n), 1)).collect();
        assert!(matches!(slots.reserve(&four), Err(Error::Generation { .. })));
        slots.reserve(&four[..3]).unwrap();
        assert!(slots.reserve(&four).is_err());
        slots.free(SeqId(2));
        slots.reserve(&[(SeqId(9), 1)]).unwrap();
    }
}
