//! Scaled dot-product attention, tiled, with log-sum-exp kept for backward.
//!
//! Operands are laid out by tokens, [b, t, h, d]: that is what a product of [b, t, c] with a weight gives, and what the
//! next product takes, so heads are never transposed in memory; the kernel strides over them.

#[cfg(feature = "gpu")]
use super::device::{read, write};
use super::{Axes, Backward, Cost, Op, Saved, Site, misfit, traffic};
use crate::cpu::attention::{
    Geometry, Heads, HeadsMut, attention_backward, attention_forward, attention_scratch,
};
use crate::cpu::memory::with_scratch;
use crate::cpu::rows::parallel::{part, part_mut};
use crate::dtype::{DType, Slice, SliceMut};
#[cfg(feature = "gpu")]
use crate::gpu;
use crate::tensor::{Tensor, TensorType};
use std::sync::Arc;

/// `o = softmax(mask(cap(scale q k^T))) v` for each batch and head (Vaswani et al. 2017; tiled as Dao et al. 2022).
///
/// - q [b, t, h, d]; k, v [b, s, g, d], where g divides h: query head i uses key head `i / (h / g)` (Ainslie et al. 2023);
/// - with `documents`: the document of each query [b, t] and of each key [b, s] in u32; tokens see only their own;
/// - results: o [b, t, h, d] in the type of q, and the log-sum-exp [b, h, t] in f32, which backward reads.
///
/// Query t stands at position `offset + t`, key s at s. A query that sees nothing gives 0, its log-sum-exp is -inf and its
/// gradients are 0.
///
/// Fewer queries than keys continue a sequence whose keys were kept: with `offset` the number of keys before the first query.
/// One query row a key head, or up to 64, against more than 1024 keys: the keys are cut into chunks for the threads.
///
/// In f32 the result has the same bits on every instruction set and any number of threads. In bf16 on a processor whose AMX
/// unit may be used, or that multiplies pairs of bf16 fast (AVX512-BF16 on AMD), weights and the gradients of logits are rounded to
/// bf16 before the next product, and sums take the order of that unit: the same bits on any number of threads, but not those of
/// another processor. The environment variable `SUPERNODE_MATRIX_UNITS=off` leaves both out. A soft cap, or a scale that is not
/// positive, does without them.
///
/// Letters: `bThD,bShD,bShD,bT,bS->bThD,bhT`: batch and heads may be split. A single key head (g = 1 < h) stays whole
/// while h is split. Backward: `dv = p^T do`, `dp = do v^T`, `ds = p (dp - rowsum(do o))`, `dq = scale ds k`,
/// `dk = scale ds^T q`.
#[derive(Clone, Debug, Default)]
pub struct Attention {
    /// A query sees no later keys.
    pub causal: bool,
    /// A query sees only keys less than this many positions away.
    pub window: Option<usize>,
    /// Position of the first query.
    pub offset: usize,
    /// Position of the first query of each sequence \[b\], in place of `offset`: sequences of a cache are of different lengths.
    /// Without backward.
    pub offsets: Option<Arc<[usize]>>,
    /// What multiplies q k^T; `1 / sqrt(d)` if none.
    pub scale: Option<f32>,
    /// c, which turns a logit l into `c tanh(l / c)`, before the mask (Gemma 2, 2024).
    pub soft_cap: Option<f32>,
    /// Two more operands name documents.
    pub documents: bool,
}

impl Attention {
    pub(super) fn geometry<'a>(
        &self,
        q: &TensorType,
        k: &TensorType,
        documents: Option<(&'a [u32], &'a [u32])>,
    ) -> Geometry<'a> {
        Geometry {
            batch: q.shape[0],
            heads: q.shape[2],
            kv_heads: k.shape[2],
            queries: q.shape[1],
            keys: k.shape[1],
            head_dim: q.shape[3],
            scale: self.scale.unwrap_or(1.0 / (q.shape[3] as f32).sqrt()),
            soft_cap: self.soft_cap,
            causal: self.causal,
            window: self.window,
            offset: self.offset,
            documents,
        }
    }

    /// How many (query, key) pairs one head of one sequence computes; documents are not looked at.
    pub fn pairs(&self, queries: usize, keys: usize) -> u64 {
        // Query t, at position p = offset + t, sees keys low(p) .. high(p): both are p plus a constant, cut to 0..=keys.
        let below = |shift: i128| clamped_sum(self.offset as i128 + shift, queries, keys);
        let everything = queries as u64 * keys as u64;
        match (self.causal, self.window) {
            (false, None) => everything,
            (true, None) => below(1),
            (true, Some(w)) => below(1) - below(1 - (w as i128).min(i64::MAX as i128)),
            (false, Some(w)) => {
                let w = (w as i128).min(i64::MAX as i128);
                if w == 0 { 0 } else { below(w) - below(1 - w) }
            }
        }
    }

    /// Pairs of one head of `batch` sequences; of sequences with positions of their own the mean share, rounded up.
    fn pairs_of(&self, batch: usize, queries: usize, keys: usize) -> u64 {
        let Some(offsets) = &self.offsets else {
            return batch as u64 * self.pairs(queries, keys);
        };
        let of = |offset: &usize| self.at(*offset).pairs(queries, keys);
        let all: u64 = offsets.iter().map(of).sum();
        (all * batch as u64).div_ceil(offsets.len().max(1) as u64)
    }

    /// The same for one sequence whose first query stands at `offset`.
    fn at(&self, offset: usize) -> Self {
        Attention {
            offset,
            offsets: None,
            ..self.clone()
        }
    }

    fn products(&self, inputs: &[TensorType]) -> u64 {
        let (q, k) = (&inputs[0], &inputs[1]);
        let pairs = self.pairs_of(q.shape[0], q.shape[1], k.shape[1]);
        2 * pairs * (q.shape[2] * q.shape[3]) as u64
    }

    /// Each sequence by itself, at its own position.
    fn forward_apart(
        &self,
        offsets: &[usize],
        inputs: &[&Tensor],
        o: &mut Tensor,
        lse: &mut Tensor,
    ) {
        let (q, k) = (inputs[0].ty().clone(), inputs[1].ty().clone());
        let one = |ty: &TensorType| TensorType::new([&[1][..], &ty.shape[1..]].concat(), ty.dtype);
        let (one_q, one_k) = (one(&q), one(&k));
        let [rows_q, rows_k] = [&one_q, &one_k].map(TensorType::elements);
        let rows_lse = q.shape[1] * q.shape[2];
        let cut =
            |i: usize, b: usize, rows: usize| part(inputs[i].slice(), b * rows..(b + 1) * rows);
        let (mut o, lse) = (o.slice_mut(), lse.slice_mut().typed::<f32>());
        for (b, &offset) in offsets.iter().enumerate() {
            attention_forward(
                &self.at(offset).geometry(&one_q, &one_k, None),
                heads(cut(0, b, rows_q), &one_q),
                heads(cut(1, b, rows_k), &one_k),
                heads(cut(2, b, rows_k), &one_k),
                heads_mut(part_mut(&mut o, b * rows_q..(b + 1) * rows_q), &one_q),
                &mut lse[b * rows_lse..(b + 1) * rows_lse],
            );
        }
    }
}

/// `sum over t < n of (x + t) cut to 0..=most`.
fn clamped_sum(x: i128, n: usize, most: usize) -> u64 {
    let (n, most) = (n as i128, most as i128);
    // The terms from `first` on are positive, those from `full` on are cut to `most`.
    let first = (-x).clamp(0, n);
    let full = (most - x).clamp(first, n);
    let rising = full - first;
    let sum = rising * (x + first) + rising * (rising - 1) / 2 + (n - full) * most;
    sum as u64
}

/// Strides of [b, t, h, d] by (b, h, t).
pub(super) fn heads<'a>(data: Slice<'a>, ty: &TensorType) -> Heads<'a> {
    Heads {
        data,
        strides: strides(ty),
    }
}

pub(super) fn heads_mut<'a>(data: SliceMut<'a>, ty: &TensorType) -> HeadsMut<'a> {
    HeadsMut {
        data,
        strides: strides(ty),
    }
}

fn strides(ty: &TensorType) -> [usize; 3] {
    let [_, t, h, d] = ty.shape[..] else {
        unreachable!("infer wants four axes")
    };
    [t * h * d, d, h * d]
}

#[cfg(feature = "gpu")]
impl Attention {
    pub(super) fn heads_gpu(
        &self,
        q: &TensorType,
        k: &TensorType,
        documents: Option<[gpu::Operand; 2]>,
    ) -> gpu::Heads {
        let g = self.geometry(q, k, None);
        gpu::Heads {
            batch: g.batch,
            heads: g.heads,
            kv_heads: g.kv_heads,
            queries: g.queries,
            keys: g.keys,
            head_dim: g.head_dim,
            scale: g.scale,
            soft_cap: g.soft_cap,
            causal: g.causal,
            window: g.window,
            offset: g.offset,
            offsets: None,
            documents,
        }
    }
}

impl Op for Attention {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let wrong = |wants: &str| Err(misfit("attention", wants, inputs));
        if inputs.len() != if self.documents { 5 } else { 3 } {
            return wrong(if self.documents {
                "q, k, v and the documents of queries and keys"
            } else {
                "q, k and v"
            });
        }
        let (q, k, v) = (&inputs[0], &inputs[1], &inputs[2]);
        if ![q, k, v]
            .iter()
            .all(|x| x.rank() == 4 && x.dtype.is_float())
        {
            return wrong("floats: q [b, t, h, d], k and v [b, s, g, d]");
        }
        if k.shape != v.shape || q.shape[0] != k.shape[0] || q.shape[3] != k.shape[3] {
            return wrong("k and v of one shape, with the batch and head size of q");
        }
        if k.shape[2] == 0 || !q.shape[2].is_multiple_of(k.shape[2]) {
            return wrong("a number of key heads that divides the query heads");
        }
        if q.shape[3] == 0 || q.shape[3] > 256 {
            return wrong("a head size from 1 to 256");
        }
        if self.documents {
            let ids = |of: &TensorType, ids: &TensorType| {
                ids.dtype == DType::U32 && ids.shape == of.shape[..2]
            };
            if !ids(q, &inputs[3]) || !ids(k, &inputs[4]) {
                return wrong("documents in u32: [b, t] for q and [b, s] for k");
            }
        }
        if let Some(offsets) = &self.offsets
            && (offsets.len() != q.shape[0] || self.documents)
        {
            return wrong(&format!(
                "as many sequences as positions, {}, and no documents beside them",
                offsets.len()
            ));
        }
        let lse = TensorType::new([q.shape[0], q.shape[2], q.shape[1]], DType::F32);
        Ok(vec![q.clone(), lse])
    }

    fn axes(&self, inputs: &[TensorType]) -> Axes {
        let shared = inputs[1].shape[2] == 1 && inputs[0].shape[2] > 1;
        let kv = if shared { "bSGD" } else { "bShD" };
        let documents = if self.documents { ",bT,bS" } else { "" };
        Axes::new(&format!("bThD,{kv},{kv}{documents}->bThD,bhT"))
    }

    fn cost(&self, inputs: &[TensorType], outputs: &[TensorType]) -> Cost {
        let g = self.geometry(&inputs[0], &inputs[1], None);
        // Of a cache only what some query may see is read.
        let unseen = self.offsets.as_ref().map_or(0, |offsets| {
            let seen = offsets.iter().max().map_or(0, |o| o + inputs[0].shape[1]);
            let keys = inputs[1].shape[1];
            let unseen = keys.saturating_sub(seen) as u64;
            traffic(&inputs[1..3]) / keys.max(1) as u64 * unseen
        });
        Cost {
            flops: 2 * self.products(inputs),
            bytes: traffic(inputs) + traffic(outputs) - unseen,
            scratch: attention_scratch(&g).0 as u64,
        }
    }

    fn forward(&self, site: &Site, inputs: &[&Tensor], outputs: &mut [Tensor]) {
        let [o, lse] = outputs else {
            unreachable!("infer gives two results")
        };
        if let Some(offsets) = &self.offsets {
            let first = site.inputs[0].start[0];
            let mine = &offsets[first..first + inputs[0].shape()[0]];
            return self.forward_apart(mine, inputs, o, lse);
        }
        let documents = self
            .documents
            .then(|| (inputs[3].slice().typed(), inputs[4].slice().typed()));
        let (q, k, v) = (inputs[0], inputs[1], inputs[2]);
        attention_forward(
            &self.geometry(q.ty(), k.ty(), documents),
            heads(q.slice(), q.ty()),
            heads(k.slice(), k.ty()),
            heads(v.slice(), v.ty()),
            heads_mut(o.slice_mut(), q.ty()),
            lse.slice_mut().typed(),
        );
    }

    fn saves(&self) -> Saved {
        Saved::ALL
    }

    fn differentiable(&self, i: usize) -> bool {
        i < 3
    }

    fn backward_cost(
        &self,
        inputs: &[TensorType],
        outputs: &[TensorType],
        wanted: &[bool],
    ) -> Cost {
        let g = self.geometry(&inputs[0], &inputs[1], None);
        let unwanted = inputs.iter().zip(wanted).take(3).filter(|(_, w)| !**w);
        let unwanted: u64 = unwanted.map(|(t, _)| t.allocated_bytes()).sum();
        Cost {
            flops: 5 * self.products(inputs),
            bytes: traffic(inputs) + traffic(outputs) + outputs[0].bytes() + traffic(&inputs[..3]),
            scratch: attention_scratch(&g).1 as u64 + unwanted,
        }
    }

    fn backward(&self, _: &Site, backward: &mut Backward) {
        assert!(
            self.offsets.is_none(),
            "attention of sequences at positions of their own is for inference; it has no backward"
        );
        let dout = backward.only_gradient("attention");
        let (q, k, v) = (backward.input(0), backward.input(1), backward.input(2));
        let (o, lse) = (backward.output(0), backward.output(1));
        let documents = self.documents.then(|| {
            (
                backward.input(3).slice().typed(),
                backward.input(4).slice().typed(),
            )
        });
        let [dq, dk, dv, ..] = backward.wanted else {
            unreachable!("infer wants three operands")
        };
        or_scratch(dq, q.ty(), |dq| {
            or_scratch(dk, k.ty(), |dk| {
                or_scratch(dv, v.ty(), |dv| {
                    attention_backward(
                        &self.geometry(q.ty(), k.ty(), documents),
                        heads(q.slice(), q.ty()),
                        heads(k.slice(), k.ty()),
                        heads(v.slice(), v.ty()),
                        heads(o.slice(), o.ty()),
                        heads(dout.slice(), dout.ty()),
                        lse.slice().typed(),
                        heads_mut(dq, q.ty()),
                        heads_mut(dk, k.ty()),
                        heads_mut(dv, v.ty()),
                    );
                });
            });
        });
    }

    #[cfg(feature = "gpu")]
    fn forward_gpu(&self, site: &Site, inputs: &[&Tensor], outputs: &mut [Tensor]) {
        let [o, lse] = outputs else {
            unreachable!("infer gives two results")
        };
        let documents = self.documents.then(|| [read(inputs[3]), read(inputs[4])]);
        let mut g = self.heads_gpu(inputs[0].ty(), inputs[1].ty(), documents);
        let qkv = [0, 1, 2].map(|i| read(inputs[i]));
        if let Some(offsets) = &self.offsets {
            let first = site.inputs[0].start[0];
            let mine = &offsets[first..first + g.batch];
            // Positions are 32-bit in WGSL; no cache is longer than the least of these.
            let mine: Vec<u32> = mine.iter().map(|&o| o.min(1 << 30) as u32).collect();
            g.offsets = Some(gpu::table(&qkv[0].chip, DType::U32, &mine));
        }
        gpu::attention(&g, qkv, write(o), write(lse));
    }

    #[cfg(feature = "gpu")]
    fn backward_gpu(&self, _: &Site, backward: &mut Backward) {
        assert!(
            self.offsets.is_none(),
            "attention of sequences at positions of their own is for inference; it has no backward"
        );
        let dout = read(backward.only_gradient("attention"));
        let documents = self
            .documents
            .then(|| [read(backward.input(3)), read(backward.input(4))]);
        let g = self.heads_gpu(backward.input(0).ty(), backward.input(1).ty(), documents);
        let qkv = [0, 1, 2].map(|i| read(backward.input(i)));
        let kept = [read(backward.output(0)), dout, read(backward.output(1))];
        let wanted = [0, 1, 2].map(|i| backward.want(i).map(|g| g.operand().0));
        gpu::attention_backward(&g, qkv, kept, wanted);
    }
}

/// The gradient's elements; scratch of the operand's type if it is not wanted, because the kernel writes all three.
fn or_scratch(
    gradient: &mut Option<super::Gradient>,
    operand: &TensorType,
    f: impl FnOnce(SliceMut),
) {
    match gradient {
        Some(gradient) => f(gradient.tensor.slice_mut()),
        None => with_scratch(operand.bytes() as usize, |bytes| {
            f(SliceMut::of_bytes(bytes, operand.dtype));
        }),
    }
}
