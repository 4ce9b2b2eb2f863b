//! How much memory the kernels' threads keep for themselves.

use crate::attention::MAX_TASK_QUERIES;
use crate::generic::unpacked::UNPACKED_BYTES;
use crate::kv_block::KV_BLOCK_POSITIONS;

/// What the buffers of one thread depend on.
#[derive(Clone, Copy, Debug)]
pub struct ScratchShape {
    /// The most rows of a product.
    pub rows: usize,
    /// The most columns of a weight.
    pub cols: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Query heads per KV head.
    pub group: usize,
}

/// An upper bound for the buffers that each thread keeps between its tasks, in bytes, on every ISA.
///
/// | buffer | at most |
/// |---|---|
/// | dequantised rows of a weight | 512 KiB, or 3 rows |
/// | unpacked strips of packed weights | `UNPACKED_BYTES`, or 4 strips of 40 bytes per column |
/// | sums of a task of 16 strips, for every row | 1 KiB per row |
/// | a slab of weights, and rows of one strip | 512 KiB |
/// | a KV block in up to four layouts | 64 bytes per element of a head, for each position |
/// | `MAX_TASK_QUERIES` queries, or one row's, with sums and scores | 64 bytes per element and per position |
pub fn thread_scratch_bytes(shape: ScratchShape) -> usize {
    let ScratchShape { rows, cols, head_dim, group } = shape;
    let queries = group.max(MAX_TASK_QUERIES);
    let per_position = head_dim.saturating_add(KV_BLOCK_POSITIONS).saturating_mul(64);
    let parts = [
        cols.saturating_mul(3 * size_of::<f32>()).max(512 << 10),
        cols.saturating_mul(4 * 40).max(UNPACKED_BYTES),
        rows.next_multiple_of(64).saturating_mul(1 << 10),
        512 << 10,
        per_position.saturating_mul(KV_BLOCK_POSITIONS),
        per_position.saturating_mul(queries),
    ];
    parts.into_iter().fold(0, usize::saturating_add)
}
