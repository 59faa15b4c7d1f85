//! Attention by blocks that stay in cache, with an online softmax (Dao et al. 2022, "FlashAttention").

use crate::dtype::{Slice, SliceMut};

/// Heads of tokens, borrowed: element (b, h, t, d) is at b s0 + h s1 + t s2 + d.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Heads<'a> {
    pub(crate) data: Slice<'a>,
    pub(crate) strides: [usize; 3],
}

/// Heads of tokens, borrowed for writing; no two rows may overlap.
#[derive(Debug)]
pub(crate) struct HeadsMut<'a> {
    pub(crate) data: SliceMut<'a>,
    pub(crate) strides: [usize; 3],
}

/// What attends to what. Query t stands at position offset + t, key s at position s.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Geometry<'a> {
    /// Sequences.
    pub(crate) batch: usize,
    /// Query heads.
    pub(crate) heads: usize,
    /// Key heads; divides `heads`. Query head h uses key head h / (heads / kv_heads).
    pub(crate) kv_heads: usize,
    /// Queries of a sequence.
    pub(crate) queries: usize,
    /// Keys of a sequence.
    pub(crate) keys: usize,
    /// Elements of a head, 1 to 256.
    pub(crate) head_dim: usize,
    /// Logit = scale q.k.
    pub(crate) scale: f32,
    /// c: a logit l becomes c tanh(l / c), before masking.
    pub(crate) soft_cap: Option<f32>,
    /// Keys after the query are hidden.
    pub(crate) causal: bool,
    /// Keys at a distance of this or more are hidden; if `causal`, only earlier keys are left to hide.
    pub(crate) window: Option<usize>,
    /// Position of query 0.
    pub(crate) offset: usize,
    /// Document of each query `[batch, queries]` and key `[batch, keys]`: other documents' keys are hidden.
    pub(crate) documents: Option<(&'a [u32], &'a [u32])>,
}
