//! How to load a model: the options by name, and what they come to on this machine.

use crate::error::{Error, Result};
use crate::kernels::WeightType;
use crate::model::cpu::Types;
use crate::{device, sys};
use candle_core::{DType, Device};
use std::fmt;
use std::str::FromStr;

/// A text that names none of an option's values.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnknownName {
    /// The text.
    pub got: String,
    /// The names that there are.
    pub known: &'static [&'static str],
}

impl fmt::Display for UnknownName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} is not one of {}", self.got, self.known.join(", "))
    }
}

impl std::error::Error for UnknownName {}

/// An enum whose values have names, as Python and the command line spell them.
macro_rules! named {
    ($(#[$docs:meta])* pub enum $enum:ident { $($(#[$value_docs:meta])* $value:ident = $name:literal,)* }) => {
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
                    $($name => Ok($enum::$value),)*
                    _ => Err(UnknownName { got: text.into(), known: &[$($name),*] }),
                }
            }
        }
    };
}

named! {
    /// A type of floats.
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
    /// As a storage type.
    pub const fn weight_type(self) -> WeightType {
        match self {
            FloatType::Float32 => WeightType::F32,
            FloatType::Float16 => WeightType::F16,
            FloatType::Bfloat16 => WeightType::BF16,
        }
    }
}

named! {
    /// What float matrices may be quantised to while they load.
    pub enum QuantizeType {
        /// 8 bits, one scale for each 32 weights.
        Q8_0 = "q8_0",
        /// 4 bits, one scale for each 32 weights.
        Q4_0 = "q4_0",
    }
}

named! {
    /// How activations are rounded.
    #[derive(Default)]
    pub enum Compute {
        /// Where that is faster: docs/kernels.md has the table.
        #[default]
        Auto = "auto",
        /// Never: float32 activations, keys and values.
        Exact = "exact",
    }
}

named! {
    /// A decoder.
    pub enum EngineKind {
        /// Our own.
        Cpu = "cpu",
        /// Candle's Llama.
        Candle = "candle",
    }
}

/// How to load a model. The defaults leave every decision to `load`.
#[derive(Clone, Debug, Default)]
pub struct LoadOptions {
    /// "auto", "cpu", "cuda", "cuda:N" or "metal"; None is "auto".
    pub device: Option<String>,
    /// The type of the weights; None keeps the checkpoint's storage types.
    pub dtype: Option<FloatType>,
    /// What float matrices are quantised to, tensor by tensor.
    pub quantize: Option<QuantizeType>,
    /// How activations are rounded.
    pub compute: Compute,
    /// The type of cached keys and values; None is float16, in exact mode float32.
    pub kv_dtype: Option<FloatType>,
    /// The decoder; None takes ours on the CPU and Candle's elsewhere.
    pub engine: Option<EngineKind>,
    /// None: the cores that this process may use.
    pub threads: Option<usize>,
    /// Positions; None is the model's own context, bounded by memory.
    pub context_length: Option<usize>,
    /// Refuse what would otherwise load with a warning.
    pub strict: bool,
}

/// The most threads that a caller may ask for: far above any machine's cores.
const MOST_THREADS: usize = 4096;

/// The threads that were asked for; None asks for the cores that this process may use.
///
/// # Errors
/// [`Error::InvalidArgument`]
pub(super) fn threads(asked: Option<usize>) -> Result<usize> {
    match asked {
        Some(threads @ 1..=MOST_THREADS) => Ok(threads),
        Some(other) => Err(Error::argument("threads", format!("{other} is not from 1 to {MOST_THREADS}"))),
        None => Ok(sys::usable_cores()),
    }
}

/// The options, checked against each other and against this machine.
pub(super) struct Choices {
    pub(super) dtype: Option<FloatType>,
    pub(super) quantize: Option<QuantizeType>,
    pub(super) exact: bool,
    /// As asked for.
    pub(super) kv_dtype: Option<FloatType>,
    pub(super) engine: Option<EngineKind>,
    pub(super) device: Device,
    pub(super) threads: usize,
}

impl Choices {
    /// # Errors
    /// [`Error::InvalidArgument`] for options that exclude each other, [`Error::Device`].
    pub(super) fn new(options: &LoadOptions) -> Result<Self> {
        let &LoadOptions { dtype, quantize, kv_dtype, engine, .. } = options;
        if let (Some(_), Some(dtype)) = (quantize, dtype) {
            let reason = format!("cannot be with dtype {}: quantised weights have one type", dtype.name());
            return Err(Error::argument("quantize", reason));
        }
        let exact = options.compute == Compute::Exact;
        if let Some(kv_dtype) = kv_dtype.filter(|&kv_dtype| exact && kv_dtype != FloatType::Float32) {
            let reason = format!(
                "{:?} cannot be with compute=\"exact\", which keeps keys and values in float32",
                kv_dtype.name()
            );
            return Err(Error::argument("kv_dtype", reason));
        }
        let asked = options.device.as_deref().unwrap_or("auto");
        // The cpu engine takes no accelerator, so "auto" must not find one for it.
        let name = if engine == Some(EngineKind::Cpu) && asked == "auto" { "cpu" } else { asked };
        let device = device::open(name)?;
        if engine == Some(EngineKind::Cpu) && !device.is_cpu() {
            return Err(Error::argument("engine", format!("\"cpu\" does not run on device {name}")));
        }
        let threads = threads(options.threads)?;
        Ok(Choices { dtype, quantize, exact, kv_dtype, engine, device, threads })
    }

    /// The types in which the cpu engine holds weights.
    pub(super) fn types(&self) -> Types {
        Types {
            dtype: self.dtype.map(FloatType::weight_type),
            quantize: self.quantize.map(|quantize| match quantize {
                QuantizeType::Q8_0 => WeightType::Q8_0,
                QuantizeType::Q4_0 => WeightType::Q4_0,
            }),
        }
    }

    /// Whether Candle's Llama is tried; else it is the cpu engine.
    pub(super) fn tries_candle(&self) -> bool {
        self.engine == Some(EngineKind::Candle) || !self.device.is_cpu()
    }

    /// The type of the cpu engine's keys and values.
    pub(super) fn kv_dtype(&self) -> FloatType {
        self.kv_dtype.unwrap_or(if self.exact { FloatType::Float32 } else { FloatType::Float16 })
    }

    /// The type in which Candle's Llama holds weights that are stored as `stored`.
    pub(super) fn candle_dtype(&self, stored: Option<WeightType>) -> Result<DType> {
        if self.quantize.is_some() {
            let reason = "Candle's Llama computes with floats; use engine=\"cpu\"";
            return Err(Error::unsupported("quantize", reason));
        }
        let on_cpu = self.device.is_cpu();
        Ok(match (self.exact, self.dtype, stored) {
            (true, None | Some(FloatType::Float32), _) | (false, Some(FloatType::Float32), _) => DType::F32,
            (true, Some(other), _) => {
                return Err(Error::argument(
                    "dtype",
                    format!("{} cannot be with compute=\"exact\" in Candle", other.name()),
                ));
            }
            (false, Some(FloatType::Float16), _) => DType::F16,
            (false, Some(_), _) if on_cpu => {
                return Err(Error::unsupported(
                    "dtype",
                    "bfloat16: Candle's CPU has no such matmul; use engine=\"cpu\"",
                ));
            }
            (false, Some(_), _) => DType::BF16,
            (false, None, Some(WeightType::F16)) => DType::F16,
            (false, None, Some(WeightType::BF16)) if !on_cpu => DType::BF16,
            (false, None, Some(WeightType::F32)) => DType::F32,
            // BF16 on the CPU, and blocks of integers.
            (false, None, _) => {
                if on_cpu {
                    DType::F32
                } else {
                    DType::BF16
                }
            }
        })
    }
}
