//! The load options, their names, and the choices that they mean on this machine.

use super::opened::Opened;
use super::quantize::{FileType, notes_in_memory, types_in_memory};
use crate::error::{Error, Result};
use crate::kernels::{Isa, WeightType};
use crate::model::cpu::Types;
use crate::model::tensor::Matrices;
use crate::{device, sys};
use candle_core::{DType, Device};
use std::fmt;
use std::str::FromStr;

/// A text that is not the name of any value of an option.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnknownName {
    /// The text.
    pub got: String,
    /// The valid names.
    pub known: &'static [&'static str],
}

impl fmt::Display for UnknownName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} is not one of {}", self.got, self.known.join(", "))
    }
}

impl std::error::Error for UnknownName {}

/// Defines an enum whose values have names, as Python and the command line spell them. Files spell some in
/// upper case.
macro_rules! named {
    ($(#[$docs:meta])* pub enum $enum:ident {
        $($(#[$value_docs:meta])* $value:ident = $name:literal,)*
    }) => {
        $(#[$docs])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum $enum {
            $($(#[$value_docs])* $value,)*
        }

        impl $enum {
            /// The name.
            pub const fn name(self) -> &'static str {
                match self {
                    $($enum::$value => $name,)*
                }
            }
        }

        impl FromStr for $enum {
            type Err = UnknownName;

            fn from_str(text: &str) -> std::result::Result<Self, UnknownName> {
                match text {
                    $(_ if text.eq_ignore_ascii_case($name) => Ok($enum::$value),)*
                    _ => Err(UnknownName { got: text.into(), known: &[$($name),*] }),
                }
            }
        }
    };
}

named! {
    /// A float type.
    pub enum FloatType {
        /// IEEE 754 binary32.
        Float32 = "float32",
        /// IEEE 754 binary16.
        Float16 = "float16",
        /// The upper half of a float32.
        Bfloat16 = "bfloat16",
    }
}

impl FloatType {
    /// The storage type.
    pub const fn weight_type(self) -> WeightType {
        match self {
            FloatType::Float32 => WeightType::F32,
            FloatType::Float16 => WeightType::F16,
            FloatType::Bfloat16 => WeightType::BF16,
        }
    }

    /// Candle's name of it.
    pub(super) const fn candle_type(self) -> DType {
        match self {
            FloatType::Float32 => DType::F32,
            FloatType::Float16 => DType::F16,
            FloatType::Bfloat16 => DType::BF16,
        }
    }
}

named! {
    /// A type of cached keys and values.
    pub enum KvType {
        /// IEEE 754 binary32.
        Float32 = "float32",
        /// IEEE 754 binary16.
        Float16 = "float16",
        /// The upper half of a float32.
        Bfloat16 = "bfloat16",
        /// 8 bits per number, and a scale for each 32 of a head.
        Q8_0 = "q8_0",
    }
}

impl KvType {
    /// The storage type.
    pub const fn weight_type(self) -> WeightType {
        match self {
            KvType::Float32 => WeightType::F32,
            KvType::Float16 => WeightType::F16,
            KvType::Bfloat16 => WeightType::BF16,
            KvType::Q8_0 => WeightType::Q8_0,
        }
    }
}

impl From<FloatType> for KvType {
    fn from(dtype: FloatType) -> Self {
        match dtype {
            FloatType::Float32 => KvType::Float32,
            FloatType::Float16 => KvType::Float16,
            FloatType::Bfloat16 => KvType::Bfloat16,
        }
    }
}

named! {
    /// A type that float matrices can be quantised to while loading.
    pub enum QuantizeType {
        /// 8 bits per weight, and a scale for each 32 weights.
        Q8_0 = "q8_0",
        /// 4 bits per weight, and a scale for each 32 weights.
        Q4_0 = "q4_0",
        /// llama.cpp's mixture of Q2_K and larger types.
        Q2K = "q2_k",
        /// llama.cpp's mixture of Q3_K and larger types.
        Q3KM = "q3_k_m",
        /// llama.cpp's mixture of Q4_K and few larger types.
        Q4KS = "q4_k_s",
        /// llama.cpp's mixture of Q4_K and Q6_K.
        Q4KM = "q4_k_m",
        /// Q5_K, with a head in Q6_K.
        Q5KS = "q5_k_s",
        /// llama.cpp's mixture of Q5_K and Q6_K.
        Q5KM = "q5_k_m",
        /// Q6_K.
        Q6K = "q6_k",
    }
}

impl QuantizeType {
    /// The kind of file with the same types.
    const fn file_type(self) -> FileType {
        match self {
            QuantizeType::Q8_0 => FileType::Q8_0,
            QuantizeType::Q4_0 => FileType::Q4_0,
            QuantizeType::Q2K => FileType::Q2_K,
            QuantizeType::Q3KM => FileType::Q3_K_M,
            QuantizeType::Q4KS => FileType::Q4_K_S,
            QuantizeType::Q4KM => FileType::Q4_K_M,
            QuantizeType::Q5KS => FileType::Q5_K_S,
            QuantizeType::Q5KM => FileType::Q5_K_M,
            QuantizeType::Q6K => FileType::Q6_K,
        }
    }
}

named! {
    /// Whether activations may be rounded.
    #[derive(Default)]
    pub enum Compute {
        /// They are rounded where that is faster: docs/kernels.md has the table.
        #[default]
        Auto = "auto",
        /// They are never rounded: activations, keys and values are float32.
        Exact = "exact",
    }
}

named! {
    /// The decoder that runs a model.
    pub enum EngineKind {
        /// Our own, on our CPU kernels.
        Cpu = "cpu",
        /// Our own, in Candle's tensor operations, on any device.
        Tensor = "tensor",
        /// Candle's Llama, on any device.
        Candle = "candle",
    }
}

/// How to load a model. With the defaults, `load` makes every decision.
#[derive(Clone, Debug, Default)]
pub struct LoadOptions {
    /// "auto", "cpu", "cuda", "cuda:N" or "metal"; None is "auto".
    pub device: Option<String>,
    /// The type of the weights; None keeps the checkpoint's storage types.
    pub dtype: Option<FloatType>,
    /// Quantises float matrices to this type while loading; None does not.
    pub quantize: Option<QuantizeType>,
    /// Whether activations may be rounded.
    pub compute: Compute,
    /// The type of cached keys and values; None is float16, in exact mode float32.
    pub kv_dtype: Option<KvType>,
    /// The decoder; None takes `Cpu` on the CPU and `Tensor` on other devices.
    pub engine: Option<EngineKind>,
    /// Number of threads; None is the number of performance cores that this process may use.
    pub threads: Option<usize>,
    /// Maximum positions of a sequence; None is the model's own context, or less if memory is short.
    pub context_length: Option<usize>,
    /// Maximum sequences that run together; None is what pays.
    pub max_num_seqs: Option<usize>,
    /// Maximum bytes of keys and values; None is bounded by free memory.
    pub kv_cache_bytes: Option<u64>,
    /// Whether prompts reuse the keys and values of earlier ones with the same beginning; None is true.
    pub prefix_cache: Option<bool>,
    /// Refuse models that would otherwise load with a warning.
    pub strict: bool,
}

/// The ISA of our kernels.
///
/// # Errors
/// [`Error::Device`] if the processor lacks the one that `CANDLE_LLAMA_ISA` names.
pub(super) fn detect_isa() -> Result<Isa> {
    Isa::detect().map_err(|reason| Error::Device { device: "cpu".into(), reason: reason.into() })
}

/// The largest number of threads that is accepted, far above the cores of any machine.
const MAX_THREADS: usize = 4096;

/// The number of threads to use. None means the performance cores that this process may use.
///
/// # Errors
/// [`Error::InvalidArgument`]
pub(super) fn threads(requested: Option<usize>) -> Result<usize> {
    match requested {
        Some(threads @ 1..=MAX_THREADS) => Ok(threads),
        Some(other) => Err(Error::argument("threads", format!("{other} is not from 1 to {MAX_THREADS}"))),
        None => Ok(sys::default_threads()),
    }
}

/// The options, checked against each other and against this machine.
pub(super) struct Choices {
    pub(super) dtype: Option<FloatType>,
    pub(super) quantize: Option<QuantizeType>,
    pub(super) exact: bool,
    /// As requested; [`Choices::kv_dtype`] fills in the default.
    pub(super) kv_dtype: Option<KvType>,
    pub(super) engine: Option<EngineKind>,
    pub(super) device: Device,
    pub(super) threads: usize,
    pub(super) prefix_cache: bool,
}

impl Choices {
    /// # Errors
    /// [`Error::InvalidArgument`] for options that exclude each other, [`Error::Device`].
    pub(super) fn new(options: &LoadOptions) -> Result<Self> {
        let &LoadOptions { dtype, quantize, kv_dtype, engine, .. } = options;
        if let (Some(_), Some(dtype)) = (quantize, dtype) {
            let reason =
                format!("cannot be combined with dtype {}: both set the type of the weights", dtype.name());
            return Err(Error::argument("quantize", reason));
        }
        let exact = options.compute == Compute::Exact;
        if let Some(kv_dtype) = kv_dtype.filter(|&kv_dtype| exact && kv_dtype != KvType::Float32) {
            let reason = format!(
                "{:?} cannot be combined with compute=\"exact\", which keeps keys and values in float32",
                kv_dtype.name()
            );
            return Err(Error::argument("kv_dtype", reason));
        }
        let requested = options.device.as_deref().unwrap_or("auto");
        // The cpu engine does not run on accelerators, so "auto" must not choose one for it.
        let name = if engine == Some(EngineKind::Cpu) && requested == "auto" { "cpu" } else { requested };
        let device = device::open(name)?;
        if engine == Some(EngineKind::Cpu) && !device.is_cpu() {
            return Err(Error::argument("engine", format!("\"cpu\" does not run on device {name}")));
        }
        let threads = threads(options.threads)?;
        let prefix_cache = options.prefix_cache.unwrap_or(true);
        Ok(Choices { dtype, quantize, exact, kv_dtype, engine, device, threads, prefix_cache })
    }

    /// The cpu engine's types of the weights in memory.
    pub(super) fn types(&self, opened: &Opened) -> Types {
        let quantize = self.quantize.map(|quantize| types_in_memory(opened, quantize.file_type()));
        Types { dtype: self.dtype.map(FloatType::weight_type), quantize: quantize.unwrap_or_default() }
    }

    /// Notes about matrices that `quantize` leaves as they are stored.
    pub(super) fn quantize_notes(&self, opened: &Opened) -> Vec<String> {
        let quantize = self.quantize.map(|quantize| types_in_memory(opened, quantize.file_type()));
        quantize.map(|types| notes_in_memory(opened, &types)).unwrap_or_default()
    }

    /// Takes the CPU if no decoder was requested, and the accelerator's cannot do what the options ask for.
    /// Returns the reason. The model's weights are stored as `stored`.
    pub(super) fn fall_back(&mut self, stored: Option<WeightType>) -> Option<String> {
        if self.engine_kind() == EngineKind::Cpu || self.engine.is_some() {
            return None;
        }
        let Err(error @ Error::Unsupported { .. }) = self.candle_dtype(stored) else { return None };
        let device = device::name(&std::mem::replace(&mut self.device, Device::Cpu));
        Some(format!("runs on the CPU, because the model cannot run on {device}: {error}"))
    }

    /// The decoder.
    pub(super) fn engine_kind(&self) -> EngineKind {
        let usual = if self.device.is_cpu() { EngineKind::Cpu } else { EngineKind::Tensor };
        self.engine.unwrap_or(usual)
    }

    /// How the tensor engine keeps matrices.
    ///
    /// # Errors
    /// [`Error::Device`] if the processor lacks the ISA of `CANDLE_LLAMA_ISA`.
    pub(super) fn matrices(&self) -> Result<Matrices> {
        let &Choices { threads, exact, .. } = self;
        Ok(match self.dtype {
            None if self.device.is_cpu() => Matrices::Stored { isa: detect_isa()?, threads, exact },
            None if !exact => Matrices::Quantized,
            _ => Matrices::Float,
        })
    }

    /// The type of the cpu engine's cached keys and values.
    pub(super) fn kv_dtype(&self) -> KvType {
        self.kv_dtype.unwrap_or(if self.exact { KvType::Float32 } else { KvType::Float16 })
    }

    /// Checks that the cpu engine's keys and values can have their type.
    ///
    /// # Errors
    /// [`Error::Unsupported`]
    pub(super) fn check_kv_dtype(&self, head_dim: usize) -> Result<()> {
        let dtype = self.kv_dtype();
        let block = dtype.weight_type().block_len();
        if self.engine_kind() == EngineKind::Cpu && !head_dim.is_multiple_of(block) {
            let reason = format!(
                "{}: every {block} numbers of a head share a scale, and head_dim is {head_dim}",
                dtype.name()
            );
            return Err(Error::unsupported("kv_dtype", reason));
        }
        Ok(())
    }

    /// The type that the candle and the tensor engine compute with, also in the KV cache, if the weights are
    /// stored as `stored`.
    ///
    /// # Errors
    /// [`Error::Unsupported`] or [`Error::InvalidArgument`] if Candle cannot compute as requested.
    pub(super) fn candle_dtype(&self, stored: Option<WeightType>) -> Result<FloatType> {
        if self.quantize.is_some() {
            let reason = "only engine=\"cpu\" quantises weights while loading";
            return Err(Error::unsupported("quantize", reason));
        }
        let on_cpu = self.device.is_cpu();
        let dtype = match (self.exact, self.dtype, stored) {
            (true, Some(other @ (FloatType::Float16 | FloatType::Bfloat16)), _) => {
                return Err(Error::argument(
                    "dtype",
                    format!("{} cannot be combined with compute=\"exact\" in Candle", other.name()),
                ));
            }
            (true, ..) => FloatType::Float32,
            (false, Some(FloatType::Bfloat16), _) if on_cpu => {
                return Err(Error::unsupported(
                    "dtype",
                    "bfloat16: Candle has no bfloat16 matmul on the CPU; use engine=\"cpu\"",
                ));
            }
            (false, Some(dtype), _) => dtype,
            (false, None, Some(WeightType::F32)) => FloatType::Float32,
            // Candle has no matmul of BF16 there, and activations of F16 above 65504 would become infinite.
            (false, None, _) if on_cpu => FloatType::Float32,
            (false, None, Some(WeightType::F16)) => FloatType::Float16,
            (false, None, _) => FloatType::Bfloat16,
        };
        if let Some(requested) = self.kv_dtype.filter(|&requested| requested != dtype.into()) {
            let reason = format!(
                "{}: keys and values have the type that Candle computes with, here {}; use engine=\"cpu\"",
                requested.name(),
                dtype.name()
            );
            return Err(Error::unsupported("kv_dtype", reason));
        }
        Ok(dtype)
    }
}
