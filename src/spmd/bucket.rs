//! Buckets of gradients: those of several small parameters are summed over an axis in one all-reduce (Li et al. 2020,
//! arXiv:2006.15704, section 3.2.2), or in one reduce-scatter where each chip keeps its part of every sum (ZeRO-1). A bucket
//! starts as soon as it is full, beside the backward that goes on, and the last ones when the backward ends.
//!
//! A bucket is its gradients as one flat tensor, one behind the other. A chip sends the bytes that they would send apart, in
//! fewer messages; a message is parts of several gradients, which stay where they are. What is scattered lies by chips: the
//! part of the first chip of every gradient, then that of the second. By trees every element is summed in the
//! order of ranks wherever it lies, so a bucket changes no bit; by rings and by halving the place of an element in its tensor
//! decides, and a bucket is another tensor.
//!
//! On a graphics processor a bucket's gradients go to the host as it starts, one behind the other by one submission, and come back
//! by one copy when it is waited for.
//!
//! Gradients were once copied into a tensor and out of one. With four chips on two cores that, and a copy of each summand and
//! of each chunk for each peer, was 2 % of a step of `char-6x384`.

use super::Chip;
use super::overlap::Reducing;
use super::payload::Piece;
use super::redistribute::{Request, Site};
use super::sharded::Tracked;
use super::started::Passing;
use crate::collective::{Counts, Kind, Reduce};
use crate::dtype::{DType, TensorType};
use crate::placement::Placement::{Partial, Replicate, Shard};
use crate::placement::{Placement, Placements, Transition, plan};
use crate::tensor::Tensor;
use std::collections::BTreeMap;

/// Bytes of a full bucket unless the program says otherwise: 25 MiB, as PyTorch's DDP has them.
pub const BUCKET_BYTES: u64 = 25 << 20;

/// A gradient that waits for its bucket to fill: its pieces in rank order, and the collective that would sum it by itself.
struct Packed {
    tensor: Tensor,
    request: Request,
    leaf: Tracked,
}

/// Gradients that wait, by the axis over which they are to be summed, and whether each chip keeps a part of the sum or all.
pub(super) struct Buckets {
    bytes: u64,
    filling: BTreeMap<(usize, bool), Vec<Packed>>,
}

impl Default for Buckets {
    fn default() -> Self {
        Buckets {
            bytes: BUCKET_BYTES,
            filling: BTreeMap::new(),
        }
    }
}

/// A bucket on its way.
pub(super) struct Bucket {
    passing: Passing,
    members: Vec<(Placements, Tracked)>,
}

impl Chip {
    /// How many bytes of gradients are summed in one all-reduce or reduce-scatter in the backward; a gradient of as many, or of
    /// all if `bytes` is 0, is summed by itself. 25 MiB unless said. Gradients that are split as they appear (ZeRO-2 and 3) are
    /// each summed by itself.
    pub fn reduce_in_buckets(&self, bytes: u64) {
        self.overlap().buckets.bytes = bytes;
    }

    /// Puts a gradient that one all-reduce or reduce-scatter settles into its axis' bucket, and starts that if it is full. Gives
    /// back a gradient that is none of these, or fills a bucket by itself.
    pub(super) fn bucketed(
        &self,
        tensor: Tensor,
        global: &[usize],
        (from, target): (&Placements, &Placements),
        leaf: Tracked,
        site: Site,
    ) -> Option<Tensor> {
        let steps = plan(from, target, global, self.mesh()).ok();
        let (axis, transition) = match steps.as_deref() {
            Some(&[(axis, how @ (Transition::AllReduce | Transition::ReduceScatter { .. }))]) => {
                (axis, how)
            }
            _ => return Some(tensor),
        };
        if tensor.ty().bytes() >= self.overlap().buckets.bytes {
            return Some(tensor);
        }
        let (packed, request) = self.prepare(&tensor, global, axis, transition, from, target, site);
        drop(tensor);
        let key = (axis, transition != Transition::AllReduce);
        let full = {
            let buckets = &mut self.overlap().buckets;
            let bucket = buckets.filling.entry(key).or_default();
            bucket.push(Packed {
                tensor: packed,
                request,
                leaf,
            });
            let held: u64 = bucket.iter().map(|p| p.tensor.ty().bytes()).sum();
            held >= buckets.bytes
        };
        if full {
            self.start_bucket(key, site);
        }
        None
    }

    /// Starts what is left in buckets: a backward ends.
    pub(super) fn start_buckets(&self, site: Site) {
        let keys: Vec<_> = self.overlap().buckets.filling.keys().copied().collect();
        keys.into_iter()
            .for_each(|key| self.start_bucket(key, site));
    }

    fn start_bucket(&self, key: (usize, bool), site: Site) {
        let axis = key.0;
        let filled = self.overlap().buckets.filling.remove(&key);
        let packed = filled.unwrap_or_default();
        self.arrive("start", site);
        // Cut over an axis where any of its gradients is: the flat tensor's pieces there are other ones.
        let placed = |i: usize| -> Placement {
            let mut all = packed.iter();
            let cut = all.any(|p| matches!(p.request.after[i], Shard(_)));
            if cut { Shard(0) } else { Replicate }
        };
        let after: Placements = (0..self.mesh().axes().len()).map(placed).collect();
        let flat = |elements: usize| TensorType::new([elements], DType::F32);
        let given = packed.iter().map(|p| p.tensor.elements()).sum();
        let results: Vec<TensorType> = packed.iter().map(|p| p.request.result.clone()).collect();
        let (input, counts) = lined_up(&packed);
        let first = packed.first().expect("a bucket is made for a gradient");
        let request = Request {
            kind: first.request.kind,
            algorithm: self.algorithm(),
            reduce: Reduce::Sum,
            axis,
            group: None,
            counts,
            result: flat(results.iter().map(TensorType::elements).sum()),
            before: after.with(axis, Partial),
            after,
            packed: packed.iter().map(|p| p.request.packed).sum(),
            site,
        };
        let members = packed.into_iter().map(|p| (p.request.after, p.leaf));
        let members = members.collect();
        let passing = self.start_over(input, &flat(given), &results, request);
        let bucket = Bucket { passing, members };
        self.overlap().newer.push(Reducing::Bucket(bucket));
    }

    /// Waits for a bucket and gives its gradients to their parameters.
    pub(super) fn finish_bucket(&self, bucket: Bucket) {
        let site = bucket.passing.site();
        let sums = bucket.passing.wait_all(self);
        for (tensor, (target, leaf)) in sums.into_iter().zip(bucket.members) {
            self.contribute(&mut Default::default(), &leaf, target, tensor, site);
        }
    }
}

/// The gradients of a bucket as one input: one behind the other, or the first chip's part of each, then the second's.
fn lined_up(packed: &[Packed]) -> (Vec<Piece>, Counts) {
    let parts = |p: &Packed| match &p.request.counts {
        Counts::Each(each) => each.clone(),
        _ => vec![p.tensor.elements()],
    };
    let mut lengths: Vec<usize> = Vec::new();
    let mut pieces: Vec<Vec<Piece>> = Vec::new();
    for p in packed {
        let mut begin = 0;
        for (chip, len) in parts(p).into_iter().enumerate() {
            if chip == lengths.len() {
                lengths.push(0);
                pieces.push(Vec::new());
            }
            lengths[chip] += len;
            pieces[chip].push(Piece::whole(&p.tensor).part(begin..begin + len));
            begin += len;
        }
    }
    let scattered = packed.iter().any(|p| p.request.kind == Kind::ReduceScatter);
    let counts = match scattered {
        true => Counts::Each(lengths),
        false => Counts::Len(lengths.into_iter().sum()),
    };
    (pieces.concat(), counts)
}
