//! Opens a Candle device by its name: `"auto" | "cpu" | "cuda" | "cuda:0" | "metal"`. No other module reads
//! `cfg(feature = "cuda")`, `cfg(feature = "metal")` or the other accelerator features.

use crate::error::{Error, Result};
use crate::sys::Memory;
use candle_core::{Device, Tensor};

/// The accelerator features of Cargo.toml with which this library was built.
pub fn features() -> Vec<&'static str> {
    let features = [
        ("cuda", cfg!(feature = "cuda")),
        ("cudnn", cfg!(feature = "cudnn")),
        ("flash-attn", cfg!(feature = "flash-attn")),
        ("metal", cfg!(feature = "metal")),
        ("accelerate", cfg!(feature = "accelerate")),
    ];
    features.into_iter().filter_map(|(name, built)| built.then_some(name)).collect()
}

/// Whether attention may call the flash-attn kernels. They run on CUDA only.
pub fn has_flash_attention(device: &Device) -> bool {
    cfg!(feature = "flash-attn") && device.is_cuda()
}

/// Causal attention by the flash-attn kernels, of which [`has_flash_attention`] tells whether they are there.
/// The last query sees all keys.
///
/// - `queries`: `(1, rows, query_heads, head_dim)`, already scaled; F16 or BF16, as all of these
/// - `keys`, `values`: `(1, positions, kv_heads, head_dim)`
///
/// Returns the shape of `queries`.
///
/// # Errors
/// Candle's.
#[cfg(feature = "flash-attn")]
pub fn flash_attention(queries: &Tensor, keys: &Tensor, values: &Tensor) -> candle_core::Result<Tensor> {
    candle_flash_attn::flash_attn(queries, keys, values, 1.0, true)
}

/// As above; this build has no such kernels.
///
/// # Errors
/// Always.
#[cfg(not(feature = "flash-attn"))]
pub fn flash_attention(_queries: &Tensor, _keys: &Tensor, _values: &Tensor) -> candle_core::Result<Tensor> {
    candle_core::bail!("this build has no flash-attn kernels")
}

/// Opens the device called `name`. "auto" takes the first of CUDA and Metal that is built in and present,
/// else the CPU.
///
/// # Errors
/// [`Error::Device`] if the name is unknown, or the device is not supported by this build or not present.
pub fn open(name: &str) -> Result<Device> {
    let error = |reason: String| Error::Device { device: name.into(), reason };
    let (kind, ordinal) = match name.split_once(':') {
        None => (name, 0),
        Some((kind, number)) => {
            let number = number.parse().map_err(|_| error(format!("`{number}` is not a device number")))?;
            (kind, number)
        }
    };
    match kind {
        "auto" if name == "auto" => {
            Ok(present("cuda", 0).or_else(|| present("metal", 0)).unwrap_or(Device::Cpu))
        }
        "cpu" if name == "cpu" => Ok(Device::Cpu),
        "cuda" | "metal" => {
            if !is_built_in(kind) {
                return Err(error(format!("this build has no {kind}; build with --features {kind}")));
            }
            open_accelerator(kind, ordinal).map_err(|cause| error(cause.to_string()))
        }
        _ => Err(error("not one of auto, cpu, cuda, cuda:N, metal".into())),
    }
}

/// The names of the devices that this build can use on this machine.
pub fn available() -> Vec<String> {
    let cuda = (0..).map_while(|n| present("cuda", n).map(|_| format!("cuda:{n}")));
    let metal = present("metal", 0).map(|_| "metal".to_owned());
    ["cpu".to_owned()].into_iter().chain(cuda).chain(metal).collect()
}

/// A device's name, in the form that [`open`] accepts.
pub fn name(device: &Device) -> String {
    match device.location() {
        candle_core::DeviceLocation::Cpu => "cpu".into(),
        candle_core::DeviceLocation::Cuda { gpu_id } => format!("cuda:{gpu_id}"),
        candle_core::DeviceLocation::Metal { gpu_id: 0 } => "metal".into(),
        candle_core::DeviceLocation::Metal { gpu_id } => format!("metal:{gpu_id}"),
    }
}

/// The memory of an accelerator. None if it does not tell.
#[cfg(feature = "cuda")]
pub fn memory(device: &Device) -> Option<Memory> {
    use candle_core::cuda_backend::cudarc::driver::result::mem_get_info;
    // The call asks the device that this thread used last.
    device.as_cuda_device().ok()?.cuda_stream().context().bind_to_thread().ok()?;
    let (free, total) = mem_get_info().ok()?;
    Some(Memory { total: total as u64, available: free as u64, swap: 0 })
}

/// The memory of an accelerator. None if it does not tell.
#[cfg(not(feature = "cuda"))]
pub fn memory(_device: &Device) -> Option<Memory> {
    None
}

fn is_built_in(kind: &str) -> bool {
    match kind {
        "cuda" => cfg!(feature = "cuda"),
        "metal" => cfg!(feature = "metal"),
        _ => false,
    }
}

fn present(kind: &str, ordinal: usize) -> Option<Device> {
    if is_built_in(kind) { open_accelerator(kind, ordinal).ok() } else { None }
}

fn open_accelerator(kind: &str, ordinal: usize) -> candle_core::Result<Device> {
    if kind == "cuda" { Device::new_cuda(ordinal) } else { Device::new_metal(ordinal) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_is_always_there() {
        assert!(open("cpu").unwrap().is_cpu());
        assert_eq!(name(&Device::Cpu), "cpu");
        assert!(available().contains(&"cpu".to_owned()));
        assert!(open("auto").is_ok());
    }

    #[test]
    fn unknown_and_absent_devices_are_refused_by_name() {
        for bad in ["", "gpu", "cpu:0", "auto:1", "cuda:", "cuda:x", "cuda:-1", "metal:9999", "CPU"] {
            match open(bad) {
                Err(Error::Device { device, .. }) => assert_eq!(device, bad),
                other => panic!("{bad}: {other:?}"),
            }
        }
    }
}
