//! The AMX tile registers. `TMM0..TMM3` hold sums, `TMM4` and `TMM5` rows of x (or a), `TMM6` and `TMM7`
//! weights (or b).
//!
//! Stable Rust has no intrinsics for them, and the compiler does not know what an AMX tile holds. So
//! everything from loading to storing AMX tiles is one block of assembly. Only their configuration stays from
//! one block to the next.

use std::arch::asm;
#[cfg(target_os = "linux")]
use std::arch::x86_64::{__cpuid_count, __get_cpuid_max};

/// Rows of an AMX tile.
pub(super) const AMX_TILE_ROWS: usize = 16;
/// 32-bit words of an AMX tile row.
pub(super) const AMX_TILE_WORDS: usize = 16;
/// Words of an AMX tile.
pub(super) const AMX_TILE_LEN: usize = AMX_TILE_ROWS * AMX_TILE_WORDS;

/// A row of an AMX tile. For weights, it has one word of each of 16 weight rows.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct AmxTileRow(pub(super) [u32; AMX_TILE_WORDS]);

impl AmxTileRow {
    pub(super) const ZERO: AmxTileRow = AmxTileRow([0; AMX_TILE_WORDS]);
}

/// Rows and columns of the microkernel's outputs: two AMX tiles each.
pub(super) const SQUARE_SIDE: usize = 2 * AMX_TILE_ROWS;

/// The sums of 32 rows of x and 32 rows of weights.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct SquareSums(pub(super) [[f32; SQUARE_SIDE]; SQUARE_SIDE]);

impl SquareSums {
    pub(super) const ZERO: SquareSums = SquareSums([[0.0; SQUARE_SIDE]; SQUARE_SIDE]);
}

/// Columns of [`WideSums`]: four AMX tiles side by side.
pub(super) const WIDE_COLS: usize = 4 * AMX_TILE_WORDS;
/// The bf16 terms of each number in [`AmxTiles::multiply_bf16_pairs`].
pub(super) const TERMS: usize = 2;

/// The sums of 16 rows and 64 columns.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct WideSums(pub(super) [[f32; WIDE_COLS]; AMX_TILE_ROWS]);

impl WideSums {
    pub(super) const ZERO: WideSums = WideSums([[0.0; WIDE_COLS]; AMX_TILE_ROWS]);
}

/// Whether this CPU has AMX tiles of bf16 and bytes, and the system lets this process use them.
pub(crate) fn is_available() -> bool {
    #[cfg(target_os = "linux")]
    {
        use std::sync::OnceLock;
        static AVAILABLE: OnceLock<bool> = OnceLock::new();
        *AVAILABLE.get_or_init(|| cpu_has_amx() && request_permission())
    }
    #[cfg(not(target_os = "linux"))]
    false
}

/// Whether CPUID reports AMX-TILE, AMX-BF16 and AMX-INT8.
#[cfg(target_os = "linux")]
#[allow(unused_unsafe)] // asking is safe in later versions of Rust
fn cpu_has_amx() -> bool {
    const BF16: u32 = 1 << 22;
    const TILE: u32 = 1 << 24;
    const INT8: u32 = 1 << 25;
    let all = BF16 | TILE | INT8;
    // SAFETY: every x86-64 CPU has the instruction, and leaf 7 is read only if it exists.
    unsafe { __get_cpuid_max(0).0 >= 7 && __cpuid_count(7, 0).edx & all == all }
}

/// Asks Linux for permission. The registers take 8 KiB, which Linux saves only for processes that have asked.
/// The permission applies to all threads, and to children after a fork.
///
/// Source: Linux, Documentation/arch/x86/xstate.rst.
#[cfg(target_os = "linux")]
fn request_permission() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    // SAFETY: this call takes two numbers and touches no memory of the process.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

/// The operand of LDTILECFG: the shapes of the AMX tiles.
#[repr(C, align(64))]
struct TileConfig {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// Eight AMX tiles of the largest size.
static CONFIG: TileConfig = {
    let mut config =
        TileConfig { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
    let mut tile = 0;
    while tile < 8 {
        config.row_bytes[tile] = (4 * AMX_TILE_WORDS) as u16;
        config.rows[tile] = AMX_TILE_ROWS as u8;
        tile += 1;
    }
    config
};

/// This thread's configured AMX tiles. Dropping it releases them, so that the system need not save them.
pub(super) struct AmxTiles(());

/// Starts four AMX tiles of sums at the given byte offsets from `{sums}`: loads them if `{accumulates}`, else
/// sets zeros.
macro_rules! begin_sums {
    ($second:literal, $third:literal, $fourth:literal) => {
        concat!(
            "test {accumulates:e}, {accumulates:e}\n",
            "jz 2f\n",
            "tileloadd tmm0, [{sums} + {sums_row}]\n",
            "tileloadd tmm1, [{sums} + {sums_row} + ",
            $second,
            "]\n",
            "tileloadd tmm2, [{sums} + {sums_row} + ",
            $third,
            "]\n",
            "tileloadd tmm3, [{sums} + {sums_row} + ",
            $fourth,
            "]\n",
            "jmp 3f\n",
            "2:\n",
            "tilezero tmm0\n",
            "tilezero tmm1\n",
            "tilezero tmm2\n",
            "tilezero tmm3\n",
            "3:",
        )
    };
}

/// Stores the four AMX tiles of sums.
macro_rules! end_sums {
    ($second:literal, $third:literal, $fourth:literal) => {
        concat!(
            "tilestored [{sums} + {sums_row}], tmm0\n",
            "tilestored [{sums} + {sums_row} + ",
            $second,
            "], tmm1\n",
            "tilestored [{sums} + {sums_row} + ",
            $third,
            "], tmm2\n",
            "tilestored [{sums} + {sums_row} + ",
            $fourth,
            "], tmm3",
        )
    };
}

/// The assembly of [`AmxTiles::multiply`]. `$more` is appended to each step, after the products of the first
/// term.
macro_rules! multiply {
    ($x:ident, $weights:ident, $sums:ident, $adds:ident, $steps:ident $(, $more:literal)* $(,)?) => {
        asm!(
            begin_sums!("64", "2048", "2112"),
            "tileloadd tmm4, [{x} + {row}]",
            "tileloadd tmm6, [{first} + {row}]",
            "tileloadd tmm7, [{second} + {row}]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm5, [{x} + {row} + 1024]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            // Prefetches the sums that are probably next.
            "prefetcht0 [{next}]",
            "prefetcht0 [{next} + 64]",
            "prefetcht0 [{next} + 128]",
            "prefetcht0 [{next} + 192]",
            "prefetcht0 [{next} + 256]",
            "prefetcht0 [{next} + 320]",
            "prefetcht0 [{next} + 384]",
            "prefetcht0 [{next} + 448]",
            "add {next}, 512",
            "add {x}, 2048",
            $($more,)*
            "add {first}, 1024",
            "add {second}, 1024",
            "dec {steps}",
            "jnz 3b",
            end_sums!("64", "2048", "2112"),
            x = inout(reg) $x.as_ptr() => _,
            first = inout(reg) $weights[0].as_ptr() => _,
            second = inout(reg) $weights[1].as_ptr() => _,
            steps = inout(reg) $steps => _,
            sums = in(reg) $sums.0.as_mut_ptr(),
            next = inout(reg) $sums.0.as_mut_ptr().wrapping_add(SQUARE_SIDE) => _,
            sums_row = in(reg) 4 * SQUARE_SIDE,
            row = in(reg) 4 * AMX_TILE_WORDS,
            accumulates = in(reg) u32::from($adds),
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        )
    };
}

impl AmxTiles {
    /// # Safety
    /// [`is_available`] has returned true.
    #[inline(always)]
    pub(super) unsafe fn configure() -> Self {
        // SAFETY: the caller's promise; the 64 bytes are a valid configuration.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const CONFIG, options(nostack, readonly)) };
        AmxTiles(())
    }

    /// Multiplies 32 rows of x, each number a sum of TERMS bf16, with 32 rows of weights. Sets `sums`, or
    /// adds to them if `accumulates`.
    ///
    /// - `x`: `(steps, TERMS, 32 rows, 16 words)`
    /// - `weights`: twice `(steps, 16 words, 16 rows)`
    ///
    /// # Panics
    /// If the lengths disagree with these shapes.
    #[inline(always)]
    pub(super) fn multiply<const TERMS: usize>(
        &self,
        x: &[u32],
        weights: [&[AmxTileRow]; 2],
        sums: &mut SquareSums,
        accumulates: bool,
    ) {
        let steps = x.len() / (2 * AMX_TILE_LEN * TERMS);
        assert!(
            steps > 0 && weights.iter().all(|weights| weights.len() == steps * AMX_TILE_WORDS),
            "weights have as many steps as x"
        );
        // SAFETY: `self` proves that the AMX tiles are configured; by the assertion the memory that is read
        // exists. Labels are local.
        unsafe {
            match TERMS {
                1 => multiply!(x, weights, sums, accumulates, steps),
                2 => multiply!(
                    x,
                    weights,
                    sums,
                    accumulates,
                    steps,
                    "tileloadd tmm4, [{x} + {row}]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tileloadd tmm5, [{x} + {row} + 1024]",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "tdpbf16ps tmm2, tmm5, tmm6",
                    "tdpbf16ps tmm3, tmm5, tmm7",
                    "add {x}, 2048",
                ),
                _ => unreachable!("one or two terms"),
            }
        }
    }
}

/// One part of a step of [`AmxTiles::multiply_bf16_pairs`]: the products with one AMX tile of b.
macro_rules! pair_products {
    ($sums:literal, $high:literal, $low:literal) => {
        concat!(
            "tileloadd tmm6, [{b} + {row} + ",
            $high,
            "]\n",
            "tdpbf16ps ",
            $sums,
            ", tmm4, tmm6\n",
            "tdpbf16ps ",
            $sums,
            ", tmm5, tmm6\n",
            "tileloadd tmm7, [{b} + {row} + ",
            $low,
            "]\n",
            "tdpbf16ps ",
            $sums,
            ", tmm4, tmm7",
        )
    };
}

impl AmxTiles {
    /// Multiplies 16 rows of a with 64 columns of b, where every number is the sum of two bf16. Sets `sums`,
    /// or adds to them if `accumulates`. The product of the two smaller terms is left out; it is a 2^16th of
    /// the whole.
    ///
    /// - `a`: `(steps, 2, 16 rows)`, AMX tile rows of 32 columns
    /// - `b`: `(steps, 4, 2, 16 words)`, AMX tile rows of 16 columns
    ///
    /// # Panics
    /// If the lengths disagree with these shapes.
    #[inline(always)]
    pub(super) fn multiply_bf16_pairs(
        &self,
        a: &[AmxTileRow],
        b: &[AmxTileRow],
        sums: &mut WideSums,
        accumulates: bool,
    ) {
        let steps = a.len() / (TERMS * AMX_TILE_ROWS);
        assert!(steps > 0 && b.len() == 4 * a.len(), "a and b have the same number of steps");
        // SAFETY: `self` proves that the AMX tiles are configured; by the assertion the memory that is read
        // exists. Labels are local.
        unsafe {
            asm!(
                begin_sums!("64", "128", "192"),
                "tileloadd tmm4, [{a} + {row}]",
                "tileloadd tmm5, [{a} + {row} + 1024]",
                pair_products!("tmm0", "0", "1024"),
                pair_products!("tmm1", "2048", "3072"),
                pair_products!("tmm2", "4096", "5120"),
                pair_products!("tmm3", "6144", "7168"),
                "add {a}, 2048",
                "add {b}, 8192",
                "dec {steps}",
                "jnz 3b",
                end_sums!("64", "128", "192"),
                a = inout(reg) a.as_ptr() => _,
                b = inout(reg) b.as_ptr() => _,
                steps = inout(reg) steps => _,
                sums = in(reg) sums.0.as_mut_ptr(),
                sums_row = in(reg) 4 * WIDE_COLS,
                row = in(reg) 4 * AMX_TILE_WORDS,
                accumulates = in(reg) u32::from(accumulates),
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }
}

macro_rules! repeat {
    ($product:literal, $ones:ident, $sums:ident, $iterations:ident) => {
        asm!(
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "tileloadd tmm4, [{ones} + {row}]",
            "tileloadd tmm6, [{ones} + {row}]",
            "test {iterations}, {iterations}",
            "jz 3f",
            "2:",
            concat!($product, " tmm0, tmm4, tmm6"),
            concat!($product, " tmm1, tmm4, tmm6"),
            concat!($product, " tmm2, tmm4, tmm6"),
            concat!($product, " tmm3, tmm4, tmm6"),
            "dec {iterations}",
            "jnz 2b",
            "3:",
            "tilestored [{sums} + {row}], tmm0",
            "tilestored [{sums} + {row} + 1024], tmm1",
            "tilestored [{sums} + {row} + 2048], tmm2",
            "tilestored [{sums} + {row} + 3072], tmm3",
            ones = in(reg) $ones.as_ptr(),
            sums = in(reg) $sums.as_mut_ptr(),
            iterations = inout(reg) $iterations => _,
            row = in(reg) 4 * AMX_TILE_WORDS,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm6") _,
            options(nostack),
        )
    };
}

impl AmxTiles {
    /// Multiplies an AMX tile with itself `iterations` times into each of four AMX tiles of sums, in bytes or
    /// in bf16.
    #[inline(always)]
    pub(super) fn repeat<const BYTES: bool>(
        &self,
        ones: &[u32; AMX_TILE_LEN],
        iterations: usize,
    ) -> [u32; 4 * AMX_TILE_LEN] {
        let mut sums = [0; 4 * AMX_TILE_LEN];
        // SAFETY: `self` proves that the AMX tiles are configured; the references cover one AMX tile and
        // four.
        unsafe {
            match BYTES {
                true => repeat!("tdpbusd", ones, sums, iterations),
                false => repeat!("tdpbf16ps", ones, sums, iterations),
            }
        }
        sums
    }
}

impl Drop for AmxTiles {
    #[inline(always)]
    fn drop(&mut self) {
        // SAFETY: the AMX tiles were configured on this thread, so the instruction exists.
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
    }
}
