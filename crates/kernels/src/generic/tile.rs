//! Reads packed tiles into the registers of an ISA.

use crate::packable::Packable;
use crate::prefetch::StreamPrefetch;
use crate::rows16::PackedRows16;
use crate::tile::{CODES, Piece, SubScales, TILE_ROWS, bytes_at};
use std::marker::PhantomData;

/// A mask of `count` bits from bit `place` on.
const fn mask(count: usize, place: usize) -> u8 {
    (((1_u32 << count) - 1) << place) as u8
}

/// A tile of packed weights.
pub(crate) struct Tile<'a, P> {
    /// The header of the tile's block.
    header: &'a [u8],
    bytes: &'a [u8],
    weights: PhantomData<P>,
}

impl<P> Clone for Tile<'_, P> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<P> Copy for Tile<'_, P> {}

impl<'a, P: Packable> Tile<'a, P> {
    /// Tile `index` of a strip.
    #[inline(always)]
    pub(crate) fn of_strip(strip: &'a [u8], index: usize) -> Self {
        let block_tiles = const { P::LAYOUT.block_tiles };
        let header_bytes = const { P::LAYOUT.header_bytes() };
        let tile_bytes = const { P::LAYOUT.tile_bytes() };
        // Wrapping, although nothing overflows: this runs for every 32 columns.
        let block = (index / block_tiles).wrapping_mul(const { P::LAYOUT.block_bytes() });
        // Instead of four comparisons for the slices: few instructions fit into a cycle on Arm.
        if cfg!(target_arch = "aarch64") {
            let last =
                strip.len().checked_sub(const { P::LAYOUT.block_bytes() }).expect("a strip has blocks");
            assert!(block <= last, "the strip has the tile");
        }
        let header = &strip[block..][..header_bytes];
        let tile = block.wrapping_add(header_bytes).wrapping_add(index % block_tiles * tile_bytes);
        let bytes = &strip[tile..][..tile_bytes];
        Tile { header, bytes, weights: PhantomData }
    }

    /// Prefetches what follows the tile in the stream of weights.
    #[inline(always)]
    pub(crate) fn prefetch_ahead(self, prefetch: StreamPrefetch) {
        prefetch.after(self.bytes);
    }

    /// The stored numbers of group `GROUP`, to be multiplied with `M` rows.
    #[inline(always)]
    pub(crate) fn group<R: PackedRows16, const GROUP: usize, const M: usize>(self) -> R::Bytes {
        let layout = const { P::LAYOUT };
        if layout.is_paired() {
            let (unit, place) = const { P::LAYOUT.pairs(GROUP) };
            return R::pairs::<M>(bytes_at(self.bytes, unit), place);
        }
        let first = const { P::LAYOUT.piece(GROUP, 0) };
        let mut bytes =
            R::bytes::<M>(bytes_at(self.bytes, const { P::LAYOUT.unit(P::LAYOUT.piece(GROUP, 0).unit) }));
        if layout.bits < 8 {
            bytes = R::bits(bytes, first.from, const { mask(P::LAYOUT.piece(GROUP, 0).count, 0) });
        }
        bytes = self.with_piece::<R, GROUP, 1, M>(bytes);
        bytes = self.with_piece::<R, GROUP, 2, M>(bytes);
        if layout.is_coded {
            bytes = R::lookup(bytes, &CODES);
        }
        bytes
    }

    /// `bytes`, with the bits of a piece, if the group has that many.
    #[inline(always)]
    fn with_piece<R: PackedRows16, const GROUP: usize, const PIECE: usize, const M: usize>(
        self,
        bytes: R::Bytes,
    ) -> R::Bytes {
        let Piece { unit, from, to, count } = const { P::LAYOUT.piece(GROUP, PIECE) };
        if count == 0 {
            return bytes;
        }
        let plane = R::bytes::<M>(bytes_at(self.bytes, P::LAYOUT.unit(unit)));
        R::with_bits(bytes, plane, from, to, mask(count, to))
    }

    /// Like [`Tile::group`], with rows joined. Only for types with pairs of rows.
    #[inline(always)]
    pub(crate) fn joined<R: PackedRows16, const GROUP: usize, const M: usize>(self) -> R::Bytes {
        let (unit, place) = const { P::LAYOUT.pairs(GROUP) };
        R::joined::<M>(bytes_at(self.bytes, unit), place)
    }

    /// The scales of the tile, or of half 0 or 1 if there are two for each row.
    #[inline(always)]
    pub(crate) fn scales<R: PackedRows16>(self, half: usize) -> R::Floats {
        let d = R::halves(bytes_at(self.header, 0));
        let at = TILE_ROWS * half;
        match const { P::LAYOUT }.sub_scales {
            SubScales::None => d,
            SubScales::Unsigned => R::mul(d, R::unsigned(bytes_at(self.bytes, at))),
            SubScales::Signed => R::mul(d, R::signed(bytes_at(self.bytes, at))),
            SubScales::Nibbles => {
                let mut scales = *bytes_at::<TILE_ROWS>(self.bytes, at);
                for scale in &mut scales {
                    *scale &= 15;
                }
                R::mul(d, R::unsigned(&scales))
            }
        }
    }

    /// The minimums, in the same way. Only for types that have some.
    #[inline(always)]
    pub(crate) fn mins<R: PackedRows16>(self, half: usize) -> R::Floats {
        let layout = const { P::LAYOUT };
        let m = R::halves(bytes_at(self.header, 2 * TILE_ROWS));
        match layout.sub_scales {
            SubScales::None | SubScales::Signed => m,
            SubScales::Unsigned => R::mul(
                m,
                R::unsigned(bytes_at(self.bytes, const { P::LAYOUT.sub_mins() } + TILE_ROWS * half)),
            ),
            SubScales::Nibbles => {
                let mut mins = *bytes_at::<TILE_ROWS>(self.bytes, TILE_ROWS * half);
                for min in &mut mins {
                    *min >>= 4;
                }
                R::mul(m, R::unsigned(&mins))
            }
        }
    }
}
