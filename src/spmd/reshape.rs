//! Another shape for the same elements, without moving any.
//!
//! A split dimension survives if what stands before it stays and its new length can be cut by the same chips: then every
//! chip's share is the same run of elements. `[b, t, h d]` split along its last dimension is `[b, t, h, d]` split along
//! heads; a gradient goes back the same way.

use super::{Chip, Sharded};
use crate::mesh::Mesh;
use crate::placement::{Placement, Placements, local_shape};
use std::panic::Location;
use std::sync::Arc;

impl Chip {
    #[track_caller]
    pub(super) fn reshape(&self, x: &Sharded, shape: Vec<usize>) -> Sharded {
        let site = Location::caller();
        let elements = |s: &[usize]| s.iter().product::<usize>();
        assert_eq!(
            elements(&x.global),
            elements(&shape),
            "reshape of {x:?} to {shape:?}: {} elements against {} (called at {site})",
            elements(&x.global),
            elements(&shape)
        );
        let placements =
            carry(&x.placements, &x.global, &shape, self.mesh()).unwrap_or_else(|why| {
                panic!("reshape of {x:?} to {shape:?}: {why} (called at {site})")
            });
        let local = self.local(&shape, x.dtype(), &placements, site);
        let tensor = x.tensor.reshape(local.ty.shape);
        let mut reshaped = Sharded::unrecorded(self, tensor, shape.clone(), placements);
        let (mesh, original) = (Arc::new(self.mesh().clone()), x.global.clone());
        let back = move |p: Placements, tensor: crate::tensor::Tensor, at: &[usize]| {
            let placements = carry(&p, &shape, &original, &mesh).unwrap_or_else(|why| {
                panic!("the gradient of a reshape at {site}, placed {p}: {why}")
            });
            let local = local_shape(&original, &placements, &mesh, at);
            (placements, tensor.reshape(local))
        };
        let at = self.coordinates().to_vec();
        self.record_passage(x, &mut reshaped, move |p, t| back(p, t, &at), site);
        reshaped
    }
}

/// The placements of the same shares under another shape.
fn carry(
    placements: &Placements,
    from: &[usize],
    to: &[usize],
    mesh: &Mesh,
) -> Result<Placements, String> {
    let one = |(axis, p): (&crate::mesh::Axis, &Placement)| {
        let Placement::Shard(dim) = *p else {
            return Ok(*p);
        };
        let before: usize = from[..dim].iter().product();
        // Dimensions of length 1 make several candidates; the one that can be cut is meant.
        let fits = |&at: &usize| {
            let units = axis.units();
            let even = || to[at].is_multiple_of(units) && from[dim].is_multiple_of(units);
            // A dimension that stays as it is stays cut as it is, evenly or not.
            to[..at].iter().product::<usize>() == before && (to[at] == from[dim] || even())
        };
        (0..to.len()).find(fits).map(Placement::Shard).ok_or_else(|| {
            format!(
                "dimension {dim} of {from:?} is split over the {} chips of '{}' and no dimension of {to:?} takes its place: \
                 redistribute it first",
                axis.size(),
                axis.name()
            )
        })
    };
    mesh.axes().iter().zip(placements.iter()).map(one).collect()
}
