//! The types that can be packed: the layout of their tiles, and how ggml's blocks are read.

use crate::blocks::{iq4_xs_scale, q3_k_scale, scale_and_min};
use crate::quantized_rows::GROUPS;
use crate::tile::{SIGN, SubScales, TileLayout};

/// The stored numbers of 32 columns, four in a word, the first one in its lowest byte. The compiler's vector
/// code for words is several times as fast as that for bytes, which processors cannot shift.
pub(super) type Words = [u32; GROUPS];

/// A type that can be packed: its tiles, and how its blocks are read.
pub(super) trait Packable {
    const LAYOUT: TileLayout;
    /// Bytes of one of ggml's blocks.
    const BLOCK_BYTES: usize;
    /// Where a block has its d, and its m if there is one.
    const D: usize = 0;
    const M: usize = 2;

    /// The stored numbers of the `tile`-th 32 columns of a block.
    fn weights(block: &[u8], tile: usize) -> Words;
    /// Their sub-scale; with two scales per tile, that of half 0 or 1.
    fn sub_scale(_block: &[u8], _tile: usize, _half: usize) -> u8 {
        unreachable!("the type has no sub-scales")
    }
    /// Their sub-minimum, if it is not a part of the sub-scale's byte.
    fn sub_min(_block: &[u8], _tile: usize, _half: usize) -> u8 {
        unreachable!("the type has no sub-minimums")
    }
}

/// A layout with blocks of 32.
const fn small(has_mins: bool, bits: usize, zero_point: i32) -> TileLayout {
    let (block_tiles, sub_scales, scales) = (1, SubScales::None, 1);
    let is_coded = false;
    TileLayout { block_tiles, has_mins, sub_scales, scales, bits, zero_point, is_coded }
}

/// A layout with blocks of 256 and a scale for every 32 or 16 columns.
const fn large(sub_scales: SubScales, scales: usize, bits: usize, zero_point: i32) -> TileLayout {
    let (block_tiles, is_coded) = (8, false);
    let has_mins = !matches!(sub_scales, SubScales::Signed);
    TileLayout { block_tiles, has_mins, sub_scales, scales, bits, zero_point, is_coded }
}

/// A word with the same byte four times.
pub(super) const fn every_byte(byte: u32) -> u32 {
    byte * 0x0101_0101
}

/// `N` words of a block, from byte `at` on.
#[inline(always)]
fn words<const N: usize>(block: &[u8], at: usize) -> [u32; N] {
    let (bytes, _) = block[at..][..4 * N].as_chunks();
    std::array::from_fn(|index| u32::from_le_bytes(bytes[index]))
}

/// 4 bits of each of 32 elements of a block of 32, from byte `at` on: the low halves of 16 bytes, then the
/// high ones.
#[inline(always)]
fn nibbles(block: &[u8], at: usize) -> Words {
    let halves: [u32; GROUPS / 2] = words(block, at);
    let mut out = [0; GROUPS];
    for (index, word) in halves.into_iter().enumerate() {
        out[index] = word & every_byte(15);
        out[GROUPS / 2 + index] = word >> 4 & every_byte(15);
    }
    out
}

/// [`nibbles`], and as the fifth bits those of the word before them.
#[inline(always)]
fn five_bits(block: &[u8], at: usize) -> Words {
    let [high] = words(block, at - 4);
    let mut out = nibbles(block, at);
    for (group, out) in out.iter_mut().enumerate() {
        // The product moves each of the four bits to a byte of its own.
        let bits = high >> (4 * group) & 15;
        *out |= ((bits * 0x0020_4081) & every_byte(1)) << 4;
    }
    out
}

/// Bits of 32 elements of a block of 256: in the 32 bytes from `at` on, from bit `shift` on. They become the
/// bits of each byte from bit `place` on.
#[inline(always)]
fn bits(block: &[u8], at: usize, shift: usize, count: usize, place: usize) -> Words {
    let mut out: Words = words(block, at);
    for word in &mut out {
        *word = (*word >> shift & every_byte((1 << count) - 1)) << place;
    }
    out
}

#[inline(always)]
fn or(mut a: Words, b: Words) -> Words {
    for (a, b) in a.iter_mut().zip(b) {
        *a |= b;
    }
    a
}

#[allow(non_camel_case_types)] // ggml's spelling
pub(super) enum Q8_0 {}
impl Packable for Q8_0 {
    const LAYOUT: TileLayout = small(false, 8, 128);
    const BLOCK_BYTES: usize = 34;
    #[inline(always)]
    fn weights(block: &[u8], _tile: usize) -> Words {
        let mut out: Words = words(block, 2);
        for word in &mut out {
            *word ^= every_byte(SIGN as u32);
        }
        out
    }
}

#[allow(non_camel_case_types)]
pub(super) enum Q4_0 {}
impl Packable for Q4_0 {
    const LAYOUT: TileLayout = small(false, 4, 8);
    const BLOCK_BYTES: usize = 18;
    #[inline(always)]
    fn weights(block: &[u8], _tile: usize) -> Words {
        nibbles(block, 2)
    }
}

#[allow(non_camel_case_types)]
pub(super) enum Q4_1 {}
impl Packable for Q4_1 {
    const LAYOUT: TileLayout = small(true, 4, 0);
    const BLOCK_BYTES: usize = 20;
    #[inline(always)]
    fn weights(block: &[u8], _tile: usize) -> Words {
        nibbles(block, 4)
    }
}

#[allow(non_camel_case_types)]
pub(super) enum Q5_0 {}
impl Packable for Q5_0 {
    const LAYOUT: TileLayout = small(false, 5, 16);
    const BLOCK_BYTES: usize = 22;
    #[inline(always)]
    fn weights(block: &[u8], _tile: usize) -> Words {
        five_bits(block, 6)
    }
}

#[allow(non_camel_case_types)]
pub(super) enum Q5_1 {}
impl Packable for Q5_1 {
    const LAYOUT: TileLayout = small(true, 5, 0);
    const BLOCK_BYTES: usize = 24;
    #[inline(always)]
    fn weights(block: &[u8], _tile: usize) -> Words {
        five_bits(block, 8)
    }
}

#[allow(non_camel_case_types)]
pub(super) enum Q2_K {}
impl Packable for Q2_K {
    const LAYOUT: TileLayout = large(SubScales::Nibbles, 2, 2, 0);
    const BLOCK_BYTES: usize = 84;
    const D: usize = 80;
    const M: usize = 82;
    #[inline(always)]
    fn weights(block: &[u8], tile: usize) -> Words {
        bits(block, 16 + 32 * (tile / 4), 2 * (tile % 4), 2, 0)
    }
    fn sub_scale(block: &[u8], tile: usize, half: usize) -> u8 {
        block[2 * tile + half]
    }
}

#[allow(non_camel_case_types)]
pub(super) enum Q3_K {}
impl Packable for Q3_K {
    const LAYOUT: TileLayout = large(SubScales::Signed, 2, 3, 4);
    const BLOCK_BYTES: usize = 110;
    const D: usize = 108;
    #[inline(always)]
    fn weights(block: &[u8], tile: usize) -> Words {
        or(bits(block, 32 + 32 * (tile / 4), 2 * (tile % 4), 2, 0), bits(block, 0, tile, 1, 2))
    }
    fn sub_scale(block: &[u8], tile: usize, half: usize) -> u8 {
        q3_k_scale(&block[96..108], 2 * tile + half) as u8
    }
}

#[allow(non_camel_case_types)]
pub(super) enum Q4_K {}
impl Packable for Q4_K {
    const LAYOUT: TileLayout = large(SubScales::Unsigned, 1, 4, 0);
    const BLOCK_BYTES: usize = 144;
    #[inline(always)]
    fn weights(block: &[u8], tile: usize) -> Words {
        bits(block, 16 + 32 * (tile / 2), 4 * (tile % 2), 4, 0)
    }
    fn sub_scale(block: &[u8], tile: usize, _half: usize) -> u8 {
        scale_and_min(&block[4..16], tile).0
    }
    fn sub_min(block: &[u8], tile: usize, _half: usize) -> u8 {
        scale_and_min(&block[4..16], tile).1
    }
}

#[allow(non_camel_case_types)]
pub(super) enum Q5_K {}
impl Packable for Q5_K {
    const LAYOUT: TileLayout = large(SubScales::Unsigned, 1, 5, 0);
    const BLOCK_BYTES: usize = 176;
    #[inline(always)]
    fn weights(block: &[u8], tile: usize) -> Words {
        or(bits(block, 48 + 32 * (tile / 2), 4 * (tile % 2), 4, 0), bits(block, 16, tile, 1, 4))
    }
    fn sub_scale(block: &[u8], tile: usize, _half: usize) -> u8 {
        scale_and_min(&block[4..16], tile).0
    }
    fn sub_min(block: &[u8], tile: usize, _half: usize) -> u8 {
        scale_and_min(&block[4..16], tile).1
    }
}

#[allow(non_camel_case_types)]
pub(super) enum Q6_K {}
impl Packable for Q6_K {
    const LAYOUT: TileLayout = large(SubScales::Signed, 2, 6, 32);
    const BLOCK_BYTES: usize = 210;
    const D: usize = 208;
    #[inline(always)]
    fn weights(block: &[u8], tile: usize) -> Words {
        let (part, quarter) = (tile / 4, tile % 4);
        let low = bits(block, 64 * part + 32 * (quarter % 2), 4 * (quarter / 2), 4, 0);
        or(low, bits(block, 128 + 32 * part, 2 * quarter, 2, 4))
    }
    fn sub_scale(block: &[u8], tile: usize, half: usize) -> u8 {
        block[192 + 2 * tile + half]
    }
}

#[allow(non_camel_case_types)]
pub(super) enum IQ4_NL {}
impl Packable for IQ4_NL {
    const LAYOUT: TileLayout = TileLayout { is_coded: true, ..small(false, 4, 128) };
    const BLOCK_BYTES: usize = 18;
    #[inline(always)]
    fn weights(block: &[u8], _tile: usize) -> Words {
        nibbles(block, 2)
    }
}

#[allow(non_camel_case_types)]
pub(super) enum IQ4_XS {}
impl Packable for IQ4_XS {
    const LAYOUT: TileLayout = TileLayout { is_coded: true, ..large(SubScales::Signed, 1, 4, 128) };
    const BLOCK_BYTES: usize = 136;
    #[inline(always)]
    fn weights(block: &[u8], tile: usize) -> Words {
        nibbles(block, 8 + 16 * tile)
    }
    fn sub_scale(block: &[u8], tile: usize, _half: usize) -> u8 {
        iq4_xs_scale(block, tile) as u8
    }
}

/// Calls `$function::<Type, ...>($args)` for a type that can be packed, or evaluates `$otherwise`.
macro_rules! with_packable {
    ($dtype:expr, $function:ident::<_ $(, $generic:ident)*>($($arg:expr),* $(,)?)) => {
        $crate::packable::with_packable!(
            $dtype, $function::<_ $(, $generic)*>($($arg),*), unreachable!("the type cannot be packed")
        )
    };
    ($dtype:expr, $function:ident::<_ $(, $generic:ident)*>($($arg:expr),* $(,)?), $otherwise:expr) => {{
        use $crate::{blocks::WeightType, packable};
        match $dtype {
            WeightType::Q8_0 => $function::<packable::Q8_0 $(, $generic)*>($($arg),*),
            WeightType::Q4_0 => $function::<packable::Q4_0 $(, $generic)*>($($arg),*),
            WeightType::Q4_1 => $function::<packable::Q4_1 $(, $generic)*>($($arg),*),
            WeightType::Q5_0 => $function::<packable::Q5_0 $(, $generic)*>($($arg),*),
            WeightType::Q5_1 => $function::<packable::Q5_1 $(, $generic)*>($($arg),*),
            WeightType::Q2_K => $function::<packable::Q2_K $(, $generic)*>($($arg),*),
            WeightType::Q3_K => $function::<packable::Q3_K $(, $generic)*>($($arg),*),
            WeightType::Q4_K => $function::<packable::Q4_K $(, $generic)*>($($arg),*),
            WeightType::Q5_K => $function::<packable::Q5_K $(, $generic)*>($($arg),*),
            WeightType::Q6_K => $function::<packable::Q6_K $(, $generic)*>($($arg),*),
            WeightType::IQ4_NL => $function::<packable::IQ4_NL $(, $generic)*>($($arg),*),
            WeightType::IQ4_XS => $function::<packable::IQ4_XS $(, $generic)*>($($arg),*),
            _ => $otherwise,
        }
    }};
}
pub(super) use with_packable;
