//! [`Lanes`] in four AVX2 registers.
//!
//! SAFETY of every block here: [`Avx2Lanes`] is used only inside this folder's `#[target_feature]` functions,
//! which dispatch.rs reaches only after it has seen AVX2, FMA and F16C on this CPU; every load and store goes
//! through a reference to an array of exactly its width.

use crate::lanes::{LANES, Lanes};
use crate::prefetch::StreamPrefetch;
use crate::x86_64::vectors::{bytes, nibbles, sum_of_8};
use std::arch::asm;
use std::arch::x86_64::*;

/// 4 x 8 numbers.
#[derive(Clone, Copy)]
pub(crate) struct Avx2Lanes(pub(super) [__m256; 4]);

impl Avx2Lanes {
    #[inline(always)]
    pub(super) fn zip(self, other: Self, operation: impl Fn(__m256, __m256) -> __m256) -> Self {
        let ([a, b, c, d], [e, f, g, h]) = (self.0, other.0);
        Avx2Lanes([operation(a, e), operation(b, f), operation(c, g), operation(d, h)])
    }
}

/// Floats from 32 small integers, 16 in each half.
#[inline(always)]
fn from_bytes<const SIGNED: bool>(low: __m128i, high: __m128i) -> Avx2Lanes {
    // SAFETY: AVX2 is enabled; see the top of this file.
    unsafe {
        let convert =
            |x| _mm256_cvtepi32_ps(if SIGNED { _mm256_cvtepi8_epi32(x) } else { _mm256_cvtepu8_epi32(x) });
        let upper = |x| _mm_srli_si128::<8>(x);
        Avx2Lanes([convert(low), convert(upper(low)), convert(high), convert(upper(high))])
    }
}

/// The f16 at byte `at`, in every lane.
#[inline(always)]
fn half_at(block: &[u8], at: usize) -> Avx2Lanes {
    let bits = i16::from_le_bytes([block[at], block[at + 1]]);
    // SAFETY: F16C is enabled; see the top of this file.
    Avx2Lanes([unsafe { _mm256_cvtph_ps(_mm_set1_epi16(bits)) }; 4])
}

impl Lanes for Avx2Lanes {
    const ROW_PRODUCT_SUMS: usize = 3;

    #[inline(always)]
    fn splat(value: f32) -> Self {
        // SAFETY: AVX2 is enabled; see the top of this file.
        unsafe { Avx2Lanes([_mm256_set1_ps(value); 4]) }
    }

    #[inline(always)]
    fn load(values: &[f32; LANES]) -> Self {
        // SAFETY: AVX2 is enabled; the reference covers the 32 numbers read.
        unsafe {
            let at = values.as_ptr();
            Avx2Lanes([
                _mm256_loadu_ps(at),
                _mm256_loadu_ps(at.add(8)),
                _mm256_loadu_ps(at.add(16)),
                _mm256_loadu_ps(at.add(24)),
            ])
        }
    }

    #[inline(always)]
    fn store(self, out: &mut [f32; LANES]) {
        // SAFETY: AVX2 is enabled; the reference covers the 32 numbers written.
        unsafe {
            let at = out.as_mut_ptr();
            _mm256_storeu_ps(at, self.0[0]);
            _mm256_storeu_ps(at.add(8), self.0[1]);
            _mm256_storeu_ps(at.add(16), self.0[2]);
            _mm256_storeu_ps(at.add(24), self.0[3]);
        }
    }

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        // SAFETY: AVX2 is enabled; see the top of this file.
        self.zip(other, |a, b| unsafe { _mm256_add_ps(a, b) })
    }

    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        // SAFETY: AVX2 is enabled; see the top of this file.
        self.zip(other, |a, b| unsafe { _mm256_mul_ps(a, b) })
    }

    #[inline(always)]
    fn mul_add(self, factor: Self, addend: Self) -> Self {
        let ([a, b, c, d], [e, f, g, h], [i, j, k, l]) = (self.0, factor.0, addend.0);
        // SAFETY: FMA is enabled; see the top of this file.
        unsafe {
            Avx2Lanes([
                _mm256_fmadd_ps(a, e, i),
                _mm256_fmadd_ps(b, f, j),
                _mm256_fmadd_ps(c, g, k),
                _mm256_fmadd_ps(d, h, l),
            ])
        }
    }

    #[inline(always)]
    fn max(self, other: Self) -> Self {
        // The instruction returns its second operand if either is NaN. SAFETY: AVX2 is enabled; see the top
        // of this file.
        self.zip(other, |a, b| unsafe { _mm256_max_ps(b, a) })
    }

    #[inline(always)]
    fn two_to(self) -> Self {
        let mut powers = self;
        // Not a closure: the compiler would not inline one as long as this.
        for x in &mut powers.0 {
            // SAFETY: AVX2 is enabled; see the top of this file.
            unsafe {
                let exponent = _mm256_slli_epi32::<23>(_mm256_castps_si256(*x));
                let one = _mm256_castps_si256(_mm256_set1_ps(1.0));
                *x = _mm256_castsi256_ps(_mm256_add_epi32(exponent, one));
            }
        }
        powers
    }

    #[inline(always)]
    fn largest(self) -> f32 {
        // SAFETY: AVX2 is enabled; see the top of this file.
        unsafe {
            let low = _mm256_max_ps(self.0[0], self.0[2]);
            let high = _mm256_max_ps(self.0[1], self.0[3]);
            let eight = _mm256_max_ps(low, high);
            let four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps::<1>(two, two)))
        }
    }

    #[inline(always)]
    fn sum(self) -> f32 {
        // SAFETY: AVX2 is enabled; see the top of this file.
        unsafe {
            let low = _mm256_add_ps(self.0[0], self.0[2]);
            let high = _mm256_add_ps(self.0[1], self.0[3]);
            sum_of_8(_mm256_add_ps(low, high))
        }
    }

    #[inline(always)]
    fn stream_prefetch() -> StreamPrefetch {
        StreamPrefetch::into_l1(2048)
    }

    #[inline(always)]
    fn add_row_products(sums: &mut [Self], rows: &[u8], row_bytes: usize, start: usize, factors: &[&[f32]]) {
        // SAFETY: AVX2 and FMA are enabled; see the top of this file.
        unsafe { add_row_products(sums, rows, row_bytes, start, factors) }
    }

    #[inline(always)]
    fn f32(block: &[u8; 128]) -> Self {
        // SAFETY: AVX2 is enabled; the reference covers the 128 bytes read; loadu needs no alignment.
        unsafe {
            let at = block.as_ptr().cast::<f32>();
            Avx2Lanes([
                _mm256_loadu_ps(at),
                _mm256_loadu_ps(at.add(8)),
                _mm256_loadu_ps(at.add(16)),
                _mm256_loadu_ps(at.add(24)),
            ])
        }
    }

    #[inline(always)]
    fn f16(block: &[u8; 64]) -> Self {
        // SAFETY: F16C is enabled; 4 x 16 bytes lie inside the reference.
        unsafe {
            let part = |i: usize| _mm256_cvtph_ps(_mm_loadu_si128(block.as_ptr().add(16 * i).cast()));
            Avx2Lanes([part(0), part(1), part(2), part(3)])
        }
    }

    #[inline(always)]
    fn bf16(block: &[u8; 64]) -> Self {
        // SAFETY: AVX2 is enabled; 4 x 16 bytes lie inside the reference.
        unsafe {
            let part = |i: usize| {
                let bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(block.as_ptr().add(16 * i).cast()));
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits))
            };
            Avx2Lanes([part(0), part(1), part(2), part(3)])
        }
    }

    #[inline(always)]
    fn q8_0(block: &[u8; 34]) -> Self {
        Self::i8(block[2..].try_into().expect("32 bytes")).mul(half_at(block, 0))
    }

    #[inline(always)]
    fn q4_0(block: &[u8; 18]) -> Self {
        let (low, high) = nibbles(block[2..].try_into().expect("16 bytes"));
        from_bytes::<false>(low, high).add(Self::splat(-8.0)).mul(half_at(block, 0))
    }

    #[inline(always)]
    fn q4_1(block: &[u8; 20]) -> Self {
        let (low, high) = nibbles(block[4..].try_into().expect("16 bytes"));
        from_bytes::<false>(low, high).mul(half_at(block, 0)).add(half_at(block, 2))
    }

    #[inline(always)]
    fn i8(numbers: &[u8; 32]) -> Self {
        let (low, high) = bytes(numbers);
        from_bytes::<true>(low, high)
    }
}

/// [`Lanes::add_row_products`], apart from it, because assembly with these registers needs a function that
/// enables them. It is assembly because three sums and their factors leave one register: the compiler loads
/// all vectors of a row before it multiplies them, and keeps sums in memory.
#[target_feature(enable = "avx2,fma")]
#[inline]
fn add_row_products(sums: &mut [Avx2Lanes], rows: &[u8], row_bytes: usize, start: usize, factors: &[&[f32]]) {
    let [Avx2Lanes(a), Avx2Lanes(b), Avx2Lanes(c)] = sums else { panic!("there are 3 sums") };
    let &[x, y, z] = factors else { panic!("each sum has factors") };
    let count = x.len();
    assert!(y.len() == count && z.len() == count, "as many factors for each sum");
    if count == 0 {
        return;
    }
    let end = (count - 1).checked_mul(row_bytes).and_then(|last| last.checked_add(start + 4 * LANES));
    assert!(end.is_some_and(|end| end <= rows.len()), "a row for each factor");
    // SAFETY: the assertions above cover all that is read.
    unsafe {
        asm!(
            "2:",
            "vbroadcastss {x}, [{xs} + 4 * {k}]",
            "vbroadcastss {y}, [{ys} + 4 * {k}]",
            "vbroadcastss {z}, [{zs} + 4 * {k}]",
            "vmovups {v}, [{row}]",
            "vfmadd231ps {a0}, {v}, {x}",
            "vfmadd231ps {b0}, {v}, {y}",
            "vfmadd231ps {c0}, {v}, {z}",
            "vmovups {v}, [{row} + 32]",
            "vfmadd231ps {a1}, {v}, {x}",
            "vfmadd231ps {b1}, {v}, {y}",
            "vfmadd231ps {c1}, {v}, {z}",
            "vmovups {v}, [{row} + 64]",
            "vfmadd231ps {a2}, {v}, {x}",
            "vfmadd231ps {b2}, {v}, {y}",
            "vfmadd231ps {c2}, {v}, {z}",
            "vmovups {v}, [{row} + 96]",
            "vfmadd231ps {a3}, {v}, {x}",
            "vfmadd231ps {b3}, {v}, {y}",
            "vfmadd231ps {c3}, {v}, {z}",
            "add {row}, {row_bytes}",
            "inc {k}",
            "jnz 2b",
            xs = in(reg) x.as_ptr_range().end,
            ys = in(reg) y.as_ptr_range().end,
            zs = in(reg) z.as_ptr_range().end,
            k = inout(reg) -(count as isize) => _,
            row = inout(reg) rows.as_ptr().add(start) => _,
            row_bytes = in(reg) row_bytes,
            a0 = inout(ymm_reg) a[0],
            a1 = inout(ymm_reg) a[1],
            a2 = inout(ymm_reg) a[2],
            a3 = inout(ymm_reg) a[3],
            b0 = inout(ymm_reg) b[0],
            b1 = inout(ymm_reg) b[1],
            b2 = inout(ymm_reg) b[2],
            b3 = inout(ymm_reg) b[3],
            c0 = inout(ymm_reg) c[0],
            c1 = inout(ymm_reg) c[1],
            c2 = inout(ymm_reg) c[2],
            c3 = inout(ymm_reg) c[3],
            x = out(ymm_reg) _,
            y = out(ymm_reg) _,
            z = out(ymm_reg) _,
            v = out(ymm_reg) _,
            options(readonly, nostack),
        );
    }
}
