//! Tests of the loops that measure what the machine can do, and of the limits that they give.

use crate::support::{isas, kernels};
use candle_llama_kernels::internals::peaks;
use candle_llama_kernels::{Cancel, Isa, RooflineError};
use std::sync::atomic::AtomicBool;

/// Small, because ISAs may be emulated. The tests do not check the speed itself.
const BUFFER_BYTES: usize = 1 << 20;

#[test]
fn roofline_loops_do_the_operations_that_they_count() {
    for isa in isas() {
        let peaks = peaks(isa);
        let loops = [Some(peaks.int8), (peaks.bf16)(), Some(peaks.f32)];
        for (peak, name) in loops.into_iter().zip(["int8", "bf16", "f32"]) {
            let Some(peak) = peak else { continue };
            for iterations in [0, 1, 2, 1000] {
                // SAFETY: the ISA is available, and bf16 is there only if the CPU has it.
                let sum = unsafe { (peak.run)(iterations) };
                assert_eq!(
                    sum,
                    (iterations as u64 * peak.operations / 2) as f64,
                    "{name}, {}, {iterations}",
                    isa.name()
                );
            }
        }
    }
}

#[test]
fn roofline_reads_every_word() {
    let words: Vec<u64> = (1..5000_u64).map(|i| i.wrapping_mul(0x9e37_79b9_7f4a_7c15)).collect();
    for isa in isas() {
        for (start, len) in [(0, 0), (0, 1), (3, 63), (0, 64), (1, 64), (5, 65), (0, 4999), (7, 1031)] {
            let part = &words[start..start + len];
            let expected = part.iter().fold(0, |all, word| all ^ word);
            for (i, read) in peaks(isa).reads.iter().enumerate() {
                // SAFETY: the ISA is available.
                let all = unsafe { read(part) };
                assert_eq!(all, expected, "{}, loop {i}, {len} words from {start}", isa.name());
            }
        }
    }
}

#[test]
fn roofline_limits_are_positive_and_finite_for_any_buffer() {
    for isa in isas() {
        for (threads, bytes) in [(1, BUFFER_BYTES), (3, BUFFER_BYTES + 13), (2, 0)] {
            let peaks = kernels(isa, threads).roofline_peaks(bytes, &Cancel::never()).unwrap();
            let bf16 = peaks.bf16_operations_per_second;
            for rate in [
                peaks.read_bytes_per_second,
                peaks.int8_operations_per_second,
                bf16.unwrap_or(1.0),
                peaks.f32_operations_per_second,
            ] {
                assert!(rate.is_finite() && rate > 0.0, "{peaks:?}");
            }
            assert!(bf16.is_none() || isa >= Isa::Avx512, "{peaks:?}");
        }
    }
}

#[test]
fn roofline_bytes_are_faster_than_floats_where_there_are_instructions() {
    for isa in isas().into_iter().filter(|isa| isa.packs_weights()) {
        let faster = || {
            let peaks = kernels(isa, 1).roofline_peaks(BUFFER_BYTES, &Cancel::never()).unwrap();
            peaks.int8_operations_per_second >= peaks.f32_operations_per_second
        };
        // Another process may have used the core during a whole measurement.
        assert!((0..5).any(|_| faster()), "{}", isa.name());
    }
}

#[test]
fn roofline_threads_neither_multiply_the_limit_nor_divide_it() {
    let isa = *isas().last().expect("one level is always there");
    let rate = |threads| {
        kernels(isa, threads)
            .roofline_peaks(BUFFER_BYTES, &Cancel::never())
            .unwrap()
            .f32_operations_per_second
    };
    // Two threads reach between one busy core and two free ones. The bounds leave room for other
    // processes.
    let sane = || (0.4..3.0).contains(&(rate(2) / rate(1)));
    assert!((0..5).any(|_| sane()));
}

#[test]
fn roofline_stops_when_told_and_says_if_there_is_no_memory() {
    let kernels = kernels(Isa::Scalar, 2);
    let peaks = kernels.roofline_peaks(BUFFER_BYTES, &Cancel::new(&AtomicBool::new(true)));
    assert_eq!(peaks, Err(RooflineError::Cancelled));
    assert_eq!(kernels.roofline_peaks(usize::MAX, &Cancel::never()), Err(RooflineError::NoMemory));
}
