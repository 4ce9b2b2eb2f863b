//! Files to metadata and named tensors.
