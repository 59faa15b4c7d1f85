//! Products beside the transfers that they need or make (Wang et al. 2023, ASPLOS, "Overlap communication with dependent
//! computation via decomposition"): an all-gather in front of a product, or a reduce-scatter behind one, taken apart into a ring of
//! as many chunks as chips. While a chunk travels the chip computes with the one that it has.
//!
//! On P chips of an axis, x [b, t, c] in chunks of t / P tokens:
//!
//! | | step s of chip r, s = 0 .. P - 1 | beside it |
//! |---|---|---|
//! | gather | y of chunk r - s | chunk r - s goes to chip r + 1 |
//! | gather, backward | dx of chunk r + 1 + s, added to what came | the sum goes to chip r - 1 |
//! | scatter | y of chunk r - 1 - s, added to what came | the sum goes to chip r + 1 |
//! | scatter, backward | dx of chunk r + s | dy of chunk r + s goes to chip r - 1 |
//!
//! A chip sends P - 1 chunks each time: the bytes of the all-gather or reduce-scatter, `(P - 1) / P` of b t c elements.
//!
//! Sums of a scatter are made in the order of the ring: chunk r begins at chip r + 1 and ends at home. It is fixed, and another one
//! than that of a reduce-scatter; gradients of weights add up chunk by chunk in the order of the backward's steps.
//!
//! Between start and end a chunk belongs to another chip's tokens, which a placement cannot say: it is labelled as if it were whole
//! (or, for sums, as partial), and never leaves this file so.

use super::gradient::Settled;
use super::redistribute::{Request, Site};
use super::sharded::Tracked;
use super::started::Passing;
use super::{Chip, Sharded};
use crate::collective::{Counts, Kind, Reduce};
use crate::dtype::{DType, TensorType};
use crate::ops::{Concatenate, SliceAxis};
use crate::placement::Placement::{self, Partial, Replicate, Shard};
use crate::placement::Placements;
use crate::tape::{Gradients, Node, ValueId};
use crate::tensor::Tensor;
use crate::trace::Phase;
use std::cell::RefCell;
use std::panic::Location;
use std::rc::Rc;

/// The dimension of tokens of [b, t, c].
const TOKENS: usize = 1;

/// What a chunk's arrival sends the other way in the backward, and where it is placed.
type Back = Rc<RefCell<Option<(Passing, Placements)>>>;

/// A chunk on its way to the next chip of the ring.
struct Travelling {
    chip: Chip,
    passing: Passing,
    shape: Vec<usize>,
    placements: Placements,
    tracked: Tracked,
    number: usize,
    /// The value by which the tape finds the beginning of the way, and what comes back on it; none if no gradient does.
    back: Option<(ValueId, Back)>,
}

impl Chip {
    /// What `each` makes of x [b, t, c], whose tokens are split over `axis`, gathered: results [b, t, ..] with all tokens, which
    /// `each` gives chunk by chunk as [b, t / P, ..]. It is called once for each chunk and must treat tokens alike: products with
    /// weights split over the axis by columns. One chip's x is given as it is.
    ///
    /// # Panics
    /// If x is not split by tokens over the axis, or is over another axis too; if the chips do not divide the tokens.
    #[track_caller]
    pub fn gather_and(
        &self,
        axis: &str,
        x: &Sharded,
        each: impl Fn(&Sharded) -> Vec<Sharded>,
    ) -> Vec<Sharded> {
        let site = Location::caller();
        if self.size_of(axis) == 1 {
            return each(x);
        }
        let number = self.mesh().axis_index(axis);
        self.check_chunks("gather", x, number, Shard(TOKENS), site);
        // Which chunk a chip has changes neither shapes nor bytes: all are one class.
        let group = self.group(number);
        let (n, here) = (group.size(), group.index());
        let mut shape = x.global.clone();
        shape[TOKENS] /= n;
        let whole = x.placements.with(number, Replicate);
        let mut chunk = self.seen_as(x, (shape, whole), number, [Partial, Shard(TOKENS)], site);
        let mut parts: Vec<Vec<Sharded>> = vec![vec![]; n];
        for step in 0..n {
            let moving = (step + 1 < n).then(|| self.pass_on(chunk.clone(), number, site));
            parts[(here + n - step) % n] = each(&chunk);
            drop(chunk);
            let Some(moving) = moving else { break };
            chunk = moving.wait(Partial, site);
        }
        let results = parts[0].len();
        let join = |i: usize| {
            let parts: Vec<&Sharded> = parts.iter().map(|p| &p[i]).collect();
            self.apply_one(Concatenate { axis: TOKENS }, &parts)
        };
        (0..results).map(join).collect()
    }

    /// What `each` makes of x [b, t, k], which has all tokens, summed over `axis` and split over it by tokens: `each` gives partial
    /// sums [b, t / P, n] of a chunk [b, t / P, k]. It is called once for each chunk and must treat tokens alike: a product with a
    /// weight split over the axis by rows.
    ///
    /// # Panics
    /// As [`Chip::gather_and`]; if `each` gives no partial sum.
    #[track_caller]
    pub fn scatter_from(
        &self,
        axis: &str,
        x: &Sharded,
        each: impl Fn(&Sharded) -> Sharded,
    ) -> Sharded {
        let site = Location::caller();
        if self.size_of(axis) == 1 {
            return each(x);
        }
        let number = self.mesh().axis_index(axis);
        self.check_chunks("scatter", x, number, Shard(2), site);
        let group = self.group(number);
        let (n, here) = (group.size(), group.index());
        let len = x.global[TOKENS] / n;
        let part = |step: usize| {
            let chunk = (here + 2 * n - 1 - step) % n;
            let range = chunk * len..(chunk + 1) * len;
            let axis = TOKENS;
            let y = each(&self.apply_one(SliceAxis { axis, range }, &[x]));
            assert_eq!(
                y.placements[number], Partial,
                "a scatter at {site} sums what is partial over its axis, not {y:?}"
            );
            y
        };
        let mut sum = part(0);
        for step in 1..n {
            let moving = self.pass_on(sum, number, site);
            let own = part(step);
            sum = moving.wait(Replicate, site).add(&own);
        }
        let mut shape = sum.global.clone();
        shape[TOKENS] *= n;
        let split = sum.placements.with(number, Shard(TOKENS));
        self.seen_as(
            &sum,
            (shape, split),
            number,
            [Shard(TOKENS), Replicate],
            site,
        )
    }

    fn check_chunks(&self, what: &str, x: &Sharded, number: usize, wants: Placement, site: Site) {
        self.arrive(what, site);
        let axis = &self.mesh().axes()[number];
        self.equal_shares(axis.name(), what, site);
        let others = || x.placements.axes_of(TOKENS).any(|a| a != number);
        assert!(
            x.global.len() == 3 && x.placements[number] == wants && !others(),
            "a {what} by chunks over '{}' at {site} takes [b, t, c] placed {wants} there, with tokens split over no other axis, \
             not {x:?}",
            axis.name()
        );
        assert!(
            x.global[TOKENS].is_multiple_of(axis.size()),
            "a {what} by chunks at {site}: the {} chips of '{}' do not divide {} tokens",
            axis.size(),
            axis.name(),
            x.global[TOKENS]
        );
    }

    /// The same share under another shape and placement over one axis. Its gradient comes placed as `gradients[0]` there and goes
    /// on as `gradients[1]`.
    fn seen_as(
        &self,
        x: &Sharded,
        (shape, placements): (Vec<usize>, Placements),
        number: usize,
        gradients: [Placement; 2],
        site: Site,
    ) -> Sharded {
        let mut seen = Sharded::unrecorded(self, x.tensor.clone(), shape, placements);
        let tracked = x.tracked;
        if tracked.value.is_none() || self.inner().tape.borrow().is_none() {
            return seen;
        }
        seen.tracked = self.tracked_like(&tracked);
        let [comes, goes] = gradients;
        let (settled, target) = self.settled_as(&seen, number, comes);
        let on = x.placements.gradient().with(number, goes);
        self.push_in_scope(settled.value, move |chip, gradients| {
            let all = gradients.take(settled.value);
            if let Some(dy) = chip.settle(all, &target, &settled.global, site) {
                chip.contribute(gradients, &tracked, on.clone(), dy, site);
            }
        });
        seen
    }

    fn tracked_like(&self, tracked: &Tracked) -> Tracked {
        Tracked {
            value: Some(self.new_value()),
            leaf: None,
            ..*tracked
        }
    }

    /// A value whose gradient is to be settled, and where: over one axis as `comes`.
    fn settled_as(&self, x: &Sharded, number: usize, comes: Placement) -> (Settled, Placements) {
        let settled = Settled {
            value: x.tracked.value.expect("it is on the tape"),
            global: x.global.clone(),
            placements: x.placements.clone(),
        };
        let target = x.placements.gradient().with(number, comes);
        (settled, target)
    }

    /// Puts a node on the tape whose backward runs in the scope in which it was recorded.
    fn push_in_scope(&self, value: ValueId, backward: impl Fn(&Chip, &mut Gradients) + 'static) {
        let scope = self.recorder().scope();
        self.push_node(Node {
            outputs: vec![value],
            has_inputs: true,
            has_weights: false,
            backward: Box::new(move |chip, gradients, _| {
                chip.recorder().enter_scope(scope);
                chip.phase(Phase::Backward, || backward(chip, gradients));
                chip.recorder().leave();
            }),
        });
    }

    /// Starts to pass a share on to the next chip of the axis, or to the one before.
    fn shift(
        &self,
        x: Tensor,
        number: usize,
        p: &Placements,
        forward: bool,
        site: Site,
    ) -> Passing {
        let group = self.group(number);
        let request = Request {
            kind: Kind::Shift,
            algorithm: self.algorithm(),
            reduce: Reduce::Sum,
            axis: number,
            group: Some(if forward { group } else { group.reversed() }),
            counts: Counts::Each(vec![x.elements(); group.size()]),
            result: x.ty().clone(),
            before: p.clone(),
            after: p.clone(),
            packed: 0,
            site,
        };
        self.start_collective(x, request)
    }

    /// Starts to pass a chunk on. In the backward, what its arrival sent back is waited for here.
    fn pass_on(&self, chunk: Sharded, number: usize, site: Site) -> Travelling {
        let (placements, tracked) = (chunk.placements, chunk.tracked);
        let passing = self.shift(chunk.tensor, number, &placements, true, site);
        let recording = self.inner().tape.borrow().is_some() && tracked.value.is_some();
        let back = recording.then(|| {
            let (begun, back) = (self.new_value(), Back::default());
            let home = back.clone();
            self.push_in_scope(begun, move |chip, gradients| {
                gradients.take(begun);
                let sent = home.borrow_mut().take();
                let (passing, placed) = sent.expect("the arrival ran backward before");
                let dy = passing.wait(chip);
                chip.contribute(gradients, &tracked, placed, dy, site);
            });
            (begun, back)
        });
        Travelling {
            chip: self.clone(),
            passing,
            shape: chunk.global,
            placements,
            tracked,
            number,
            back,
        }
    }
}

impl Travelling {
    /// Waits for the chunk of the chip before. Its gradient comes placed as `gradient` over the axis, and is sent to that chip.
    fn wait(self, gradient: Placement, site: Site) -> Sharded {
        let (chip, number) = (self.chip, self.number);
        let tensor = self.passing.wait(&chip);
        let mut chunk = Sharded::unrecorded(&chip, tensor, self.shape, self.placements);
        let Some((begun, back)) = self.back else {
            return chunk;
        };
        chunk.tracked = chip.tracked_like(&self.tracked);
        let (settled, target) = chip.settled_as(&chunk, number, gradient);
        chip.push_in_scope(settled.value, move |chip, gradients| {
            let all = gradients.take(settled.value);
            let Some(dy) = chip.settle(all, &target, &settled.global, site) else {
                return;
            };
            let passing = chip.shift(dy, number, &target, false, site);
            *back.borrow_mut() = Some((passing, target.clone()));
            // The beginning of the way runs if its value has a gradient: one of no elements.
            let none = chip.allocate(&TensorType::new([0], DType::F32));
            gradients.put(begun, target.clone(), none);
        });
        chunk
    }
}
