//! What a layer keeps for its backward, and what selective recomputation makes again instead.
//!
//! Named as in Megatron-Core's `recompute_modules` (its documentation, "Activation Recomputation"): `core_attn` is what
//! [`Recompute::Selective`] has meant since Korthikanti et al. 2022, `layernorm`, `mla_up_proj` and `moe_act` are [`Again`]. DeepSeek-V3
//! (arXiv:2412.19437) makes norms, up-projections and SwiGLU's results again (sections 3.2.3 and 3.3.3), and keeps narrow what
//! [`Stored::Narrow`] says.

use super::{Recompute, Shape, Task, stream};
use crate::cluster::Machine;
use crate::forecast::architecture::Block;
use crate::forecast::work::Rows;

/// Tokens of a tile that shares a scale in f32 (DeepSeek-V3, section 3.3.2).
const TILE: f64 = 128.0;

/// Activations that are made again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activations {
    /// None.
    No,
    /// Those of experts, shared ones too.
    Experts,
    /// All.
    All,
}

/// In what type values wait for their backward where products are narrower than 2 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stored {
    /// In 2 bytes.
    Wide,
    /// Inputs of products in the products' own type, as the forward made them (Transformer Engine). Attention keeps its result in 2
    /// bytes for its own gradients beside that.
    Inputs,
    /// These, inputs of experts' activations too, and attention's result once for both uses, in 12 bits (DeepSeek-V3, section 3.3.3).
    Narrow,
}

/// What [`Recompute::Selective`] makes again beside the core of unfused attention, and the type of what is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Again {
    /// Results of norms, from their inputs.
    pub norms: bool,
    /// Queries, keys and values of latent attention, from their latents.
    pub up_projections: bool,
    /// Results of activations, from their inputs.
    pub activations: Activations,
    /// The type of what is kept, whatever is made again.
    pub stored: Stored,
}

impl Again {
    /// What the stack of `machine` says; if it says nothing norms and up-projections of a model with latent attention (`latent`), and
    /// all is kept in 2 bytes.
    pub fn of(machine: &Machine, latent: bool) -> Again {
        let word = |field: &str| machine.stack.word(field);
        let or = |field: &str, default: bool| word(field).map_or(default, |w| w == "yes");
        Again {
            norms: or("stack.recompute_norms", latent),
            up_projections: latent && or("stack.recompute_up_projections", latent),
            activations: match word("stack.recompute_activations") {
                Some("experts") => Activations::Experts,
                Some("all") => Activations::All,
                _ => Activations::No,
            },
            stored: match word("stack.stored") {
                Some("inputs") => Stored::Inputs,
                Some("narrow") => Stored::Narrow,
                _ => Stored::Wide,
            },
        }
    }
}

impl Shape<'_> {
    /// Bytes of an element that a product reads, while it is kept.
    fn stored_input(&self) -> f64 {
        match self.size < 2.0 && self.again.stored != Stored::Wide {
            true => self.size + 4.0 / TILE,
            false => 2.0,
        }
    }

    /// The same of an element that an activation of experts reads.
    fn stored_activation(&self, experts: bool) -> f64 {
        match experts && self.again.stored == Stored::Narrow {
            true => self.stored_input(),
            false => 2.0,
        }
    }

    /// The same of attention's result, which its own gradients read (if fused) and the projection behind it.
    fn stored_result(&self) -> f64 {
        match (self.size < 2.0, self.fused, self.again.stored) {
            (false, ..) | (.., Stored::Wide) => 2.0,
            (true, false, _) => self.stored_input(),
            (true, true, Stored::Inputs) => 2.0 + self.stored_input(),
            (true, true, Stored::Narrow) => 1.5 + 4.0 / TILE,
        }
    }

    fn activation_again(&self, recompute: Recompute, experts: bool) -> bool {
        recompute == Recompute::Selective
            && match self.again.activations {
                Activations::No => false,
                Activations::Experts => experts,
                Activations::All => true,
            }
    }

    /// Bytes that a layer keeps for its backward on a chip.
    pub fn activation_bytes(&self, recompute: Recompute, block: Block) -> f64 {
        self.kept(recompute, block).iter().map(|k| k.1).sum()
    }

    /// [`Shape::activation_bytes`] by what is kept: of Korthikanti et al.'s model their equations 1 to 4, counted the same way for
    /// gated, grouped and latent ones and for experts.
    pub fn kept(&self, recompute: Recompute, block: Block) -> Vec<(&'static str, f64)> {
        let m = self.model;
        let (t, split) = (self.tp as f64, self.sequence_split() as f64);
        let tokens = self.tokens() as f64;
        let width = tokens * m.hidden as f64;
        if recompute == Recompute::Full {
            return vec![("stream", 2.0 * width / split)];
        }
        let selective = recompute == Recompute::Selective;
        let experts = m.has_experts(block);
        // Inputs of the two pairs of products, of which some may be gathered and kept so.
        let whole = self.kept_whole(!experts) as f64;
        let apart = if selective && self.again.norms {
            0.0
        } else {
            2.0 - whole
        };
        let mut kept = vec![
            ("stream", 4.0 * width / split),
            (
                "norms",
                self.stored_input() * width * (apart / split + whole),
            ),
        ];
        if self.dropout {
            kept.push(("masks", 2.0 * width / split));
        }
        kept.extend(self.kept_of_attention(selective));
        kept.extend(self.kept_of_feed_forward(recompute, experts));
        if !self.fused && !selective {
            let each = if self.dropout { 5.0 } else { 4.0 };
            let scores = self.batch * m.heads * self.context * self.context;
            kept.push(("scores", each * scores as f64 / (t * self.cp as f64)));
        }
        kept
    }

    fn kept_of_attention(&self, selective: bool) -> Vec<(&'static str, f64)> {
        let m = self.model;
        let (t, split) = (self.tp as f64, self.sequence_split() as f64);
        let tokens = self.tokens() as f64;
        let (q, kv, o) = m.widths();
        let kv = kv as f64 * self.kv_share() * t;
        let mut kept = vec![(
            "attention's result",
            self.stored_result() * tokens * o as f64 / t,
        )];
        if self.fused {
            // The logarithm of the sum of each row's exponentials, in f32.
            kept.push(("row sums", 4.0 * tokens * m.heads as f64 / t));
        }
        if !(selective && self.again.up_projections) {
            kept.push((
                "queries, keys and values",
                2.0 * tokens * (q as f64 + kv) / t,
            ));
        }
        if let Some(l) = m.latent {
            // What their norms read, and what the norms give to the up-projections.
            let down = (l.q_rank + l.kv_rank) as f64;
            let normed = if selective && self.again.norms {
                0.0
            } else {
                self.stored_input() * down
            };
            kept.push((
                "latents",
                tokens * (2.0 * (down + l.rope as f64) + normed) / split,
            ));
        }
        kept
    }

    fn kept_of_feed_forward(
        &self,
        recompute: Recompute,
        experts: bool,
    ) -> Vec<(&'static str, f64)> {
        let (m, t) = (self.model, self.tp as f64);
        let tokens = self.tokens() as f64;
        let mut kept = vec![];
        let between = match m.mixture.filter(|_| experts) {
            Some(e) => {
                // A copy of a token for every expert that it visits.
                let rows = tokens * e.per_token as f64 * self.imbalance;
                let copies = self.stored_input() * rows * m.hidden as f64;
                kept.push(("experts' inputs", copies / t));
                rows * e.ffn as f64 + tokens * e.shared_ffn as f64
            }
            None => tokens * m.ffn as f64,
        };
        let inputs = self.stored_activation(experts) * self.gates() as f64;
        kept.push(("activations' inputs", inputs * between / t));
        if !self.activation_again(recompute, experts) {
            kept.push(("activations' results", self.stored_input() * between / t));
        }
        kept
    }

    /// What is computed again for a layer's backward, part by part.
    pub fn again(&self, recompute: Recompute, block: Block) -> Vec<Vec<Task>> {
        match recompute {
            Recompute::None => vec![],
            Recompute::Full => self.forward_parts(block),
            Recompute::Selective => {
                let mut tasks = vec![];
                if self.activation_again(recompute, self.model.has_experts(block)) {
                    tasks.extend(self.activations_again(block));
                }
                if self.again.norms {
                    tasks.extend([self.norm(false), self.norm(false)]);
                }
                tasks.extend(self.latents_again());
                if !self.fused {
                    tasks.extend(self.core(false));
                }
                if tasks.is_empty() {
                    vec![]
                } else {
                    vec![tasks]
                }
            }
        }
    }

    /// Norms of latents, and products from them: with sequence parallelism the narrow vectors are gathered once more.
    fn latents_again(&self) -> Vec<Task> {
        let Some(l) = self.model.latent else {
            return vec![];
        };
        let mut tasks = vec![];
        if self.again.norms {
            let near = self.tokens().div_ceil(self.sequence_split());
            tasks.push(stream(
                Rows::Norm,
                4.0 * (near * (l.q_rank + l.kv_rank)) as f64,
            ));
        }
        if self.again.up_projections {
            tasks.extend(self.up_projections());
            tasks.extend(self.rotary());
        }
        tasks
    }
}
