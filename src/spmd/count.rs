//! What a program counts while it runs, for the loop around its steps.

use super::{Chip, Sharded};
use crate::placement::Placements;
use crate::tensor::Tensor;
use crate::trace::Phase;
use std::panic::Location;
use std::rc::Rc;

/// A sum under a name.
#[derive(Debug)]
pub(super) struct Counted {
    name: Rc<str>,
    sum: Tensor,
    global: Vec<usize>,
    placements: Placements,
}

impl Chip {
    /// Adds `value` to what is counted under `name`, outside of the tape: a statistic of a block that the loop around the
    /// steps reads. A block that is computed again is not counted again.
    ///
    /// # Panics
    /// If the name was used for another shape or placement since [`Chip::take_counts`].
    #[track_caller]
    pub fn count(&self, name: &str, value: &Sharded) {
        if self.current_phase() == Phase::Recompute {
            return;
        }
        let site = Location::caller();
        let held = {
            let mut all = self.inner().counts.borrow_mut();
            let at = all.iter().position(|c| *c.name == *name);
            at.map(|at| (at, all.remove(at)))
        };
        let fresh = |sum: Tensor| Counted {
            name: name.into(),
            sum,
            global: value.global.clone(),
            placements: value.placements.clone(),
        };
        let (at, counted) = match held {
            None => (usize::MAX, fresh(value.tensor.clone())),
            Some((at, before)) => {
                assert!(
                    before.global == value.global && before.placements == value.placements,
                    "count of {value:?} under '{name}', which holds {:?} {} (called at {site})",
                    before.global,
                    before.placements
                );
                let sum =
                    self.accumulate(before.sum, value.tensor.clone(), &value.placements, site);
                (at, fresh(sum))
            }
        };
        let mut all = self.inner().counts.borrow_mut();
        let at = at.min(all.len());
        all.insert(at, counted);
    }

    /// What was counted since the last call, by name, in the order of first use.
    pub fn take_counts(&self) -> Vec<(Rc<str>, Sharded)> {
        let taken = self.inner().counts.take();
        let sharded = |c: Counted| {
            let sum = Sharded::unrecorded(self, c.sum, c.global, c.placements);
            (c.name, sum)
        };
        taken.into_iter().map(sharded).collect()
    }
}
