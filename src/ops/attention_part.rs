//! Attention of some of a share's queries over some keys, as a part of a softmax over more: what ring attention computes in
//! each of its steps.
//!
//! A part is a range of queries and a range of keys; the kernels stride over them, so nothing is cut out or copied. Forward
//! gives an output and a log-sum-exp in f32, merged into what earlier parts gave ([`attention_merge`]); backward takes the
//! whole's output and log-sum-exp, from which every part of the gradients follows by itself: `p = e^(logit - lse)`,
//! `D = rowsum(do o)` (Dao et al. 2022, section 3.1; Liu et al. 2023, arXiv:2310.01889).

use super::attention::{heads, heads_mut};
use super::device::only_traced;
#[cfg(feature = "gpu")]
use super::device::{read, write};
use super::{Attention, Cost, traffic};
use crate::cpu::attention::{
    Heads, Merge, attention_backward, attention_forward, attention_merge, attention_scratch,
};
use crate::cpu::rows;
use crate::cpu::rows::parallel::{part, part_mut};
use crate::dtype::DType;
#[cfg(feature = "gpu")]
use crate::gpu;
use crate::tensor::{Tensor, TensorType};
use std::ops::Range;

/// Some queries against some keys. The mask of `op` counts from the first of each.
#[derive(Clone, Debug)]
pub(crate) struct AttentionPart {
    pub(crate) op: Attention,
    pub(crate) queries: Range<usize>,
    pub(crate) keys: Range<usize>,
}

/// Operands of [`AttentionPart`], whole: q [b, t, h, d], k and v [b, s, g, d], documents [b, t] and [b, s].
#[derive(Clone, Copy)]
pub(crate) struct Operands<'a> {
    pub(crate) q: &'a Tensor,
    pub(crate) k: &'a Tensor,
    pub(crate) v: &'a Tensor,
    pub(crate) documents: Option<[&'a Tensor; 2]>,
}

impl<'a> Operands<'a> {
    fn all(&self) -> impl Iterator<Item = &'a Tensor> + use<'a> {
        let documents = self.documents.into_iter().flatten();
        [self.q, self.k, self.v].into_iter().chain(documents)
    }
}

/// [b, range, ..] of a [b, t, ..].
fn range_of(ty: &TensorType, range: &Range<usize>) -> TensorType {
    let mut shape = ty.shape.clone();
    shape[1] = range.len();
    TensorType::new(shape, ty.dtype)
}

/// The heads of `x` from token `first` on.
fn heads_from(x: &Tensor, first: usize) -> Heads<'_> {
    let skip = first * x.shape()[2] * x.shape()[3];
    let all = heads(x.slice(), x.ty());
    let len = all.data.len();
    Heads {
        data: part(all.data, skip.min(len)..len),
        ..all
    }
}

/// Rows `range` of each of `rows` rows of `ids`.
fn cut_rows<T: Copy>(x: &[T], rows: usize, range: &Range<usize>) -> Vec<T> {
    let line = x.len() / rows.max(1);
    let cut = (0..rows).flat_map(|r| &x[r * line..][range.clone()]);
    cut.copied().collect()
}

impl AttentionPart {
    /// Types of the part's q, k and v.
    pub(crate) fn types(&self, q: &TensorType, k: &TensorType, v: &TensorType) -> [TensorType; 3] {
        [
            range_of(q, &self.queries),
            range_of(k, &self.keys),
            range_of(v, &self.keys),
        ]
    }

    /// Types of the part's output and log-sum-exp, from the whole's q and v.
    pub(crate) fn results(&self, q: &TensorType, v: &TensorType) -> [TensorType; 2] {
        let [b, _, h, _] = q.shape[..] else {
            unreachable!("attention checked that q has four axes")
        };
        let (t, d) = (self.queries.len(), v.shape[3]);
        [
            TensorType::new([b, t, h, d], DType::F32),
            TensorType::new([b, h, t], DType::F32),
        ]
    }

    /// Types of the part's gradients, of q, k and v.
    pub(crate) fn gradients(
        &self,
        q: &TensorType,
        k: &TensorType,
        v: &TensorType,
    ) -> [TensorType; 3] {
        self.types(q, k, v)
            .map(|ty| TensorType::new(ty.shape, DType::F32))
    }

    /// The cost of [`AttentionPart::forward`] or [`AttentionPart::backward`].
    pub(crate) fn cost(
        &self,
        q: &TensorType,
        k: &TensorType,
        v: &TensorType,
        backward: bool,
    ) -> Cost {
        let inputs = self.types(q, k, v);
        let [o, lse] = self.results(q, v);
        let pairs = self.op.pairs(self.queries.len(), self.keys.len());
        let heads = (q.shape[0] * q.shape[2]) as u64;
        let (dk, dv) = (q.shape[3] as u64, v.shape[3] as u64);
        let g = self.op.geometry(&inputs[0], &inputs[1], None);
        let scratch = attention_scratch(&g);
        // Forward: q k^T and p v. Backward: q k^T, ds k and ds^T q; do v^T and p^T do.
        let results = traffic(&[o.clone(), lse.clone()]);
        if backward {
            let gradients = self.gradients(q, k, v);
            Cost {
                flops: 2 * pairs * heads * (3 * dk + 2 * dv),
                bytes: traffic(&inputs) + results + o.bytes() + traffic(&gradients),
                scratch: scratch.1 as u64,
            }
        } else {
            Cost {
                flops: 2 * pairs * heads * (dk + dv),
                bytes: traffic(&inputs) + results,
                scratch: scratch.0 as u64,
            }
        }
    }

    fn documents(&self, x: &Operands) -> Option<[Vec<u32>; 2]> {
        let [of_q, of_k] = x.documents?;
        let rows = x.q.shape()[0];
        Some([
            cut_rows(of_q.slice().typed(), rows, &self.queries),
            cut_rows(of_k.slice().typed(), rows, &self.keys),
        ])
    }

    /// The part's output [b, queries, h, d] and log-sum-exp [b, h, queries].
    pub(crate) fn forward(&self, x: Operands, o: &mut Tensor, lse: &mut Tensor) {
        if only_traced(x.all(), [&*o, &*lse]) {
            return;
        }
        #[cfg(feature = "gpu")]
        if o.is_on_gpu() {
            return gpu::attention(&self.heads_gpu(&x), self.qkv_gpu(&x), write(o), write(lse));
        }
        let [q, k, _] = self.types(x.q.ty(), x.k.ty(), x.v.ty());
        let documents = self.documents(&x);
        let documents = documents.as_ref().map(|[q, k]| (&q[..], &k[..]));
        let ty = o.ty().clone();
        attention_forward(
            &self.op.geometry(&q, &k, documents),
            heads_from(x.q, self.queries.start),
            heads_from(x.k, self.keys.start),
            heads_from(x.v, self.keys.start),
            heads_mut(o.slice_mut(), &ty),
            lse.slice_mut().typed(),
        );
    }

    /// The part's gradients [b, queries, h, d], [b, keys, g, d] and [b, keys, g, d], from the whole's o, lse [b, h, t] and do.
    pub(crate) fn backward(
        &self,
        x: Operands,
        [o, lse, dout]: [&Tensor; 3],
        gradients: &mut [Tensor; 3],
    ) {
        if only_traced(x.all().chain([o, lse, dout]), &*gradients) {
            return;
        }
        #[cfg(feature = "gpu")]
        if gradients[0].is_on_gpu() {
            let kept = [
                cut_gpu(o, 1, &self.queries),
                cut_gpu(dout, 1, &self.queries),
                cut_gpu(lse, 2, &self.queries),
            ];
            let wanted = gradients.each_mut().map(|g| Some(write(g)));
            let (g, qkv) = (self.heads_gpu(&x), self.qkv_gpu(&x));
            return gpu::attention_backward(&g, qkv, kept, wanted);
        }
        let [q, k, _] = self.types(x.q.ty(), x.k.ty(), x.v.ty());
        let documents = self.documents(&x);
        let documents = documents.as_ref().map(|[q, k]| (&q[..], &k[..]));
        let lse = cut_rows(
            lse.slice().typed::<f32>(),
            q.shape[0] * q.shape[2],
            &self.queries,
        );
        let types = gradients.each_ref().map(|g| g.ty().clone());
        let [dq, dk, dv] = gradients;
        attention_backward(
            &self.op.geometry(&q, &k, documents),
            heads_from(x.q, self.queries.start),
            heads_from(x.k, self.keys.start),
            heads_from(x.v, self.keys.start),
            heads_from(o, self.queries.start),
            heads_from(dout, self.queries.start),
            &lse,
            heads_mut(dq.slice_mut(), &types[0]),
            heads_mut(dk.slice_mut(), &types[1]),
            heads_mut(dv.slice_mut(), &types[2]),
        );
    }
}

#[cfg(feature = "gpu")]
impl AttentionPart {
    fn heads_gpu(&self, x: &Operands) -> gpu::Heads {
        let [q, k, _] = self.types(x.q.ty(), x.k.ty(), x.v.ty());
        let documents = x.documents.map(|[of_q, of_k]| {
            [
                cut_gpu(of_q, 1, &self.queries),
                cut_gpu(of_k, 1, &self.keys),
            ]
        });
        self.op.heads_gpu(&q, &k, documents)
    }

    fn qkv_gpu(&self, x: &Operands) -> [gpu::Operand; 3] {
        [
            cut_gpu(x.q, 1, &self.queries),
            cut_gpu(x.k, 1, &self.keys),
            cut_gpu(x.v, 1, &self.keys),
        ]
    }
}

/// x with `range` of its axis `axis`. Shaders read tensors from their beginning, so that what is less than all is copied.
#[cfg(feature = "gpu")]
fn cut_gpu(x: &Tensor, axis: usize, range: &Range<usize>) -> gpu::Operand {
    let whole = read(x);
    if *range == (0..x.shape()[axis]) {
        return whole;
    }
    let line: usize = x.shape()[axis + 1..].iter().product();
    let blocks: usize = x.shape()[..axis].iter().product();
    let piece = gpu::Piece {
        inner: x.shape()[axis] * line,
        start: range.start * line,
        width: range.len() * line,
    };
    let part = whole.scratch_of(x.dtype(), blocks * piece.width);
    piece.take(whole, part.clone(), false);
    part
}

/// Merges the results of a part, from query `first` on, into o [b, t, h, d] and lse [b, h, t], all in f32.
pub(crate) fn merge_results(whole: &mut [Tensor; 2], part: &[Tensor; 2], first: usize) {
    if only_traced(part, &*whole) {
        return;
    }
    let [b, t, h, d] = whole[0].shape()[..] else {
        unreachable!("an output has four axes")
    };
    #[cfg(feature = "gpu")]
    if whole[0].is_on_gpu() {
        let merge = gpu::MergedPart {
            batch: b,
            heads: h,
            width: d,
            queries: t,
            first,
            part: part[0].shape()[1],
        };
        let part = part.each_ref().map(read);
        return gpu::attention_merge(merge, whole.each_mut().map(write), part);
    }
    let merge = Merge {
        batch: b,
        heads: h,
        width: d,
        queries: t,
        first,
        part: part[0].shape()[1],
    };
    let [o, lse] = whole;
    attention_merge(
        &merge,
        o.slice_mut().typed(),
        lse.slice_mut().typed(),
        part[0].slice().typed(),
        part[1].slice().typed(),
    );
}

/// Fills o [b, t, h, d] and lse [b, h, t] with what a query has that saw nothing yet.
pub(crate) fn begin_results(whole: &mut [Tensor; 2]) {
    if only_traced([], &*whole) {
        return;
    }
    #[cfg(feature = "gpu")]
    if whole[0].is_on_gpu() {
        gpu::fill(0.0, None, write(&mut whole[0]));
        return gpu::fill(f32::NEG_INFINITY, None, write(&mut whole[1]));
    }
    whole[0].slice_mut().typed::<f32>().fill(0.0);
    whole[1].slice_mut().typed::<f32>().fill(f32::NEG_INFINITY);
}

/// Adds a part [b, n, ..] to tokens `first .. first + n` of a gradient [b, t, ..], both in f32.
pub(crate) fn add_tokens(whole: &mut Tensor, more: &Tensor, first: usize) {
    if only_traced([more], [&*whole]) {
        return;
    }
    let line: usize = whole.shape()[2..].iter().product();
    let (batch, tokens, n) = (whole.shape()[0], whole.shape()[1], more.shape()[1]);
    #[cfg(feature = "gpu")]
    if whole.is_on_gpu() {
        let piece = gpu::Piece {
            inner: tokens * line,
            start: first * line,
            width: n * line,
        };
        return piece.put(read(more), write(whole), true);
    }
    for b in 0..batch {
        let mut all = whole.slice_mut();
        let from = (b * tokens + first) * line;
        let to = part_mut(&mut all, from..from + n * line);
        rows::add_assign(to, part(more.slice(), b * n * line..(b + 1) * n * line));
    }
}
