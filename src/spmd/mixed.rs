//! Meshes in which chips differ in kind: a processor beside a graphics processor, or two adapters.
//!
//! Division and square root differ between kinds in the last bit, so what chips of several kinds hold alike would drift apart
//! step by step. Where that is so the first of these chips updates it and the others take its bits: parameters with their state,
//! once per step and mesh axis. What is computed anew in each step (activations, gradients) may differ in the last bit, as it
//! does between any two kinds; sums over chips are made on the host in one order, so all chips get the same ones.
//!
//! | mesh | what is broadcast |
//! |---|---|
//! | one kind | nothing |
//! | `dp` over two kinds | every parameter and its state |
//! | `tp` over two kinds | those that `tp` does not cut (norms, biases of rows) |
//! | ZeRO or `fsdp` over two kinds | nothing: no two chips update the same elements |

use super::Chip;
use crate::collective::Kind;
use crate::placement::{Placement, Placements};
use crate::tensor::Tensor;
use std::panic::Location;

impl Chip {
    /// Whether chips of other kinds hold what this one holds of something placed so, and then whether this one decides what it
    /// is. None where all of them are of one kind, and compute the same bits.
    pub(super) fn decides(&self, placements: &Placements) -> Option<bool> {
        let kinds = &self.inner().kinds;
        if kinds.windows(2).all(|k| k[0] == k[1]) {
            return None;
        }
        let (mesh, mine) = (self.mesh(), self.coordinates());
        let alike = |rank: &usize| {
            let at = mesh.coordinates(*rank);
            let same =
                |axis: usize| placements[axis] == Placement::Replicate || at[axis] == mine[axis];
            (0..mesh.axes().len()).all(same)
        };
        let holders: Vec<usize> = (0..mesh.chips()).filter(alike).collect();
        let mixed = holders.iter().any(|&r| kinds[r] != kinds[holders[0]]);
        mixed.then(|| holders[0] == self.rank())
    }

    /// What the deciding chip has of something placed so, on every chip that holds it.
    pub(super) fn decided(
        &self,
        x: &Tensor,
        placements: &Placements,
        site: &'static Location<'static>,
    ) -> Tensor {
        let mut x = x.clone();
        for (axis, p) in placements.iter().enumerate() {
            if *p == Placement::Replicate {
                let name = self.mesh().axes()[axis].name();
                x = self.whole_group(&x, name, Kind::Broadcast { root: 0 }, site);
            }
        }
        x
    }
}
