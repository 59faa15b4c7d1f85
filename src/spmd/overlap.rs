//! What travels beside a block's computation: the next block's parameters, the gradients of the one before.
//!
//! The block is the unit. While a program is inside of one it says which blocks stand next to it ([`Chip::within`]). Where
//! parameters are split (ZeRO-3), asking for one starts to gather the same parameter of the next block: the one behind in
//! the forward, the one in front in the backward and in what is computed again. Gradients that are reduced as they appear
//! (ZeRO-2 and 3) are started where a block's backward makes them, and waited for when the backward of the block in front has
//! ended ([`Chip::border`]); those that are reduced once in a step are started at the border of their block in the last
//! backward, if one transition does it, small ones in buckets (see `bucket`). So at most two blocks' transfers and a bucket are
//! under way, and at most so much memory is theirs.
//!
//! What this gains: where chips have cores of their own for transfers, the transfers' time; in a world of threads on as many
//! cores as chips only the time in which one chip would have waited for another.

use super::bucket::{Bucket, Buckets};
use super::redistribute::Site;
use super::sharded::Tracked;
use super::started::Moving;
use super::{Chip, Sharded};
use crate::dtype::DType;
use crate::placement::Placements;
use crate::tape::{Gradients, Node, Pass};
use crate::tensor::Tensor;
use crate::trace::Phase;
use std::collections::BTreeMap;
use std::panic::Location;
use std::rc::Rc;

/// A block among its neighbours. Parameters of alike blocks have names that differ in the block's own name alone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Block {
    /// What the names of its parameters begin with: `layers.3.`.
    pub name: String,
    /// The same of the block in front of it, if there is one on this chip.
    pub before: Option<String>,
    /// The same of the block behind it.
    pub behind: Option<String>,
}

impl Block {
    /// The name that a parameter has in a neighbour.
    fn renamed(&self, parameter: &str, neighbour: &Option<String>) -> Option<String> {
        let rest = parameter.strip_prefix(&self.name)?;
        neighbour.as_ref().map(|name| format!("{name}{rest}"))
    }
}

/// Reduced gradients on their way to their parameters.
pub(super) enum Reducing {
    /// One by itself.
    Alone {
        moving: Box<Moving>,
        leaf: Tracked,
        target: Placements,
        site: Site,
    },
    Bucket(Bucket),
}

/// What a chip has under way.
#[derive(Default)]
pub(super) struct Overlap {
    block: Option<Rc<Block>>,
    /// Parameters being gathered, by name.
    gathers: BTreeMap<String, Moving>,
    /// Gradients started in the backward of the block before this one, and in this one's.
    older: Vec<Reducing>,
    pub(super) newer: Vec<Reducing>,
    pub(super) buckets: Buckets,
    /// True while the last backward of a step runs.
    last: bool,
}

impl Chip {
    /// Runs `body` as the inside of a block: what it asks for may be fetched for its neighbours too.
    pub fn within<T>(&self, block: &Block, body: impl FnOnce() -> T) -> T {
        let outer = self.overlap().block.replace(Rc::new(block.clone()));
        let result = body();
        self.overlap().block = outer;
        result
    }

    /// The same value. In the backward, what comes behind here is done when the gradient passes: gradients that the block
    /// behind that one started are waited for, and in the last backward of a step those of the parameters whose names begin
    /// with one of `names` start to be reduced.
    #[track_caller]
    pub fn border(&self, x: &Sharded, names: &[&str]) -> Sharded {
        let site = Location::caller();
        if x.tracked.value.is_none() || self.inner().tape.borrow().is_none() {
            return x.clone();
        }
        let passed = self.new_value();
        let (tracked, names) = (x.tracked, names.iter().map(|n| n.to_string()));
        let names: Vec<String> = names.collect();
        let scope = self.recorder().scope();
        self.push_node(Node {
            outputs: vec![passed],
            has_inputs: true,
            has_weights: true,
            backward: Box::new(move |chip, gradients, pass| {
                if pass != Pass::Weights {
                    for (placements, tensor) in gradients.take(passed) {
                        chip.contribute(gradients, &tracked, placements, tensor, site);
                    }
                }
                if pass != Pass::Inputs {
                    chip.recorder().enter_scope(scope);
                    let phase = match pass {
                        Pass::Weights => Phase::Weight,
                        _ => Phase::Backward,
                    };
                    chip.phase(phase, || chip.cross(&names, site));
                    chip.recorder().leave();
                }
            }),
        });
        let mut same = x.clone();
        same.tracked = Tracked {
            value: Some(passed),
            leaf: None,
            ..tracked
        };
        same
    }

    fn cross(&self, names: &[String], site: Site) {
        let older = std::mem::take(&mut self.overlap().older);
        older.into_iter().for_each(|r| self.finish_reducing(r));
        let newer = std::mem::take(&mut self.overlap().newer);
        self.overlap().older = newer;
        if self.overlap().last {
            self.start_reducing(names, site);
        }
    }

    /// Starts to reduce the gradients of parameters whose last contribution is there.
    fn start_reducing(&self, names: &[String], site: Site) {
        let count = self.parameters().len();
        for index in 0..count {
            let (tensor, from, target, global, leaf) = {
                let p = &mut self.parameters_mut()[index];
                let target = p.kept.gradient();
                let named = names.iter().any(|name| p.name.starts_with(name));
                match &p.gradient[..] {
                    [(from, _)] if named && *from != target => {}
                    _ => continue,
                }
                let (from, tensor) = p.gradient.remove(0);
                let leaf = Tracked {
                    value: Some(p.id),
                    leaf: Some(index),
                    weight: true,
                    gradient: DType::F32,
                };
                (tensor, from, target, p.padded.clone(), leaf)
            };
            let way = (&from, &target);
            let Some(tensor) = self.bucketed(tensor, &global, way, leaf, site) else {
                continue;
            };
            match self.start_move(&tensor, &global, &from, &target, site) {
                Some(moving) => self.overlap().newer.push(Reducing::Alone {
                    moving: Box::new(moving),
                    leaf,
                    target,
                    site,
                }),
                None => self.parameters_mut()[index].gradient.push((from, tensor)),
            }
        }
    }

    /// Reduces one contribution to a parameter's gradient beside what follows.
    pub(super) fn reduce_beside(
        &self,
        tensor: Tensor,
        global: &[usize],
        (from, target): (Placements, Placements),
        leaf: Tracked,
        site: Site,
    ) {
        match self.start_move(&tensor, global, &from, &target, site) {
            Some(moving) => self.overlap().newer.push(Reducing::Alone {
                moving: Box::new(moving),
                leaf,
                target,
                site,
            }),
            None => {
                let tensor = self.move_tensor(tensor, global, &from, &target, "gradient", site);
                self.contribute(&mut Gradients::default(), &leaf, target, tensor, site);
            }
        }
    }

    fn finish_reducing(&self, reducing: Reducing) {
        match reducing {
            Reducing::Alone {
                moving,
                leaf,
                target,
                site,
            } => {
                let tensor = self.finish_move(*moving, site);
                self.contribute(&mut Gradients::default(), &leaf, target, tensor, site);
            }
            Reducing::Bucket(bucket) => self.finish_bucket(bucket),
        }
    }

    /// Waits for all gradients that are under way: a backward has ended.
    pub(super) fn end_of_backward(&self) {
        self.phase(Phase::Backward, || self.start_buckets(Location::caller()));
        let (older, newer) = {
            let mut overlap = self.overlap();
            (
                std::mem::take(&mut overlap.older),
                std::mem::take(&mut overlap.newer),
            )
        };
        let all = older.into_iter().chain(newer);
        self.phase(Phase::Backward, || {
            all.for_each(|r| self.finish_reducing(r))
        });
        self.drop_gathers();
    }

    /// Waits for gathered parameters that nobody asked for: blocks need not be alike.
    pub(crate) fn drop_gathers(&self) {
        let left = std::mem::take(&mut self.overlap().gathers);
        for moving in left.into_values() {
            drop(self.finish_move(moving, Location::caller()));
        }
    }

    /// Runs `body` as the last backward of a step: no contribution to the gradients of its parameters comes after it.
    pub(crate) fn last_backward<T>(&self, last: bool, body: impl FnOnce() -> T) -> T {
        self.overlap().last = last;
        let result = body();
        self.overlap().last = false;
        result
    }

    /// The neighbour whose turn is next, by name of its parameter.
    pub(super) fn next_in_line(&self, parameter: &str) -> Option<String> {
        let again = self.current_phase() == Phase::Recompute;
        let block = self.overlap().block.clone()?;
        let neighbour = if again { &block.before } else { &block.behind };
        block.renamed(parameter, neighbour)
    }

    /// The same parameter of the block whose backward comes next.
    pub(super) fn next_backward(&self, parameter: &str) -> Option<String> {
        let block = self.overlap().block.clone()?;
        block.renamed(parameter, &block.before)
    }

    /// A parameter that was gathered ahead, if it was.
    pub(super) fn gathered_ahead(&self, name: &str, site: Site) -> Option<Tensor> {
        let moving = self.overlap().gathers.remove(name)?;
        Some(self.finish_move(moving, site))
    }

    /// Starts to gather a known parameter in the type `dtype`, to lie as `used`.
    pub(super) fn gather_ahead(&self, name: &str, dtype: DType, used: &Placements, site: Site) {
        if self.overlap().gathers.contains_key(name) {
            return;
        }
        let leaf = {
            let all = self.parameters();
            let Some(p) = all.iter().find(|p| *p.name == *name) else {
                return;
            };
            Sharded::unrecorded(
                self,
                p.value.clone(),
                p.padded.clone(),
                p.placements.clone(),
            )
        };
        let x = leaf.cast(dtype);
        let (from, global) = (x.placements.clone(), x.global.clone());
        if let Some(moving) = self.start_move(&x.tensor, &global, &from, used, site) {
            self.overlap().gathers.insert(name.into(), moving);
        }
    }
}
