//! Attention of new queries over a cache of keys and values whose tokens the chips of an axis share (flash-decoding, Dao et al.
//! 2023, over chips): each chip attends over its own tokens, and the parts of the softmax are merged on every chip by their
//! log-sum-exp, in the order of the chips.
//!
//! With q [b, t, h, d] on P chips a chip sends its part, b t h (d + 1) numbers in f32, to each of the others: nothing that grows
//! with the text.

use super::Shares;
use super::ring::{Keys, types_of};
use crate::collective::{Counts, Kind, Reduce};
use crate::dtype::{DType, TensorType};
use crate::ops::Attention;
use crate::ops::Op;
use crate::ops::attention_part::AttentionPart;
use crate::placement::Placement::{Replicate, Shard};
use crate::placement::{Placements, TokenOrder, splits_evenly};
use crate::spmd::cut::{in_a_row, out_of_a_row};
use crate::spmd::redistribute::Request;
use crate::spmd::resolve::resolve;
use crate::spmd::{Chip, Sharded};
use crate::tensor::Tensor;
use std::panic::Location;

impl Chip {
    /// [`Attention`] of q [b, t, h, d], which every chip of `axis` has, over k and v [b, s, g, d] split by tokens over the axis
    /// ([`Chip::cached_share`]): over the first `used` tokens of each chip's share, which may differ from chip to chip. With
    /// [`Attention::documents`] also the documents of queries [b, t] and keys [b, s] in u32, which hide what is not to be seen.
    /// Gives o [b, t, h, d], placed as q is.
    ///
    /// Parts are merged in f32 in the order of the chips, so that all chips of the axis have the same bits.
    ///
    /// # Panics
    /// If shapes or placements do not fit; for a causal mask, a window or offsets: slots of a share are in no order. While
    /// recording: there is no backward.
    #[track_caller]
    pub fn attention_over_shares(
        &self,
        op: &Attention,
        operands: &[&Sharded],
        axis: &str,
        used: usize,
    ) -> Sharded {
        let site = Location::caller();
        self.arrive("attention", site);
        let refuse = |why: String| -> ! {
            panic!("attention over shares of a cache: {why} (called at {site})")
        };
        let number = self.mesh().axis_index(axis);
        let types: Vec<TensorType> = operands.iter().map(|x| x.global_type()).collect();
        let inferred = op.infer(&types).unwrap_or_else(|why| refuse(why));
        if op.causal || op.window.is_some() || op.offsets.is_some() {
            refuse(format!(
                "{op:?} depends on the order of keys, which a share does not keep"
            ));
        }
        if self.inner().tape.borrow().is_some() {
            refuse("it has no backward; end recording first".into());
        }
        let several = self.size_of(axis) > 1;
        self.equal_shares(axis, "attention over shares of a cache", site);
        for (i, x) in operands.iter().enumerate() {
            let keys = matches!(i, 1 | 2 | 4);
            let wanted = if keys && several { Shard(1) } else { Replicate };
            if x.placements[number] != wanted {
                refuse(format!(
                    "queries are whole over '{axis}' and keys split by tokens, not {x:?}"
                ));
            }
        }
        let share = operands[1].tensor.shape()[1];
        if used > share {
            refuse(format!("{used} tokens of a share of {share}"));
        }
        let whole = |p: &Placements| p.with(number, Replicate);
        let placed: Vec<Placements> = operands.iter().map(|x| whole(&x.placements)).collect();
        let placed: Vec<&Placements> = placed.iter().collect();
        let resolved =
            resolve(&op.axes(&types), &placed, self.mesh()).unwrap_or_else(|why| refuse(why));
        let group = self.group(number);
        let shares = Shares {
            op: op.clone(),
            axis: number,
            block: group.block(1),
            across: group.across(1),
            order: TokenOrder::Ascending,
            tokens: types[1].shape[1],
            placements: resolved.outputs[0].clone(),
            site,
        };
        let tensors: Vec<Tensor> = operands.iter().map(|x| x.tensor.clone()).collect();
        let o = shares.over_cache(self, &tensors, used);
        let shape = inferred[0].shape.clone();
        Sharded::unrecorded(self, o, shape, resolved.outputs[0].clone())
    }
}

impl Sharded {
    /// This chip's share over `axis` as a tensor of its own, of which the other chips of the axis have others: for what each
    /// computes by itself until [`Chip::merge_shares`]. The same value where the axis has one chip.
    ///
    /// # Panics
    /// If another axis cuts the same dimension.
    #[track_caller]
    pub(crate) fn own_share(&self, axis: &str) -> Sharded {
        if self.chip.size_of(axis) == 1 {
            return self.clone();
        }
        let number = self.chip.mesh().axis_index(axis);
        let mut shape = self.global.clone();
        if let Shard(dim) = self.placements[number] {
            let alone = self.placements.axes_of(dim).all(|other| other == number);
            assert!(alone, "{self:?} is cut over '{axis}' and another axis");
            shape[dim] = self.tensor.shape()[dim];
        }
        let placements = self.placements.with(number, Replicate);
        Sharded::unrecorded(&self.chip, self.tensor.clone(), shape, placements)
    }

    /// True if all chips have as many elements.
    pub(crate) fn splits_evenly(&self) -> bool {
        splits_evenly(&self.global, &self.placements, self.chip.mesh())
    }
}

impl Chip {
    /// The whole of a softmax's parts, one from each chip of `axis`, which every chip of the axis gets: from o [b, t, h, d] and
    /// log-sum-exp [b, h, t] of its own part, both f32, the o of all in f32, merged in the order of the chips.
    ///
    /// A chip sends b t h (d + 1) numbers to each of the others.
    #[track_caller]
    pub(crate) fn merge_shares(&self, o: &Sharded, lse: &Sharded, axis: &str) -> Sharded {
        let site = Location::caller();
        self.arrive("attention.merge", site);
        let number = self.mesh().axis_index(axis);
        let group = self.group(number);
        let shares = Shares {
            op: Attention::default(),
            axis: number,
            block: group.block(1),
            across: group.across(1),
            order: TokenOrder::Ascending,
            tokens: o.shape()[1],
            placements: o.placements.clone(),
            site,
        };
        let part = AttentionPart {
            op: shares.op.clone(),
            queries: 0..o.shape()[1],
            keys: 0..0,
        };
        let mut whole = None;
        for results in shares.all_parts(self, [o.tensor.clone(), lse.tensor.clone()]) {
            shares.merge(self, &mut whole, results, &part, &o.tensor);
        }
        let [merged, _] = whole.expect("an axis has at least one chip");
        Sharded::unrecorded(self, merged, o.global.clone(), o.placements.clone())
    }
}

impl Shares {
    fn over_cache(&self, chip: &Chip, operands: &[Tensor], used: usize) -> Tensor {
        let q = &operands[0];
        let keys = Keys {
            k: operands[1].clone(),
            v: operands[2].clone(),
            documents: operands.get(4).cloned(),
        };
        let part = AttentionPart {
            op: self.op.clone(),
            queries: 0..q.shape()[1],
            keys: 0..used,
        };
        let own = match used {
            0 => self.nothing(chip, q, &keys.v),
            _ => self.compute(chip, &part, q, &keys, operands.get(3)),
        };
        let mut whole = None;
        for results in self.all_parts(chip, own) {
            self.merge(chip, &mut whole, results, &part, q);
        }
        let [o, _] = whole.expect("an axis has at least one chip");
        self.narrow(chip, o, q.dtype())
    }

    /// The results of every chip of the axis, in their order: outputs and log-sum-exps travel as one.
    fn all_parts(&self, chip: &Chip, own: [Tensor; 2]) -> Vec<[Tensor; 2]> {
        let n = self.across.size();
        if n == 1 {
            return vec![own];
        }
        let types = types_of(&own);
        let lengths = types.each_ref().map(TensorType::elements);
        let len = lengths[0] + lengths[1];
        let mut packed = chip.allocate(&TensorType::new([len], DType::F32));
        in_a_row(&own, &mut packed);
        drop(own);
        let result = TensorType::new([n, len], DType::F32);
        let request = Request {
            kind: Kind::AllGather,
            algorithm: chip.algorithm(),
            reduce: Reduce::Sum,
            axis: self.axis,
            group: None,
            counts: Counts::Each(vec![len; n]),
            packed: 2 * (packed.ty().bytes() + result.bytes()),
            result,
            before: self.placements.clone(),
            after: self.placements.clone(),
            site: self.site,
        };
        let all = chip.collective(&packed, &request);
        drop(packed);
        let part = |i: usize| {
            let mut first = i * len;
            [0, 1].map(|which| {
                let mut tensor = chip.allocate(&types[which]);
                out_of_a_row(&all, first, &mut tensor);
                first += lengths[which];
                tensor
            })
        };
        (0..n).map(part).collect()
    }
}
