//! Slices in, slices out. Imports nothing of this crate and nothing of Candle.

pub mod blocks;

pub use blocks::WeightType;
