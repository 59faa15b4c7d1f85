//! Buckets of gradients: those of several small parameters are summed over an axis in one all-reduce (Li et al. 2020,
//! arXiv:2006.15704, section 3.2.2). A bucket starts as soon as it is full, beside the backward that goes on, and the last
//! ones when the backward ends.
//!
//! A bucket is a flat tensor of its gradients, one behind the other. A chip sends the bytes that they would send apart, in fewer
//! messages, and copies them in and out. By trees every element is summed in the order of ranks wherever it lies, so a bucket
//! changes no bit; by rings and by halving the place of an element in its tensor decides, and a bucket is another tensor.

use super::Chip;
use super::overlap::Reducing;
use super::redistribute::{Request, Site};
use super::sharded::Tracked;
use super::started::Passing;
use crate::collective::{Counts, Kind, Reduce};
use crate::dtype::{DType, TensorType};
use crate::ops::device;
use crate::placement::Placement::{Partial, Replicate, Shard};
use crate::placement::{Placement, Placements, Transition, plan};
use crate::tensor::Tensor;
use std::collections::BTreeMap;

/// Bytes of a full bucket unless the program says otherwise: 25 MiB, as PyTorch's DDP has them.
pub const BUCKET_BYTES: u64 = 25 << 20;

/// A gradient that waits to be summed, or is.
pub(super) struct Packed {
    tensor: Tensor,
    target: Placements,
    leaf: Tracked,
}

/// Gradients that wait for their bucket to fill, by the axis over which they are to be summed.
pub(super) struct Buckets {
    bytes: u64,
    filling: BTreeMap<usize, Vec<Packed>>,
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
    members: Vec<(TensorType, Placements, Tracked)>,
}

impl Chip {
    /// How many bytes of gradients are summed in one all-reduce in the backward; a gradient of as many, or of all if `bytes` is 0,
    /// is summed by itself. 25 MiB unless said.
    pub fn reduce_in_buckets(&self, bytes: u64) {
        self.overlap().buckets.bytes = bytes;
    }

    /// Puts a gradient that one all-reduce settles into its axis' bucket, and starts that if it is full. Gives back a gradient
    /// that is none of these, or fills a bucket by itself.
    pub(super) fn bucketed(
        &self,
        tensor: Tensor,
        global: &[usize],
        (from, target): (&Placements, &Placements),
        leaf: Tracked,
        site: Site,
    ) -> Option<Tensor> {
        let steps = plan(from, target, global, self.mesh()).ok();
        let Some(&[(axis, Transition::AllReduce)]) = steps.as_deref() else {
            return Some(tensor);
        };
        let full = {
            let buckets = &mut self.overlap().buckets;
            if tensor.ty().bytes() >= buckets.bytes {
                return Some(tensor);
            }
            let bucket = buckets.filling.entry(axis).or_default();
            let target = target.clone();
            bucket.push(Packed {
                tensor,
                target,
                leaf,
            });
            let held: u64 = bucket.iter().map(|p| p.tensor.ty().bytes()).sum();
            held >= buckets.bytes
        };
        if full {
            self.start_bucket(axis, site);
        }
        None
    }

    /// Starts what is left in buckets: a backward ends.
    pub(super) fn start_buckets(&self, site: Site) {
        let axes: Vec<usize> = self.overlap().buckets.filling.keys().copied().collect();
        axes.into_iter()
            .for_each(|axis| self.start_bucket(axis, site));
    }

    fn start_bucket(&self, axis: usize, site: Site) {
        let filled = self.overlap().buckets.filling.remove(&axis);
        let packed = filled.unwrap_or_default();
        self.arrive("start", site);
        // Cut over another axis where any of its gradients is: the flat tensor's pieces there are other ones.
        let other = |i: usize| -> Placement {
            let cut = packed.iter().any(|p| matches!(p.target[i], Shard(_)));
            if cut { Shard(0) } else { Replicate }
        };
        let after: Placements = (0..self.mesh().axes().len()).map(other).collect();
        let sizes = packed.iter().map(|p| p.tensor.elements());
        let flat = self.allocate(&TensorType::new([sizes.sum()], DType::F32));
        let (flat, members) = self.fill(flat, packed);
        let request = Request {
            kind: Kind::AllReduce,
            algorithm: self.algorithm(),
            reduce: Reduce::Sum,
            axis,
            group: None,
            counts: Counts::Len(flat.elements()),
            result: flat.ty().clone(),
            before: after.with(axis, Partial),
            after,
            // In and out again.
            packed: 4 * flat.ty().bytes(),
            site,
        };
        let passing = self.start_collective(flat, request);
        let bucket = Bucket { passing, members };
        self.overlap().newer.push(Reducing::Bucket(bucket));
    }

    /// Copies gradients into a flat tensor, and lets them go.
    fn fill(
        &self,
        mut flat: Tensor,
        packed: Vec<Packed>,
    ) -> (Tensor, Vec<(TensorType, Placements, Tracked)>) {
        let mut begin = 0;
        let mut members = Vec::with_capacity(packed.len());
        for p in packed {
            let ty = p.tensor.ty().clone();
            if !self.is_ghost() {
                device::place(&p.tensor, &mut flat, begin);
            }
            begin += ty.elements();
            members.push((ty, p.target, p.leaf));
        }
        (flat, members)
    }

    /// Waits for a bucket and gives its gradients to their parameters.
    pub(super) fn finish_bucket(&self, bucket: Bucket) {
        let site = bucket.passing.site();
        let flat = bucket.passing.wait(self);
        let mut begin = 0;
        for (ty, target, leaf) in bucket.members {
            let mut tensor = self.allocate(&ty);
            if !self.is_ghost() {
                let place = begin..begin + ty.bytes() as usize;
                tensor.bytes_mut().copy_from_slice(&flat.bytes()[place]);
                tensor.has_arrived();
            }
            begin += ty.bytes() as usize;
            self.contribute(&mut Default::default(), &leaf, target, tensor, site);
        }
    }
}
