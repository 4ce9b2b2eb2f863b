//! The layout of packed weights in memory.
//!
//! A tile is 16 rows by 32 columns. A block of tiles holds the same columns as one of ggml's blocks, of 16
//! rows: one tile, or 8 for the types with blocks of 256. The blocks of the same 16 rows follow each other
//! and form a strip. So a thread reads one increasing stream of addresses. A lane is a row, so no sum goes
//! across lanes.
//!
//! A block begins with its header: 16 d, then 16 m where the type has minimums, all f16. The m of K types
//! (ggml's dmin) have the opposite sign of ggml's, so that minimums are added in every type. A tile consists
//! of, in this order:
//!
//! - sub-scales, where the type has them: a byte for each row. With two scales per tile, 16 bytes for columns
//!   0 to 15, then 16 for columns 16 to 31
//! - sub-minimums, in the same way. Q2_K has them in the high halves of the bytes of its sub-scales
//! - the weights
//!
//! | type | block of tiles | ggml's 16 blocks | sub-scales | bits of a weight | zero point |
//! |---|---|---|---|---|---|
//! | Q8_0 | 544 | 544 | | 8 | 128 |
//! | Q4_0 | 288 | 288 | | 4 | 8 |
//! | Q4_1 | 320 | 320 | | 4 | |
//! | Q5_0 | 352 | 352 | | 5 | 16 |
//! | Q5_1 | 384 | 384 | | 5 | |
//! | Q2_K | 1344 | 1344 | 2 x 4 bits | 2 | |
//! | Q3_K | 1824 | 1760 | 2 x i8 | 3 | 4 |
//! | Q4_K | 2368 | 2304 | u8 | 4 | |
//! | Q5_K | 2880 | 2816 | u8 | 5 | |
//! | Q6_K | 3360 | 3360 | 2 x i8 | 6 | 32 |
//! | IQ4_NL | 288 | 288 | | 4, index of a value plus 128 | 128 |
//! | IQ4_XS | 2208 | 2176 | i8 | 4, index of a value plus 128 | 128 |
//!
//! The numbers are the same as in `blocks.rs`; the 6-bit scales of K types take a byte each. Rows after the
//! last one are zeros.
//!
//! Group `g` consists of elements `4g..4g + 4` of each row, which one instruction multiplies. The weights of
//! a tile are stored in units of 64 bytes, `(16 rows, 4)`. With `n` bits per weight there are `n` units. Each
//! holds `8 / n` whole groups, the first one in the lowest bits of its bytes. The bits that are left over
//! hold the last groups in pieces. So one or two instructions unpack most groups:
//!
//! | unit | 3 bits | 5 bits | 6 bits |
//! |---|---|---|---|
//! | 0 | groups 0 and 1, 2 bits of 6 | group 0, 3 bits of 5 | group 0, 2 bits of 6 |
//! | 1 | groups 2 and 3, 1 bit of 6, 1 of 7 | group 1, 2 bits of 5, 1 of 6 | group 1, 2 bits of 6 |
//! | 2 | groups 4 and 5, 2 bits of 7 | group 2, 3 bits of 6 | group 2, 2 bits of 6 |
//! | 3 | | group 3, 1 bit of 6, 2 of 7 | group 3, 2 bits of 7 |
//! | 4 | | group 4, 3 bits of 7 | group 4, 2 bits of 7 |
//! | 5 | | | group 5, 2 bits of 7 |
//!
//! On Arm, Q4_0, Q4_1 and Q4_K have pairs of rows instead (`is_paired`): a group has 32 bytes, `(8 rows, 4)`.
//! The low half of a byte of row `r` is the number of row `r`; the high half is that of row `r + 8` minus 8,
//! signed. So a byte is a signed number, `16 * (second - 8) + first`. Both rows are multiplied with the same
//! activations, so `sdot` takes the byte as it is, and the first row's sum is subtracted once per tile. Only
//! the low halves have to be unpacked.

use crate::blocks::{IQ4_VALUES, f16_at};

/// Rows of a tile.
pub(super) const TILE_ROWS: usize = 16;
/// Columns of a tile.
pub(super) const TILE_COLS: usize = 32;
/// Bytes of a number of bits or bytes for each element of a group.
const UNIT: usize = 4 * TILE_ROWS;

/// The scales of parts of a block, integers that d is multiplied with.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum SubScales {
    /// There are none.
    None,
    /// u8. The sub-minimums, if there are minimums, are u8 too.
    Unsigned,
    /// i8. There are no minimums.
    Signed,
    /// 4 bits, with the sub-minimum in the upper half of the byte.
    Nibbles,
}

/// The layout of a type's tiles.
#[derive(Clone, Copy)]
pub(super) struct TileLayout {
    /// Tiles of a block.
    pub(super) block_tiles: usize,
    /// Whether there are minimums.
    pub(super) has_mins: bool,
    pub(super) sub_scales: SubScales,
    /// Scales of a row in a tile: 1, or 2 for 16 columns each.
    pub(super) scales: usize,
    /// Bits of a weight.
    pub(super) bits: usize,
    /// The stored number minus the number that it means; 128 if weights are signed bytes (see [`SIGN`]).
    pub(super) zero_point: i32,
    /// Whether the bits are an index of [`CODES`], which are the stored numbers.
    pub(super) is_coded: bool,
}

/// Signed weights are stored as their bytes, xor'ed with this: 128 too large for the instructions of x86-64,
/// which multiply unsigned bytes with signed ones; as they are for Arm's, which multiply signed bytes.
pub(super) const SIGN: u8 = if cfg!(target_arch = "aarch64") { 0 } else { 0x80 };

/// [`IQ4_VALUES`] as they are stored.
pub(super) const CODES: [u8; 16] = {
    let mut codes = [0; 16];
    let mut index = 0;
    while index < 16 {
        codes[index] = IQ4_VALUES[index] as u8 ^ SIGN;
        index += 1;
    }
    codes
};

/// Some neighbouring bits of a group's numbers.
#[derive(Clone, Copy)]
pub(super) struct Piece {
    /// The unit that they are stored in.
    pub(super) unit: usize,
    /// The lowest one in the unit's bytes.
    pub(super) from: usize,
    /// The lowest one in the numbers.
    pub(super) to: usize,
    pub(super) count: usize,
}

/// The most pieces of a group.
const MAX_PIECES: usize = 3;

impl TileLayout {
    /// Bytes of a block's header.
    pub(super) const fn header_bytes(self) -> usize {
        2 * TILE_ROWS * if self.has_mins { 2 } else { 1 }
    }

    /// Where a tile's sub-minimums begin, if they are bytes.
    pub(super) const fn sub_mins(self) -> usize {
        match self.sub_scales {
            SubScales::None => 0,
            _ => TILE_ROWS * self.scales,
        }
    }

    /// Where a unit of a tile's weights begins.
    pub(super) const fn unit(self, unit: usize) -> usize {
        let weights = match self.sub_scales {
            SubScales::Unsigned if self.has_mins => 2 * self.sub_mins(),
            _ => self.sub_mins(),
        };
        weights + UNIT * unit
    }

    /// Piece `index` of a group; it has no bits if the group has fewer pieces.
    pub(super) const fn piece(self, group: usize, index: usize) -> Piece {
        let (whole, left) = (8 / self.bits, 8 % self.bits);
        if group < whole * self.bits {
            let (unit, from) = (group / whole, group % whole * self.bits);
            let count = if index == 0 { self.bits } else { 0 };
            return Piece { unit, from, to: 0, count };
        }
        // The bits that are left over, counted through all units.
        let first = (group - whole * self.bits) * self.bits;
        let end = first + self.bits;
        let unit = first / left + index;
        let (start, stop) = (unit * left, (unit + 1) * left);
        let start = if start < first { first } else { start };
        let stop = if stop > end { end } else { stop };
        let from = whole * self.bits + start % left;
        Piece { unit, from, to: start - first, count: stop.saturating_sub(start) }
    }

    /// The pieces of a group.
    fn pieces(self, group: usize) -> impl Iterator<Item = Piece> {
        (0..MAX_PIECES).map(move |index| self.piece(group, index)).take_while(|piece| piece.count > 0)
    }

    /// Whether a byte has numbers of two rows.
    pub(super) const fn is_paired(self) -> bool {
        cfg!(target_arch = "aarch64") && self.bits == 4 && !self.is_coded
    }

    /// Where the pairs of rows of a group are: their unit, and the group's place in it, 0 or 1.
    pub(super) const fn pairs(self, group: usize) -> (usize, usize) {
        (self.unit(group / 2), group % 2)
    }

    /// Where the pair of row `lane` is: its first byte, and the bit that the row's numbers begin at.
    pub(super) const fn pair(self, group: usize, lane: usize) -> (usize, usize) {
        let (unit, place) = self.pairs(group);
        (unit + UNIT / 2 * place + 4 * (lane % (TILE_ROWS / 2)), lane / (TILE_ROWS / 2) * 4)
    }

    /// Bytes of a tile.
    pub(super) const fn tile_bytes(self) -> usize {
        self.unit(self.bits)
    }

    /// Bytes of a block.
    pub(super) const fn block_bytes(self) -> usize {
        self.header_bytes() + self.block_tiles * self.tile_bytes()
    }

    /// Columns of a block.
    pub(super) const fn block_cols(self) -> usize {
        TILE_COLS * self.block_tiles
    }

    /// Whether the weights are signed bytes, stored as [`SIGN`] says.
    pub(super) const fn is_signed(self) -> bool {
        self.zero_point == 128
    }

    /// The largest stored number of a weight.
    pub(super) const fn largest(self) -> usize {
        (1 << self.bits) - 1
    }

    /// Where tile `index` of a strip is: its block's header, and the tile.
    pub(super) fn tile(self, strip: &[u8], index: usize) -> (&[u8], &[u8]) {
        let block = &strip[index / self.block_tiles * self.block_bytes()..][..self.block_bytes()];
        let (header, tiles) = block.split_at(self.header_bytes());
        (header, &tiles[index % self.block_tiles * self.tile_bytes()..][..self.tile_bytes()])
    }

    /// The integer that element `i` of row `lane` means, before scale and minimum are applied.
    pub(super) fn quant(self, tile: &[u8], lane: usize, i: usize) -> i32 {
        let (group, j) = (i / 4, i % 4);
        if self.is_paired() {
            let (at, shift) = self.pair(group, lane);
            let stored = tile[at + j] >> shift & 15;
            return i32::from(if shift == 0 { stored } else { stored ^ 8 }) - self.zero_point;
        }
        let mut quant = 0;
        for Piece { unit, from, to, count } in self.pieces(group) {
            quant |= (i32::from(tile[self.unit(unit) + 4 * lane + j]) >> from & ((1 << count) - 1)) << to;
        }
        if self.is_coded {
            quant = i32::from(CODES[quant as usize]);
        }
        if self.is_signed() {
            return i32::from((quant as u8 ^ SIGN) as i8);
        }
        quant - self.zero_point
    }

    /// The scale of element `i` of row `lane`.
    pub(super) fn scale(self, (header, tile): (&[u8], &[u8]), lane: usize, i: usize) -> f32 {
        let d = f16_at(header, 2 * lane);
        let at = self.sub_scale(lane, i);
        match self.sub_scales {
            SubScales::None => d,
            SubScales::Unsigned => d * f32::from(tile[at]),
            SubScales::Signed => d * f32::from(tile[at] as i8),
            SubScales::Nibbles => d * f32::from(tile[at] & 15),
        }
    }

    /// The minimum of element `i` of row `lane`, if the type has one.
    pub(super) fn min(self, (header, tile): (&[u8], &[u8]), lane: usize, i: usize) -> Option<f32> {
        if !self.has_mins {
            return None;
        }
        let m = f16_at(header, 2 * (TILE_ROWS + lane));
        let at = self.sub_scale(lane, i);
        Some(match self.sub_scales {
            SubScales::Nibbles => m * f32::from(tile[at] >> 4),
            SubScales::Unsigned => m * f32::from(tile[self.sub_mins() + at]),
            SubScales::None | SubScales::Signed => m,
        })
    }

    /// The index of the sub-scale of element `i` of row `lane`.
    fn sub_scale(self, lane: usize, i: usize) -> usize {
        TILE_ROWS * (i * self.scales / TILE_COLS) + lane
    }

    /// Dequantises row `lane` of a tile as ggml's reference does.
    #[inline(always)]
    pub(super) fn dequantize(self, parts: (&[u8], &[u8]), lane: usize, out: &mut [f32]) {
        let len = TILE_COLS / self.scales;
        for (start, out) in (0..TILE_COLS).step_by(len).zip(out.chunks_exact_mut(len)) {
            let scale = self.scale(parts, lane, start);
            let min = self.min(parts, lane, start);
            for (i, out) in out.iter_mut().enumerate() {
                let scaled = self.quant(parts.1, lane, start + i) as f32 * scale;
                *out = min.map_or(scaled, |min| scaled + min);
            }
        }
    }
}

/// The `LEN` bytes from `at` on.
#[inline(always)]
pub(super) fn bytes_at<const LEN: usize>(bytes: &[u8], at: usize) -> &[u8; LEN] {
    bytes[at..][..LEN].try_into().expect("the slice has this length")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packable::{Packable, Q3_K, Q4_K, Q5_K, Q6_K, Q8_0};

    #[test]
    fn every_bit_of_a_unit_holds_one_bit_of_one_group() {
        for layout in [Q3_K::LAYOUT, Q4_K::LAYOUT, Q5_K::LAYOUT, Q6_K::LAYOUT, Q8_0::LAYOUT] {
            let mut stored = vec![0_u32; layout.bits];
            for group in 0..TILE_COLS / 4 {
                let mut number = 0;
                for Piece { unit, from, to, count } in layout.pieces(group) {
                    let bits = (1 << count) - 1;
                    assert_eq!((number & bits << to, stored[unit] & bits << from), (0, 0), "group {group}");
                    number |= bits << to;
                    stored[unit] |= bits << from;
                }
                assert_eq!(number, (1 << layout.bits) - 1, "group {group}");
            }
            assert!(stored.iter().all(|&bits| bits == 0xff), "{stored:x?}");
        }
    }
}
