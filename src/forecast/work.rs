//! What a chip has to do, in the sizes that a price depends on.
//!
//! Work comes from a traced [`Event`] or, for splits that no program here runs yet, from [`super::program`]: both are priced
//! by the same functions.
//!
//! Axes are named as in the mesh. `cp[..4]` are the blocks of 4 neighbours along `cp`, `cp[4..]` the chips at the same place of
//! these blocks.

use crate::collective::Kind;
use crate::trace::{Event, EventKind};

/// The class of a kernel that streams through memory; each has its measured share of the bandwidth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rows {
    /// Sums, dropout, casts, copies.
    Elementwise,
    /// Softmax over scores, and a loss over logits: a row's maximum, exponentials, their sum, the division.
    Softmax,
    /// Clipping, AdamW.
    Optimizer,
    /// LayerNorm and RMSNorm.
    Norm,
    /// Activations that multiply by a gate: SwiGLU and its like.
    Activation,
    /// GELU and its like: a value in and one out, as in any element-wise kernel.
    Gelu,
}

/// One kernel or transfer.
#[derive(Clone, Debug, PartialEq)]
pub enum Work {
    /// `batch` products [m, k] by [k, n] of elements of this many bytes.
    Matmul {
        /// Products.
        batch: usize,
        /// Rows of the result.
        m: usize,
        /// Columns of the result.
        n: usize,
        /// Summands.
        k: usize,
        /// Bytes of an element.
        size: f64,
    },
    /// Fused attention.
    Attention {
        /// Operations that it must do.
        flops: f64,
        /// Bytes read and written.
        bytes: f64,
        /// Whether it computes gradients.
        backward: bool,
    },
    /// A kernel that streams.
    Stream {
        /// Its class.
        rows: Rows,
        /// Bytes read and written.
        bytes: f64,
    },
    /// A collective over a mesh axis.
    Collective {
        /// Which.
        kind: Kind,
        /// The axis, or several joined by `+`.
        axis: String,
        /// Bytes of the whole tensor: what an all-reduce reduces, what an all-gather leaves behind.
        bytes: f64,
    },
    /// Shares of a tensor that travel once round a ring, from neighbour to neighbour.
    Ring {
        /// The axis.
        axis: String,
        /// Bytes of all shares.
        bytes: f64,
    },
    /// Tokens that every chip sends to the chips of their experts, or gets back from them.
    Exchange {
        /// The axis, or several joined by `+`.
        axis: String,
        /// Tokens that a chip sends.
        tokens: f64,
        /// Experts that a token visits.
        copies: usize,
        /// Bytes of a token.
        token_bytes: f64,
        /// Groups of experts, and how many of them a token may visit.
        groups: (usize, usize),
        /// Whether elements are narrower than 2 bytes.
        narrow: bool,
    },
    /// A message to a neighbour on a mesh axis.
    Message {
        /// The axis.
        axis: String,
        /// Bytes sent.
        bytes: f64,
    },
}

impl Work {
    /// One product of narrow (2-byte) elements.
    pub fn matmul(m: usize, n: usize, k: usize) -> Work {
        let (batch, size) = (1, 2.0);
        Work::Matmul {
            batch,
            m,
            n,
            k,
            size,
        }
    }

    /// Operations that the work must do.
    pub fn flops(&self) -> f64 {
        match self {
            Work::Matmul { batch, m, n, k, .. } => {
                2.0 * *batch as f64 * *m as f64 * *n as f64 * *k as f64
            }
            Work::Attention { flops, .. } => *flops,
            _ => 0.0,
        }
    }

    /// The name under which its seconds are reported.
    pub fn name(&self) -> &'static str {
        match self {
            Work::Matmul { .. } => "matmul",
            Work::Attention { .. } => "attention",
            Work::Stream {
                rows: Rows::Elementwise,
                ..
            } => "elementwise",
            Work::Stream {
                rows: Rows::Optimizer,
                ..
            } => "optimizer",
            Work::Stream {
                rows: Rows::Norm, ..
            } => "norm",
            Work::Stream {
                rows: Rows::Softmax,
                ..
            } => "softmax",
            Work::Stream {
                rows: Rows::Activation | Rows::Gelu,
                ..
            } => "activation",
            Work::Collective { kind, .. } => kind.name(),
            Work::Ring { .. } => "ring",
            Work::Exchange { .. } => "exchange",
            Work::Message { .. } => "message",
        }
    }

    /// The axis over which it moves something, if it does.
    pub fn axis(&self) -> Option<&str> {
        match self {
            Work::Collective { axis, .. }
            | Work::Ring { axis, .. }
            | Work::Exchange { axis, .. }
            | Work::Message { axis, .. } => Some(axis),
            _ => None,
        }
    }

    /// What an event of a trace amounts to: one or two pieces of work (the gradients of a product are two products), none for
    /// a wait.
    pub fn of_event(event: &Event) -> Vec<Work> {
        if let Some(t) = &event.traffic {
            let axis = match t.stride {
                None => t.axis.clone(),
                Some(1) => format!("{}[..{}]", t.axis, t.chips),
                Some(stride) => format!("{}[{stride}..]", t.axis),
            };
            let n = t.chips as f64;
            return match t.collective {
                _ if event.kind == EventKind::Wait => vec![],
                None => vec![Work::Message {
                    axis,
                    bytes: t.bytes as f64,
                }],
                Some((kind, ..)) => {
                    // From what the best algorithm sends to the whole tensor.
                    let share = match kind {
                        Kind::AllReduce => 2.0 * (n - 1.0) / n,
                        Kind::Shift => 1.0 / n,
                        _ => (n - 1.0) / n,
                    };
                    let bytes = if n > 1.0 {
                        t.floor_bytes as f64 / share
                    } else {
                        0.0
                    };
                    vec![Work::Collective { kind, axis, bytes }]
                }
            };
        }
        if event.kind != EventKind::Op {
            return vec![];
        }
        let name = event.op.trim_end_matches(".backward");
        match name {
            "matmul" => matmuls(event),
            "attention" => {
                vec![Work::Attention {
                    flops: event.flops as f64,
                    bytes: event.bytes as f64,
                    backward: event.op.ends_with(".backward"),
                }]
            }
            _ => {
                let rows = match name {
                    "layer_norm" | "rms_norm" => Rows::Norm,
                    "adamw" | "sgd" => Rows::Optimizer,
                    "swiglu" | "activation" => Rows::Activation,
                    "gelu" | "gelu_tanh" => Rows::Gelu,
                    "softmax" | "cross_entropy" | "row_max" | "row_exp_sum" => Rows::Softmax,
                    "cross_entropy_from_statistics" => Rows::Softmax,
                    _ => Rows::Elementwise,
                };
                vec![Work::Stream {
                    rows,
                    bytes: event.bytes as f64,
                }]
            }
        }
    }
}

/// The products of a traced matmul, from its operands' shapes: all but the last dimension of the first are rows; the result's width, or
/// the size of the weight's gradient, gives the columns. Its operations would not: a bias and an activation are among them.
fn matmuls(event: &Event) -> Vec<Work> {
    let elements = |v: &crate::trace::Value| v.ty.shape.iter().product::<usize>();
    let width = |v: &crate::trace::Value| v.ty.shape.last().copied().unwrap_or(1).max(1);
    let Some(first) = event.inputs.first() else {
        return vec![];
    };
    let size = first.ty.dtype.size() as f64;
    let k = width(first);
    let rows = elements(first) / k;
    let one = |m, n, k| Work::Matmul {
        batch: 1,
        m,
        n,
        k,
        size,
    };
    if !event.op.ends_with(".backward") {
        let n = event.outputs.first().map_or(1, width);
        return vec![one(rows, n, k)];
    }
    let n = match event.outputs.get(1) {
        Some(weight) => elements(weight) / k,
        None => (event.flops as f64 / (4.0 * rows as f64 * k as f64)).round() as usize,
    };
    vec![one(rows, k, n.max(1)), one(k, n.max(1), rows)]
}
