//! Multi-head latent attention (DeepSeek-AI 2024, arXiv:2405.04434, section 2.1): keys and values come from a latent of few
//! elements a token, which is all that a cache has to keep.
//!
//! With x [b, t, c], heads h, and for each head n elements without and r with a position (the second shared by all heads among
//! keys), v of values:
//!
//! ```text
//! latent  = norm(x Wdkv[.. kv_rank])                     [b, t, kv_rank]
//! rope    = turn(x Wdkv[kv_rank ..])                     [b, t, r]
//! k_i     = latent Wuk_i, rope                           [b, t, n + r]     for each head i
//! v_i     = latent Wuv_i                                 [b, t, v]
//! q_i     = (norm(x Wdq) Wuq_i)[.. n], turn(the rest)    [b, t, n + r]
//! o       = sum over i of softmax(q_i k_i / sqrt(n + r)) v_i Wo_i
//! ```
//!
//! tp splits heads: the ways down to the latents are whole on every chip, those up are split by columns. Kernels know one
//! size of a head, so values are filled up with zeros to n + r and cut again. A text that grows by a token needs no keys and values:
//! see `absorbed`.

use super::Transformer;
use crate::error::{Error, ErrorKind, Result};
use crate::ops;
use crate::placement::Placement::Shard;
use crate::spmd::{Chip, Init, Sharded};
use serde::{Deserialize, Serialize};

/// Sizes of latent attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Latent {
    /// Elements of the latent that queries come from; none if they come straight from the residual stream.
    #[serde(default, alias = "q_lora_rank")]
    pub q_rank: Option<usize>,
    /// Elements of the latent that keys and values come from.
    #[serde(alias = "kv_lora_rank")]
    pub kv_rank: usize,
    /// Elements of a head that are turned by their position, r.
    #[serde(alias = "qk_rope_head_dim")]
    pub rope_dim: usize,
    /// Elements of a head that are not, n.
    #[serde(alias = "qk_nope_head_dim")]
    pub nope_dim: usize,
    /// Elements of a head of values, v.
    #[serde(alias = "v_head_dim")]
    pub v_dim: usize,
}

impl Latent {
    /// Elements of a head of queries and keys.
    pub fn head_dim(&self) -> usize {
        self.nope_dim + self.rope_dim
    }

    /// Parameters of one block's attention of h heads over a residual stream of width c, the way back included.
    pub(super) fn parameters(&self, c: usize, h: usize) -> usize {
        let q = h * self.head_dim();
        let queries = match self.q_rank {
            Some(rank) => c * rank + rank + rank * q,
            None => c * q,
        };
        let down = c * (self.kv_rank + self.rope_dim) + self.kv_rank;
        let up = self.kv_rank * h * (self.nope_dim + self.v_dim);
        queries + down + up + h * self.v_dim * c
    }

    /// Checks the sizes against each other.
    pub(super) fn check(&self) -> Result<()> {
        let input = |why: String| Err(Error::new(ErrorKind::Input, why));
        let sizes = [
            ("q-lora-rank", self.q_rank.unwrap_or(1)),
            ("kv-lora-rank", self.kv_rank),
            ("rope-head-dim", self.rope_dim),
            ("nope-head-dim", self.nope_dim),
            ("v-head-dim", self.v_dim),
        ];
        if let Some((name, _)) = sizes.iter().find(|(_, n)| *n == 0) {
            return input(format!(
                "latent attention with {name} 0; it needs at least 1"
            ));
        }
        if !self.rope_dim.is_multiple_of(2) {
            return input(format!(
                "rotary positions turn pairs, rope-head-dim {} is odd; {} is even",
                self.rope_dim,
                self.rope_dim + 1
            ));
        }
        if self.head_dim() > 256 || self.v_dim > self.head_dim() {
            return input(format!(
                "latent attention with heads of {} elements (nope-head-dim {} and rope-head-dim {}) and values of {}; heads \
                 have at most 256, and values at most as many as heads",
                self.head_dim(),
                self.nope_dim,
                self.rope_dim,
                self.v_dim
            ));
        }
        Ok(())
    }
}

/// What latent attention keeps of a token for those that come after it: `kv_rank + r` elements, whatever the heads.
#[derive(Clone, Debug)]
pub struct KeyLatent {
    /// The normalized latent [b, t, kv_rank].
    pub latent: Sharded,
    /// The part of the keys that all heads share, turned by its position: [b, t, r].
    pub rope: Sharded,
}

impl Transformer {
    pub(super) fn latent_attention(
        &self,
        chip: &Chip,
        name: &str,
        l: &Latent,
        x: &Sharded,
    ) -> Sharded {
        let (b, t, h) = (x.shape()[0], x.shape()[1], self.config.heads);
        let x = self.whole_over_tp(chip, x);
        let q = self.latent_queries(chip, name, l, &x);
        let kept = self.key_latent(chip, name, l, &x);
        drop(x);
        let all = self.past.as_ref().map(|past| KeyLatent {
            latent: self.kept(chip, &format!("{name}.latent"), &kept.latent, past),
            rope: self.kept(chip, &format!("{name}.rope"), &kept.rope, past),
        });
        let now = self.attends_now(chip);
        let kept = all.filter(|_| !now).unwrap_or(kept);
        let o = match &self.past {
            Some(past) if self.absorbs(&q, l) => {
                self.attend_latents(chip, name, l, &q, &kept, past)
            }
            _ => self.attend_to_keys(chip, name, l, q, kept),
        };
        let o = o.reshape([b, t, h * l.v_dim]);
        let shape = [h * l.v_dim, self.config.hidden];
        let (weight, bias) = (format!("{name}.wo"), format!("{name}.bo"));
        self.row(chip, &weight, Some(&bias), shape, &o)
    }

    /// Attention [b, t, h, v] of queries [b, t, h, n + r] over keys and values that are made of what was kept.
    fn attend_to_keys(
        &self,
        chip: &Chip,
        name: &str,
        l: &Latent,
        q: Sharded,
        kept: KeyLatent,
    ) -> Sharded {
        let (k, v) = self.keys_and_values(chip, name, l, &kept);
        drop(kept);
        let missing = l.head_dim() - l.v_dim;
        let v = match missing {
            0 => v,
            after => {
                let pad = ops::Pad {
                    axis: 3,
                    before: 0,
                    after,
                };
                chip.apply_one(pad, &[&v])
            }
        };
        let o = match &self.past {
            Some(past) if !self.attends_now(chip) => self.attend_kept(chip, [q, k, v], past),
            _ => self.attend_now(chip, [q, k, v]),
        };
        match missing {
            0 => o,
            _ => part(chip, &o, 3, 0..l.v_dim),
        }
    }

    /// Queries [b, t, h, n + r] from [b, t, c], heads split over tp.
    fn latent_queries(&self, chip: &Chip, name: &str, l: &Latent, x: &Sharded) -> Sharded {
        let (c, h, d) = (self.config.hidden, self.config.heads, l.head_dim());
        let (b, t) = (x.shape()[0], x.shape()[1]);
        let heads = |x: &Sharded, which: &str, rank: usize| {
            let placed = chip.placed(&[("tp", Shard(1))]);
            let name = format!("{name}.{which}");
            let weight = self.weight(chip, &name, &[rank, h * d], placed, Init::normal(0.02));
            x.matmul(&weight).reshape([b, t, h, d])
        };
        let q = match l.q_rank {
            None => heads(x, "wq", c),
            Some(rank) => {
                let down = self.down(chip, &format!("{name}.q_down"), [c, rank]);
                let latent = self.normed(chip, &format!("{name}.q_norm"), &x.matmul(&down));
                heads(&latent, "q_up", rank)
            }
        };
        let still = part(chip, &q, 3, 0..l.nope_dim);
        let turned = self.turned(chip, part(chip, &q, 3, l.nope_dim..d));
        chip.apply_one(ops::Concatenate { axis: 3 }, &[&still, &turned])
    }

    /// What keys and values are made of, from [b, t, c]: a cache keeps this and nothing else.
    #[track_caller]
    pub fn key_latent(&self, chip: &Chip, name: &str, l: &Latent, x: &Sharded) -> KeyLatent {
        let (b, t) = (x.shape()[0], x.shape()[1]);
        let width = l.kv_rank + l.rope_dim;
        let weight = self.down(
            chip,
            &format!("{name}.kv_down"),
            [self.config.hidden, width],
        );
        let both = x.matmul(&weight);
        let latent = part(chip, &both, 2, 0..l.kv_rank);
        let rope = part(chip, &both, 2, l.kv_rank..width);
        let rope = self.turned(chip, rope.reshape([b, t, 1, l.rope_dim]));
        KeyLatent {
            latent: self.normed(chip, &format!("{name}.kv_norm"), &latent),
            rope: rope.reshape([b, t, l.rope_dim]),
        }
    }

    /// Keys [b, t, h, n + r] and values [b, t, h, v] of what was kept, heads split over tp.
    #[track_caller]
    pub fn keys_and_values(
        &self,
        chip: &Chip,
        name: &str,
        l: &Latent,
        kept: &KeyLatent,
    ) -> (Sharded, Sharded) {
        let [b, t, _] = kept.latent.shape()[..] else {
            panic!(
                "a latent is [b, t, kv-lora-rank], this one is {:?}",
                kept.latent
            )
        };
        let (h, width) = (self.config.heads, l.nope_dim + l.v_dim);
        let placed = chip.placed(&[("tp", Shard(1))]);
        let (name, shape) = (format!("{name}.kv_up"), [l.kv_rank, h * width]);
        let weight = self.weight(chip, &name, &shape, placed, Init::normal(0.02));
        let up = kept.latent.matmul(&weight).reshape([b, t, h, width]);
        let still = part(chip, &up, 3, 0..l.nope_dim);
        let k = chip.apply_one(ops::JoinHeads, &[&still, &kept.rope]);
        (k, part(chip, &up, 3, l.nope_dim..width))
    }

    fn down(&self, chip: &Chip, name: &str, shape: [usize; 2]) -> Sharded {
        self.weight(chip, name, &shape, chip.replicated(), Init::normal(0.02))
    }

    /// A latent, normalized over its elements.
    fn normed(&self, chip: &Chip, name: &str, x: &Sharded) -> Sharded {
        let width = x.shape()[2];
        let weight = chip.parameter(name, [width], chip.replicated(), Init::ones());
        let op = ops::RmsNorm {
            eps: self.config.eps,
            weight: true,
        };
        chip.apply_one(op, &[x, &weight])
    }
}

pub(super) fn part(
    chip: &Chip,
    x: &Sharded,
    axis: usize,
    range: std::ops::Range<usize>,
) -> Sharded {
    chip.apply_one(ops::SliceAxis { axis, range }, &[x])
}
