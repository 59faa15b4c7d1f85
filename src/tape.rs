//! Reverse mode: a list of nodes, each of which knows how to send gradients from its results to its operands.
//!
//! The tape knows neither ops nor collectives. Whoever computes a value pushes a node with a closure; the tape runs the
//! closures in reverse order and keeps the gradients in between. A gradient is a chip's share with its placements, and
//! contributions to one value are kept apart by placement: those that are partial sums over chips add up locally, and
//! are reduced once, where the value was made (see `placement`).
//!
//! A closure runs in one of three passes, so that the gradients of inputs can travel on before those of weights are
//! computed (zero-bubble pipelines: Qi et al., arXiv:2401.10241).

use crate::placement::Placements;
use crate::tensor::Tensor;
use std::collections::HashMap;

/// Which gradients a node computes when it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    /// Those of inputs and of weights, at once.
    Both,
    /// Those of inputs; the node runs again for its weights.
    Inputs,
    /// Those of weights, after [`Pass::Inputs`].
    Weights,
}

/// The identity of a value on a tape; unique on its chip for the whole run.
pub type ValueId = u64;

/// Contributions to the gradients of values, by value and by placement.
#[derive(Debug, Default)]
pub struct Gradients {
    of: HashMap<ValueId, Vec<(Placements, Tensor)>>,
}

impl Gradients {
    /// True if anything was contributed to the value's gradient.
    pub fn has(&self, value: ValueId) -> bool {
        self.of.contains_key(&value)
    }

    /// Removes and returns all contributions to a value's gradient; at most one per placement.
    pub fn take(&mut self, value: ValueId) -> Vec<(Placements, Tensor)> {
        self.of.remove(&value).unwrap_or_default()
    }

    /// Removes and returns the contribution with this placement.
    pub fn take_placed(&mut self, value: ValueId, placements: &Placements) -> Option<Tensor> {
        let held = self.of.get_mut(&value)?;
        let at = held.iter().position(|(p, _)| p == placements)?;
        let (_, tensor) = held.swap_remove(at);
        if held.is_empty() {
            self.of.remove(&value);
        }
        Some(tensor)
    }

    /// Puts a contribution. Panics if one with the same placement is there: take it first and add.
    pub fn put(&mut self, value: ValueId, placements: Placements, tensor: Tensor) {
        let held = self.of.entry(value).or_default();
        assert!(
            held.iter().all(|(p, _)| *p != placements),
            "contributions of one placement are added before they are put"
        );
        held.push((placements, tensor));
    }
}

/// What a node does when the tape runs backward: reads its results' gradients, puts its operands'.
pub type Backward<C> = Box<dyn FnMut(&C, &mut Gradients, Pass)>;

/// One computation.
pub struct Node<C> {
    /// The values that it made.
    pub outputs: Vec<ValueId>,
    /// True if some operand is a value that is no weight.
    pub has_inputs: bool,
    /// True if some operand is a weight.
    pub has_weights: bool,
    /// Sends gradients from results to operands.
    pub backward: Backward<C>,
}

/// Nodes in program order. `C` is what closures are given to compute with: a chip.
pub struct Tape<C> {
    nodes: Vec<Node<C>>,
    deferred: Vec<Node<C>>,
}

impl<C> Default for Tape<C> {
    fn default() -> Self {
        Tape {
            nodes: Vec::new(),
            deferred: Vec::new(),
        }
    }
}

impl<C> Tape<C> {
    /// Appends a node.
    pub fn push(&mut self, node: Node<C>) {
        self.nodes.push(node);
    }

    /// Nodes that have not run.
    pub fn len(&self) -> usize {
        self.nodes.len() + self.deferred.len()
    }

    /// True if every node has run.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Runs all nodes in reverse; what each has saved is freed as it ends. Nodes whose results have no gradient are
    /// dropped.
    pub fn backward(&mut self, chip: &C, gradients: &mut Gradients) {
        while let Some(mut node) = self.nodes.pop() {
            if node.outputs.iter().any(|&v| gradients.has(v)) {
                (node.backward)(chip, gradients, Pass::Both);
            }
        }
    }

    /// Runs all nodes in reverse for the gradients of inputs alone; weights wait for
    /// [`Tape::backward_weights`].
    pub fn backward_inputs(&mut self, chip: &C, gradients: &mut Gradients) {
        while let Some(mut node) = self.nodes.pop() {
            // A node of weights only (a cast of a parameter) gets its gradient in the second pass.
            if !node.has_inputs {
                self.deferred.push(node);
            } else if node.outputs.iter().any(|&v| gradients.has(v)) {
                let pass = if node.has_weights {
                    Pass::Inputs
                } else {
                    Pass::Both
                };
                (node.backward)(chip, gradients, pass);
                if node.has_weights {
                    self.deferred.push(node);
                }
            }
        }
    }

    /// Runs what [`Tape::backward_inputs`] left: the gradients of weights, in the same order.
    pub fn backward_weights(&mut self, chip: &C, gradients: &mut Gradients) {
        for mut node in self.deferred.drain(..) {
            let pass = if node.has_inputs {
                Pass::Weights
            } else {
                Pass::Both
            };
            if node.has_inputs || node.outputs.iter().any(|&v| gradients.has(v)) {
                (node.backward)(chip, gradients, pass);
            }
        }
    }
}
