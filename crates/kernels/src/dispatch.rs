//! The choice of the ISA (instruction set). It is made once, when the process first needs a kernel.

use crate::table::KernelTable;
#[cfg(target_arch = "aarch64")]
use std::arch::is_aarch64_feature_detected;
use std::sync::OnceLock;

/// An instruction set that the kernels are compiled for; the fastest is the last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// Plain Rust, compiled for the target's baseline.
    Scalar,
    /// AVX2, FMA and F16C.
    Avx2,
    /// AVX2 and AVX-VNNI: `vpdpbusd` multiplies bytes and adds four products.
    AvxVnni,
    /// AVX-512F, BW and VNNI.
    Avx512,
    /// AVX-512 with BF16, and AMX tiles of bf16 and bytes.
    Amx,
    /// What every 64-bit Arm processor has.
    Neon,
    /// NEON with `sdot`, which multiplies bytes and adds four products.
    Dotprod,
    /// NEON with the dot product, and the instructions for matrices of bytes and for bf16.
    I8mm,
}

/// The environment variable that chooses an ISA by [`Isa::name`].
pub const ISA_VARIABLE: &str = "CANDLE_LLAMA_ISA";

impl Isa {
    /// Every ISA, the slowest first.
    pub const ALL: [Isa; 8] =
        [Isa::Scalar, Isa::Avx2, Isa::AvxVnni, Isa::Avx512, Isa::Amx, Isa::Neon, Isa::Dotprod, Isa::I8mm];

    /// The ISA's name, as `CANDLE_LLAMA_ISA` spells it.
    pub const fn name(self) -> &'static str {
        match self {
            Isa::Scalar => "scalar",
            Isa::Avx2 => "avx2",
            Isa::AvxVnni => "avxvnni",
            Isa::Avx512 => "avx512",
            Isa::Amx => "amx",
            Isa::Neon => "neon",
            Isa::Dotprod => "dotprod",
            Isa::I8mm => "i8mm",
        }
    }

    /// Whether loading packs weights for this ISA. Packed products are faster than products with f32
    /// activations, except in plain Rust, where the compiler alone has to find the instructions.
    pub fn packs_weights(self) -> bool {
        self != Isa::Scalar
    }

    /// Whether this CPU has the ISA.
    pub fn is_available(self) -> bool {
        match self {
            Isa::Scalar => true,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => {
                is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c")
            }
            #[cfg(target_arch = "x86_64")]
            Isa::AvxVnni => Isa::Avx2.is_available() && is_x86_feature_detected!("avxvnni"),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => {
                Isa::Avx2.is_available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vnni")
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Amx => {
                Isa::Avx512.is_available()
                    && is_x86_feature_detected!("avx512bf16")
                    && super::x86_64::amx::is_available()
            }
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => true,
            #[cfg(target_arch = "aarch64")]
            Isa::Dotprod => is_aarch64_feature_detected!("dotprod"),
            #[cfg(target_arch = "aarch64")]
            Isa::I8mm => {
                Isa::Dotprod.is_available()
                    && is_aarch64_feature_detected!("i8mm")
                    && is_aarch64_feature_detected!("bf16")
            }
            _ => false,
        }
    }

    /// The ISAs of this CPU, the slowest first.
    pub fn available() -> impl Iterator<Item = Isa> {
        Isa::ALL.into_iter().filter(|isa| isa.is_available())
    }

    /// The ISA in use: the one that `CANDLE_LLAMA_ISA` names, else the fastest of this CPU.
    ///
    /// # Errors
    /// A message, if the variable names no ISA, or one that this CPU does not have.
    pub fn detect() -> Result<Isa, &'static str> {
        static CHOSEN: OnceLock<Result<Isa, String>> = OnceLock::new();
        CHOSEN.get_or_init(choose).as_ref().copied().map_err(String::as_str)
    }

    pub(super) fn table(self) -> &'static KernelTable {
        assert!(self.is_available(), "{} is not available on this CPU", self.name());
        match self {
            #[cfg(target_arch = "x86_64")]
            Isa::Amx => &super::x86_64::amx::TABLE,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => &super::x86_64::avx512::TABLE,
            #[cfg(target_arch = "x86_64")]
            Isa::AvxVnni => &super::x86_64::avxvnni::TABLE,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => &super::x86_64::avx2::TABLE,
            #[cfg(target_arch = "aarch64")]
            Isa::I8mm => &super::aarch64::i8mm::TABLE,
            #[cfg(target_arch = "aarch64")]
            Isa::Dotprod => &super::aarch64::dotprod::TABLE,
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => &super::aarch64::neon::TABLE,
            _ => &super::scalar::TABLE,
        }
    }
}

fn choose() -> Result<Isa, String> {
    let available = || Isa::available().map(Isa::name).collect::<Vec<_>>().join(", ");
    let Some(name) = std::env::var_os(ISA_VARIABLE) else {
        return Ok(Isa::available().last().unwrap_or(Isa::Scalar));
    };
    Isa::available()
        .find(|isa| name == isa.name())
        .ok_or_else(|| format!("{ISA_VARIABLE}={}: this CPU has {}", name.to_string_lossy(), available()))
}

/// Whether this CPU's dot product of bf16 is faster than its FMA of floats. Some CPUs with AVX-512 do not
/// have the instruction. Intel's execute half as many operations per second with it as with FMA (measured on
/// Sapphire Rapids or later, see docs/experiments.md).
pub fn bf16_dot_is_fast() -> bool {
    #[cfg(target_arch = "x86_64")]
    return is_x86_feature_detected!("avx512bf16") && !is_of(b"GenuineIntel");
    // Arm's instruction for matrices does four times the work of FMA.
    #[cfg(target_arch = "aarch64")]
    return is_aarch64_feature_detected!("bf16");
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    false
}

/// Makes the kernels prefetch weights as far ahead as suits this CPU.
pub(super) fn choose_prefetch() {
    #[cfg(target_arch = "x86_64")]
    super::x86_64::prefetch::set_of_amd(is_of(b"AuthenticAMD"));
}

/// Whether this CPU is of the vendor with this identification string.
#[cfg(target_arch = "x86_64")]
#[allow(unused_unsafe)] // asking is safe in later versions of Rust
fn is_of(vendor: &[u8; 12]) -> bool {
    // SAFETY: every x86-64 CPU has the instruction, and leaf 0.
    let id = unsafe { std::arch::x86_64::__cpuid(0) };
    [id.ebx, id.edx, id.ecx].map(u32::to_le_bytes).concat() == vendor
}
