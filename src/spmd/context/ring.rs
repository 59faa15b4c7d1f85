//! The steps around the ring. In step s the chip of index a holds the keys of the chip of index a - s.

use super::Shares;
use super::parts::parts;
use crate::dtype::{DType, TensorType};
use crate::ops::attention_part::{self, AttentionPart, Operands, add_tokens, merge_results};
use crate::ops::{Cost, device};
use crate::spmd::Chip;
use crate::spmd::apply::Told;
use crate::spmd::started::Passing;
use crate::tensor::Tensor;
use crate::trace::{EventKind, Stream, Value};
use std::ops::Range;

/// What the backward reads, heads and tokens as the ring has them.
pub(super) struct Kept {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Option<Tensor>,
    o: Tensor,
    lse: Tensor,
}

/// What travels: keys, values, and the keys' documents.
pub(super) struct Keys {
    pub(super) k: Tensor,
    pub(super) v: Tensor,
    pub(super) documents: Option<Tensor>,
}

impl Keys {
    fn pass_on(&self, shares: &Shares, chip: &Chip, source: usize) -> Vec<Passing> {
        let all = [&self.k, &self.v].into_iter().chain(&self.documents);
        all.map(|x| shares.pass_on(chip, x.clone(), source))
            .collect()
    }

    fn arrive(moving: Vec<Passing>, chip: &Chip) -> Self {
        let mut all = moving.into_iter().map(|m| m.wait(chip));
        let mut next = || all.next().expect("keys and values were passed on");
        Keys {
            k: next(),
            v: next(),
            documents: all.next(),
        }
    }
}

impl Shares {
    /// The chip's o, by tokens, and what the backward needs.
    pub(super) fn forward(&self, chip: &Chip, operands: &[Tensor]) -> (Tensor, Kept) {
        let [q, k, v] = [0, 1, 2].map(|i| self.to_heads(chip, operands[i].clone()));
        let documents = operands
            .get(3)
            .map(|x| self.documents_of_block(chip, x.clone()));
        let (ring, here) = (self.across.size(), self.across.index());
        let mut keys = Keys {
            k: k.clone(),
            v: v.clone(),
            documents: documents.clone(),
        };
        let mut whole: Option<[Tensor; 2]> = None;
        for step in 0..ring {
            let source = (here + ring - step) % ring;
            let moving = (step + 1 < ring).then(|| keys.pass_on(self, chip, source));
            for part in parts(&self.op, &self.runs(here), &self.runs(source), step == 0) {
                let results = self.compute(chip, &part, &q, &keys, documents.as_ref());
                self.merge(chip, &mut whole, results, &part, &q);
            }
            if let Some(moving) = moving {
                keys = Keys::arrive(moving, chip);
            }
        }
        drop(keys);
        let [o, lse] = whole.unwrap_or_else(|| self.nothing(chip, &q, &v));
        let o = self.narrow(chip, o, q.dtype());
        let out = self.to_tokens(chip, o.clone());
        let kept = Kept {
            q,
            k,
            v,
            documents,
            o,
            lse,
        };
        (out, kept)
    }

    /// `x` in the type of the operands.
    pub(super) fn narrow(&self, chip: &Chip, x: Tensor, dtype: DType) -> Tensor {
        if x.dtype() == dtype {
            return x;
        }
        let ty = TensorType::new(x.shape(), dtype);
        let mut y = chip.allocate(&ty);
        let began = chip.now();
        device::cast(&x, &mut y);
        let cost = Cost {
            flops: 0,
            bytes: x.ty().bytes() + ty.bytes(),
            scratch: 0,
        };
        self.tell(chip, "cast", &[x.ty().clone()], &[ty], cost, began);
        y
    }

    /// Results of queries that see nothing.
    pub(super) fn nothing(&self, chip: &Chip, q: &Tensor, v: &Tensor) -> [Tensor; 2] {
        let all = AttentionPart {
            op: self.op.clone(),
            queries: 0..q.shape()[1],
            keys: 0..0,
        };
        let mut whole = all.results(q.ty(), v.ty()).map(|ty| chip.allocate(&ty));
        attention_part::begin_results(&mut whole);
        whole
    }

    pub(super) fn compute(
        &self,
        chip: &Chip,
        part: &AttentionPart,
        q: &Tensor,
        keys: &Keys,
        documents: Option<&Tensor>,
    ) -> [Tensor; 2] {
        let (k, v) = (&keys.k, &keys.v);
        let mut results = part.results(q.ty(), v.ty()).map(|ty| chip.allocate(&ty));
        let began = chip.now();
        let operands = Operands {
            q,
            k,
            v,
            documents: documents.zip(keys.documents.as_ref()).map(|(q, k)| [q, k]),
        };
        let [o, lse] = &mut results;
        part.forward(operands, o, lse);
        let types = part.types(q.ty(), k.ty(), v.ty());
        let cost = part.cost(q.ty(), k.ty(), v.ty(), false);
        self.tell(chip, "attention", &types, &types_of(&results), cost, began);
        results
    }

    /// Merges a part's results into those of the parts before it.
    pub(super) fn merge(
        &self,
        chip: &Chip,
        whole: &mut Option<[Tensor; 2]>,
        results: [Tensor; 2],
        part: &AttentionPart,
        q: &Tensor,
    ) {
        if whole.is_none() && part.queries == (0..q.shape()[1]) {
            *whole = Some(results);
            return;
        }
        let whole = match whole {
            Some(whole) => whole,
            // Any tensor of the values' head size will do for the shape of o.
            None => whole.insert(self.nothing(chip, q, &results[0])),
        };
        let began = chip.now();
        merge_results(whole, &results, part.queries.start);
        let types = types_of(&results);
        let read: u64 = types.iter().map(TensorType::bytes).sum();
        let cost = Cost {
            flops: 3 * results[0].elements() as u64 + 12 * results[1].elements() as u64,
            bytes: 3 * read,
            scratch: 2 * types[1].bytes(),
        };
        self.tell(chip, "attention.merge", &types, &types, cost, began);
    }

    /// Gradients of q, k and v in f32, heads and tokens as the ring has them, from that of o by tokens.
    pub(super) fn backward(&self, chip: &Chip, kept: Kept, dout: Tensor) -> [Tensor; 3] {
        let dout = self.to_heads(chip, dout);
        let (ring, here) = (self.across.size(), self.across.index());
        let Kept {
            q,
            k,
            v,
            documents,
            o,
            lse,
        } = kept;
        let kinds = [k.ty().clone(), v.ty().clone()];
        let mut keys = Keys {
            k,
            v,
            documents: documents.clone(),
        };
        let mut dq: Option<Tensor> = None;
        let mut own: [Option<Tensor>; 2] = [None, None];
        let mut travelling: Vec<Passing> = vec![];
        for step in 0..ring {
            let source = (here + ring - step) % ring;
            let moving = (step + 1 < ring).then(|| keys.pass_on(self, chip, source));
            let results = [&o, &lse, &dout];
            let mut computed = Vec::new();
            for part in parts(&self.op, &self.runs(here), &self.runs(source), step == 0) {
                let [d_q, d_k, d_v] =
                    self.compute_gradients(chip, &part, &q, &keys, documents.as_ref(), results);
                self.add(chip, &mut dq, d_q, q.ty(), &part.queries);
                computed.push((part.keys, [d_k, d_v]));
            }
            // What the chips before this one have added to the gradients of these keys.
            let mut sums = [None, None];
            for (sum, moving) in sums.iter_mut().zip(std::mem::take(&mut travelling)) {
                *sum = Some(moving.wait(chip));
            }
            let types = kinds.each_ref().map(|ty| self.gradient_of(ty, source));
            for (range, parts) in computed {
                for ((sum, part), ty) in sums.iter_mut().zip(parts).zip(&types) {
                    self.add(chip, sum, part, ty, &range);
                }
            }
            if step == 0 {
                own = sums;
            } else {
                travelling = sums
                    .into_iter()
                    .zip(&types)
                    .map(|(sum, ty)| {
                        let sum = sum.unwrap_or_else(|| self.zeros(chip, ty));
                        self.pass_on(chip, sum, source)
                    })
                    .collect();
            }
            if let Some(moving) = moving {
                keys = Keys::arrive(moving, chip);
            }
        }
        drop(keys);
        let types = kinds.each_ref().map(|ty| self.gradient_of(ty, here));
        let home = travelling.into_iter().map(|m| Some(m.wait(chip)));
        let mut home: Vec<Option<Tensor>> = home.chain([None, None]).take(2).collect();
        for ((sum, own), ty) in home.iter_mut().zip(own).zip(&types) {
            if let Some(own) = own {
                self.add(chip, sum, own, ty, &(0..ty.shape[1]));
            }
        }
        let dq = dq.unwrap_or_else(|| self.zeros(chip, &TensorType::new(q.shape(), DType::F32)));
        let mut rest = home.into_iter().zip(&types);
        let mut next = || {
            let (sum, ty) = rest.next().expect("keys and values have a gradient each");
            sum.unwrap_or_else(|| self.zeros(chip, ty))
        };
        [dq, next(), next()]
    }

    fn compute_gradients(
        &self,
        chip: &Chip,
        part: &AttentionPart,
        q: &Tensor,
        keys: &Keys,
        documents: Option<&Tensor>,
        results: [&Tensor; 3],
    ) -> [Tensor; 3] {
        let (k, v) = (&keys.k, &keys.v);
        let types = part.gradients(q.ty(), k.ty(), v.ty());
        let mut gradients = types.each_ref().map(|ty| chip.allocate(ty));
        let began = chip.now();
        let operands = Operands {
            q,
            k,
            v,
            documents: documents.zip(keys.documents.as_ref()).map(|(q, k)| [q, k]),
        };
        part.backward(operands, results, &mut gradients);
        let [dout, _] = part.results(q.ty(), v.ty());
        let cost = part.cost(q.ty(), k.ty(), v.ty(), true);
        self.tell(chip, "attention.backward", &[dout], &types, cost, began);
        gradients
    }

    /// Adds a part of a gradient at tokens `range` to what is there.
    fn add(
        &self,
        chip: &Chip,
        sum: &mut Option<Tensor>,
        part: Tensor,
        whole: &TensorType,
        range: &Range<usize>,
    ) {
        if sum.is_none() && *range == (0..whole.shape[1]) {
            *sum = Some(part);
            return;
        }
        let sum = match sum {
            Some(sum) => sum,
            None => {
                let ty = TensorType::new(whole.shape.clone(), DType::F32);
                sum.insert(self.zeros(chip, &ty))
            }
        };
        let began = chip.now();
        add_tokens(sum, &part, range.start);
        let ty = part.ty().clone();
        let cost = Cost {
            flops: ty.elements() as u64,
            bytes: 3 * ty.bytes(),
            scratch: 0,
        };
        self.tell(
            chip,
            "accumulate",
            &[ty.clone(), ty.clone()],
            &[ty],
            cost,
            began,
        );
    }

    fn zeros(&self, chip: &Chip, ty: &TensorType) -> Tensor {
        let mut tensor = chip.allocate(ty);
        device::clear(&mut tensor);
        tensor
    }

    pub(super) fn tell(
        &self,
        chip: &Chip,
        op: &str,
        inputs: &[TensorType],
        outputs: &[TensorType],
        cost: Cost,
        began: Option<u64>,
    ) {
        let values = |types: &[TensorType]| {
            let value = |ty: &TensorType| Value {
                ty: ty.clone(),
                placement: self.placements.clone(),
            };
            types.iter().map(value).collect()
        };
        chip.tell(Told {
            kind: EventKind::Op,
            op: op.into(),
            site: self.site,
            inputs: values(inputs),
            outputs: values(outputs),
            cost,
            traffic: None,
            stream: Stream::Compute,
            ticket: None,
            began,
        });
    }
}

pub(super) fn types_of(tensors: &[Tensor; 2]) -> [TensorType; 2] {
    tensors.each_ref().map(|x| x.ty().clone())
}
