//! Tests on every ISA of this CPU: against plain f64 arithmetic, and of the promise that a row's result
//! depends only on the row.
//!
//! They are no unit tests, because those would compile all kernels a second time, which takes minutes.
#![allow(unsafe_code)] // some run an ISA's loops themselves

mod attention;
mod elementwise;
mod gemm;
mod matmul;
mod packed;
mod pool;
mod quantize;
mod roofline;
mod support;
mod weights;
