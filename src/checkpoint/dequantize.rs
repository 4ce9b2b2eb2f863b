//! Stored weights to float32, one plain loop per type.

use half::{bf16, f16};

use crate::kernels::WeightType;

/// Widens whole blocks to float32.
///
/// - `bytes`: `out.len()` elements in the layout of [`crate::kernels::blocks`]; any alignment
/// - `out`: overwritten
///
/// # Panics
/// If `out` is not a whole number of blocks or `bytes` has another length than they take.
///
/// Source: ggml, `dequantize_row_q8_0`, `dequantize_row_q4_0`, `dequantize_row_q4_1`.
pub fn dequantize(dtype: WeightType, bytes: &[u8], out: &mut [f32]) {
    assert_eq!(dtype.bytes_for(out.len()), Some(bytes.len()), "bytes of {} {dtype} elements", out.len());
    let blocks = bytes.chunks_exact(dtype.block_bytes()).zip(out.chunks_exact_mut(dtype.block_len()));
    match dtype {
        WeightType::F32 => {
            blocks.for_each(|(block, out)| {
                out[0] = f32::from_le_bytes([block[0], block[1], block[2], block[3]])
            });
        }
        WeightType::F16 => blocks.for_each(|(block, out)| out[0] = half_at(block, 0)),
        WeightType::BF16 => {
            blocks.for_each(|(block, out)| out[0] = bf16::from_le_bytes([block[0], block[1]]).to_f32());
        }
        WeightType::Q8_0 => {
            for (block, out) in blocks {
                let d = half_at(block, 0);
                for (out, q) in out.iter_mut().zip(&block[2..]) {
                    *out = f32::from(q.cast_signed()) * d;
                }
            }
        }
        WeightType::Q4_0 => {
            for (block, out) in blocks {
                let d = half_at(block, 0);
                nibbles(&block[2..], out, |q| (f32::from(q) - 8.0) * d);
            }
        }
        WeightType::Q4_1 => {
            for (block, out) in blocks {
                let (d, m) = (half_at(block, 0), half_at(block, 2));
                nibbles(&block[4..], out, |q| f32::from(q) * d + m);
            }
        }
    }
}

fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// Byte `j` holds element `j` in its low half and element `j + 16` in its high half.
fn nibbles(bytes: &[u8], out: &mut [f32], value: impl Fn(u8) -> f32) {
    let (low, high) = out.split_at_mut(16);
    for ((byte, low), high) in bytes.iter().zip(low).zip(high) {
        *low = value(byte & 0x0f);
        *high = value(byte >> 4);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The bytes of one f16, then `rest`.
    fn block(halves: &[f32], rest: impl IntoIterator<Item = u8>) -> Vec<u8> {
        let halves = halves.iter().flat_map(|&half| f16::from_f32(half).to_le_bytes());
        halves.chain(rest).collect()
    }

    #[test]
    fn plain_numbers_widen_exactly() {
        let mut out = [0.0; 2];
        dequantize(WeightType::F32, bytemuck::cast_slice(&[1.5f32, -2.0]), &mut out);
        assert_eq!(out, [1.5, -2.0]);
        dequantize(WeightType::F16, &block(&[1.5, -2.0], []), &mut out);
        assert_eq!(out, [1.5, -2.0]);
        dequantize(WeightType::BF16, &[0xc0, 0x3f, 0x00, 0xc0], &mut out);
        assert_eq!(out, [1.5, -2.0]);
    }

    #[test]
    fn q8_0_is_scale_times_signed_byte() {
        let mut out = [0.0; 32];
        dequantize(WeightType::Q8_0, &block(&[0.5], (0..32).map(|i| (i - 16i8).cast_unsigned())), &mut out);
        let expected: Vec<f32> = (0..32).map(|i| (i as f32 - 16.0) * 0.5).collect();
        assert_eq!(out, expected[..]);
    }

    #[test]
    fn q4_types_keep_the_high_halves_for_the_second_sixteen() {
        let bytes = (0..16u8).map(|j| j | ((15 - j) << 4));
        let mut out = [0.0; 32];
        dequantize(WeightType::Q4_0, &block(&[2.0], bytes.clone()), &mut out);
        assert_eq!((out[0], out[15], out[16], out[31]), (-16.0, 14.0, 14.0, -16.0));
        dequantize(WeightType::Q4_1, &block(&[2.0, 0.25], bytes), &mut out);
        assert_eq!((out[0], out[15], out[16], out[31]), (0.25, 30.25, 30.25, 0.25));
    }

    #[test]
    #[should_panic(expected = "bytes of 32 Q8_0 elements")]
    fn a_wrong_length_panics() {
        dequantize(WeightType::Q8_0, &[0; 33], &mut [0.0; 32]);
    }
}
