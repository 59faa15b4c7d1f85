//! Attention over a sequence that chips share: ring attention (Liu et al. 2023, arXiv:2310.01889) and USP (Fang and Zhao 2024,
//! arXiv:2405.07719), which exchanges tokens for heads among neighbours first.
//!
//! Of P chips u exchange tokens for heads, and R = P / u such blocks are a ring: keys and values travel around it while
//! every chip computes its queries against those that it holds. With N tokens, h elements of all heads, g = key heads over
//! query heads and e bytes an element, a chip sends
//!
//! | | forward | backward |
//! |---|---|---|
//! | ring (u = 1) | 2 g N h e (P - 1) / P: keys and values, P - 1 times | as many again, and 2 g N h 4 (P - 1) / P: their gradients, in f32 |
//! | usp | (2 + 2 g) N h e (u - 1) / (P u) exchanged, 2 g N h e (R - 1) / P around the ring | the exchange again, the ring's as above with (R - 1) / P |
//!
//! a layer and sequence, each member of a ring holding 1 / R of the tokens and 1 / u of the heads. Twice the forward in f32: a gradient starts
//! at the chip behind its keys' owner, gathers a part at every chip, and is at home after P - 1 steps, where the owner's
//! own part is added last.
//!
//! Order of sums: a chip merges its own keys first, then those of the chip before it, and so on around the ring; gradients
//! of queries add up in the same order, those of keys in the order in which they travel. So a run repeats bit for bit.
//!
//! | file | what it holds |
//! |---|---|
//! | `contents` | a batch in the order in which chips keep tokens |
//! | `parts` | which queries meet which keys in each step |
//! | `ring` | the steps, forward and backward |
//! | `shares` | new queries over a cache whose tokens are shared |
//! | `swap` | tokens for heads and back; one place around the ring |

mod contents;
mod parts;
mod ring;
mod shares;
mod swap;

pub use contents::InOrder;

use super::gradient::Settled;
use super::resolve::resolve;
use super::sharded::Tracked;
use super::{Chip, Sharded};
use crate::dtype::TensorType;
use crate::mesh::Group;
use crate::ops::{Attention, Op};
use crate::placement::Placement::{Replicate, Shard};
use crate::placement::{Placements, TokenOrder, TokenRun, split};
use crate::tape::{Gradients, Node, Pass};
use crate::tensor::Tensor;
use crate::trace::Phase;
use ring::Kept;
use std::ops::Range;
use std::panic::Location;

/// How the chips along an axis share attention over a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ring<'a> {
    /// The mesh axis that splits the tokens.
    pub axis: &'a str,
    /// How many neighbours exchange tokens for heads, u; 1 for a ring of all chips. Divides the axis, and the query and key
    /// heads that a chip has.
    pub exchange: usize,
    /// In which order tokens are kept: see [`Ring::order`].
    pub order: TokenOrder,
}

impl Ring<'_> {
    /// The order in which a causal mask gives equal work to `chips` chips of an axis of which `exchange` exchange heads.
    ///
    /// # Panics
    /// If `exchange` does not divide `chips`.
    pub fn order(tokens: usize, chips: usize, exchange: usize) -> TokenOrder {
        assert!(
            exchange > 0 && chips.is_multiple_of(exchange),
            "{exchange} chips that exchange heads do not divide {chips}"
        );
        match chips / exchange {
            1 => TokenOrder::Ascending,
            chips => TokenOrder::ZigZag { tokens, chips },
        }
    }
}

/// What the chips of an axis share, as one of them sees it.
struct Shares {
    op: Attention,
    axis: usize,
    /// Neighbours that exchange heads, and the ring of those at the same place in their blocks.
    block: Group,
    across: Group,
    order: TokenOrder,
    /// Tokens of the sequence.
    tokens: usize,
    placements: Placements,
    site: &'static Location<'static>,
}

impl Shares {
    /// Places of the tokens that ring member `member` holds.
    fn ring_tokens(&self, member: usize) -> Range<usize> {
        split(self.tokens, self.across.size(), member)
    }

    /// `p` with tokens split over the axis, unless it is of one chip.
    fn by_tokens(&self, p: &Placements) -> Placements {
        match self.across.size() * self.block.size() {
            1 => p.clone(),
            _ => p.with(self.axis, Shard(1)),
        }
    }

    fn runs(&self, member: usize) -> Vec<TokenRun> {
        self.order.runs(self.ring_tokens(member))
    }
}

/// An operand as the tape knows it.
struct Operand {
    tracked: Tracked,
    gradient: Placements,
}

impl Chip {
    /// [`Attention`] of q [b, t, h, d] over k and v [b, t, g, d], all split by tokens over the chips of `ring.axis`; with
    /// [`Attention::documents`] also the documents [b, t] in u32, split alike. Gives o [b, t, h, d], placed as q is.
    ///
    /// The next step's keys travel beside the computation of this one's; what the mask hides is neither computed nor counted.
    ///
    /// # Panics
    /// If shapes or placements do not fit; if `ring.exchange` does not divide the chips of the axis and the heads that a chip
    /// has; for a two-sided window, and an offset, which only whole sequences have.
    #[track_caller]
    pub fn ring_attention(&self, op: &Attention, operands: &[&Sharded], ring: &Ring) -> Sharded {
        let site = Location::caller();
        self.arrive("ring attention", site);
        let shares = self.shares(op, operands, ring, site);
        // The op has documents for queries and for keys; here they are one.
        let named: Vec<&Sharded> = operands.iter().chain(operands.get(3)).copied().collect();
        let types: Vec<TensorType> = named.iter().map(|x| x.global_type()).collect();
        let refuse = |why: String| -> ! { panic!("ring attention: {why} (called at {site})") };
        let inferred = op.infer(&types).unwrap_or_else(|why| refuse(why));
        // Over the other axes the op's own rule holds.
        let whole = |p: &Placements| p.with(shares.axis, Replicate);
        let placed: Vec<Placements> = named.iter().map(|x| whole(&x.placements)).collect();
        let placed: Vec<&Placements> = placed.iter().collect();
        let resolved =
            resolve(&op.axes(&types), &placed, self.mesh()).unwrap_or_else(|why| refuse(why));
        let tensors: Vec<Tensor> = operands.iter().map(|x| x.tensor.clone()).collect();
        let (o, kept) = shares.forward(self, &tensors);
        drop(tensors);
        let placements = shares.by_tokens(&resolved.outputs[0]);
        let global = inferred[0].shape.clone();
        let mut o = Sharded::unrecorded(self, o, global, placements);
        let operands = [0, 1, 2].map(|i| Operand {
            tracked: operands[i].tracked,
            gradient: shares.by_tokens(&resolved.gradients[i]),
        });
        self.record_ring(shares, kept, operands, &mut o);
        o
    }

    fn shares(
        &self,
        op: &Attention,
        operands: &[&Sharded],
        ring: &Ring,
        site: &'static Location<'static>,
    ) -> Shares {
        let axis = self.mesh().axis_index(ring.axis);
        // Which keys a chip meets in a step depends on where it is.
        self.coordinate(ring.axis);
        let group = self.group(axis);
        self.equal_shares(ring.axis, "ring attention", site);
        for x in operands {
            assert!(
                x.placements[axis] == Shard(1) || group.size() == 1,
                "ring attention over '{}' at {site} wants operands split by tokens, Shard(1), not {x:?}",
                ring.axis
            );
        }
        assert!(
            op.offset == 0 && op.offsets.is_none() && (op.window.is_none() || op.causal),
            "ring attention at {site}: {op:?} has an offset or a two-sided window, which need all tokens on a chip"
        );
        let u = ring.exchange;
        let mut counts = vec![("chips", group.size())];
        counts.extend(
            operands[..2]
                .iter()
                .map(|x| ("heads of a chip", x.tensor.shape()[2])),
        );
        for (what, n) in counts {
            assert!(
                u > 0 && n.is_multiple_of(u),
                "ring attention over '{}' at {site}: {u} chips that exchange heads do not divide {n} {what}",
                ring.axis
            );
        }
        let tokens = operands[0].shape()[1];
        if let TokenOrder::ZigZag { tokens: of, chips } = ring.order {
            assert_eq!(
                (of, chips),
                (tokens, group.size() / u),
                "ring attention at {site}: the order of tokens is another sequence's, {:?}",
                ring.order
            );
        }
        Shares {
            op: op.clone(),
            axis,
            block: group.block(u),
            across: group.across(u),
            order: ring.order,
            tokens,
            placements: operands[0].placements.clone(),
            site,
        }
    }

    fn record_ring(&self, shares: Shares, kept: Kept, operands: [Operand; 3], o: &mut Sharded) {
        let recording = self.inner().tape.borrow().is_some();
        if !recording || operands.iter().all(|x| x.tracked.value.is_none()) {
            return;
        }
        let value = self.new_value();
        let weight = operands.iter().all(|x| x.tracked.weight);
        o.tracked = Tracked {
            value: Some(value),
            leaf: None,
            weight,
            gradient: o.dtype(),
        };
        let result = Settled {
            value,
            global: o.global.clone(),
            placements: o.placements.clone(),
        };
        let scope = self.recorder().scope();
        let mut kept = Some(kept);
        self.push_node(Node {
            outputs: vec![value],
            has_inputs: true,
            has_weights: false,
            backward: Box::new(move |chip, gradients, pass| {
                if pass == Pass::Weights {
                    return;
                }
                chip.arrive("ring attention's backward", shares.site);
                chip.recorder().enter_scope(scope);
                chip.phase(Phase::Backward, || {
                    let kept = kept.take().expect("a node runs backward once");
                    shares.give_back(chip, gradients, &result, kept, &operands);
                });
                chip.recorder().leave();
            }),
        });
    }
}

impl Shares {
    fn give_back(
        &self,
        chip: &Chip,
        gradients: &mut Gradients,
        result: &Settled,
        kept: Kept,
        operands: &[Operand; 3],
    ) {
        let Some(dout) = chip.settle_value(gradients, result, self.site) else {
            return;
        };
        let computed = self.backward(chip, kept, dout);
        for (x, gradient) in operands.iter().zip(computed) {
            if x.tracked.value.is_some() {
                let gradient =
                    chip.gradient_as(&gradient, x.tracked.gradient, &x.gradient, self.site);
                let gradient = self.to_tokens(chip, gradient);
                chip.contribute(
                    gradients,
                    &x.tracked,
                    x.gradient.clone(),
                    gradient,
                    self.site,
                );
            }
        }
    }
}
