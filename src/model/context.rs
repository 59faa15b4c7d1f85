//! How cp splits a sequence: who attends to what, and in which order chips keep tokens.

use super::config::nearest_divisor;
use super::{Config, Transformer};
use crate::error::{Error, ErrorKind, Result};
use crate::mesh::Mesh;
use crate::placement::Placement::Shard;
use crate::placement::TokenOrder;
use crate::spmd::{Chip, Contents, InOrder, Ring, Sharded};
use std::fmt;
use std::sync::Arc;

/// How the chips along cp compute attention over all tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ContextMethod {
    /// Keys and values travel around all chips; tokens are kept in zigzag order. Any number of heads.
    Ring,
    /// Tokens are exchanged for heads, of which every chip gets some: cp divides the query and key heads that tp leaves.
    Ulysses,
    /// So many neighbours exchange heads, and a ring joins the blocks of neighbours; as many as heads and cp allow if none
    /// is given, which sends the fewest bytes. If that is all of cp it is Ulysses.
    Usp {
        /// Neighbours that exchange heads.
        exchange: Option<usize>,
    },
}

impl fmt::Display for ContextMethod {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ContextMethod::Ring => f.write_str("ring"),
            ContextMethod::Ulysses => f.write_str("ulysses"),
            ContextMethod::Usp { exchange: None } => f.write_str("usp"),
            ContextMethod::Usp { exchange: Some(u) } => write!(f, "usp, {u} exchange heads"),
        }
    }
}

impl ContextMethod {
    /// Neighbours along cp that exchange tokens for heads: 1 in a ring of all, all of cp in Ulysses.
    ///
    /// # Errors
    /// [`ErrorKind::Mesh`] if the heads do not allow it: which number stands in the way, and the nearest that works.
    fn exchange(self, config: &Config, mesh: &Mesh) -> Result<usize> {
        let (tp, cp) = (mesh.size_of("tp"), mesh.size_of("cp"));
        let heads = [
            ("heads", config.heads / tp, config.heads),
            ("kv-heads", config.key_heads() / tp, config.key_heads()),
        ];
        let refuse = |why: String| Err(Error::new(ErrorKind::Mesh, why));
        match self {
            _ if cp == 1 => Ok(1),
            ContextMethod::Ring => Ok(1),
            ContextMethod::Ulysses => match heads.iter().find(|(_, left, _)| left % cp != 0) {
                Some((name, left, n)) => refuse(format!(
                    "mesh axis cp={cp} does not divide the {left} {name} that tp={tp} leaves of {n}, as ulysses has to; cp={} \
                     does, or --cp-method ring",
                    nearest_divisor(*left, cp)
                )),
                None => Ok(cp),
            },
            ContextMethod::Usp { exchange: None } => {
                let fits = |u: &usize| {
                    cp.is_multiple_of(*u) && heads.iter().all(|(_, n, _)| n.is_multiple_of(*u))
                };
                Ok((1..=cp).rev().find(fits).unwrap_or(1))
            }
            ContextMethod::Usp { exchange: Some(u) } => {
                let numbers = [
                    ("chips of cp", cp),
                    ("heads of a chip", heads[0].1),
                    ("kv-heads of a chip", heads[1].1),
                ];
                match numbers.iter().find(|(_, n)| u == 0 || n % u != 0) {
                    Some((name, n)) => refuse(format!(
                        "{u} chips that exchange heads do not divide the {n} {name}; {} do",
                        nearest_divisor(*n, u.max(1))
                    )),
                    None => Ok(u),
                }
            }
        }
    }

    /// Ulysses where cp divides the heads that tp leaves, else the ring.
    fn default_for(config: &Config, mesh: &Mesh) -> Self {
        match ContextMethod::Ulysses.exchange(config, mesh) {
            Ok(_) => ContextMethod::Ulysses,
            Err(_) => ContextMethod::Ring,
        }
    }
}

impl Transformer {
    /// How cp splits attention; if none, [`ContextMethod::Ulysses`] where cp divides the heads that tp leaves, else
    /// [`ContextMethod::Ring`].
    pub fn with_context_method(mut self, method: Option<ContextMethod>) -> Self {
        self.context_method = method;
        self
    }

    /// How cp splits attention on this mesh.
    pub fn context_method(&self, mesh: &Mesh) -> ContextMethod {
        let default = || ContextMethod::default_for(&self.config, mesh);
        self.context_method.unwrap_or_else(default)
    }

    /// Checks the model's numbers against each other and against a mesh, the way in which cp splits it included.
    ///
    /// # Errors
    /// [`ErrorKind::Input`] or [`ErrorKind::Mesh`]: which number stands in the way, and the nearest that works.
    pub fn check(&self, mesh: &Mesh) -> Result<()> {
        self.config.check(mesh)?;
        self.context_method(mesh).exchange(&self.config, mesh)?;
        Ok(())
    }

    fn exchange(&self, mesh: &Mesh) -> usize {
        let found = self.context_method(mesh).exchange(&self.config, mesh);
        found.unwrap_or_else(|why| panic!("{why}"))
    }

    /// The order in which the chips of cp keep the tokens of a batch [b, t].
    ///
    /// # Panics
    /// If [`Transformer::check`] refuses the mesh.
    pub fn token_order(&self, mesh: &Mesh, tokens: usize) -> TokenOrder {
        Ring::order(tokens, mesh.size_of("cp"), self.exchange(mesh))
    }

    /// A batch's token numbers or labels [b, t], given in the order of the text, placed as [`Transformer::batch_placement`]
    /// says and kept as [`Transformer::token_order`] says.
    #[track_caller]
    pub fn batch<C: Contents + ?Sized>(
        &self,
        chip: &Chip,
        name: &str,
        shape: [usize; 2],
        contents: &C,
    ) -> Sharded {
        let order = self.token_order(chip.mesh(), shape[1]);
        let contents = InOrder(contents, order);
        chip.input(name, shape, Self::batch_placement(chip), &contents)
    }

    /// The order of the tokens of x [b, t, ..]: a text that every chip of cp holds whole is in its own.
    pub(super) fn order_of(&self, chip: &Chip, x: &Sharded) -> TokenOrder {
        match self.splits_tokens(chip, x) {
            true => self.token_order(chip.mesh(), x.shape()[1]),
            false => TokenOrder::Ascending,
        }
    }

    /// Where x [b, t, ..] keeps the token of each position of the text; none if it keeps them in that order.
    pub(super) fn places(&self, chip: &Chip, x: &Sharded) -> Option<Arc<[u32]>> {
        let order = self.order_of(chip, x);
        if order == TokenOrder::Ascending {
            return None;
        }
        let positions = order.positions(0..x.shape()[1]);
        let mut places = vec![0; positions.len()];
        for (kept, position) in positions.into_iter().enumerate() {
            places[position] = kept as u32;
        }
        Some(places.into())
    }

    pub(super) fn splits_tokens(&self, chip: &Chip, x: &Sharded) -> bool {
        chip.size_of("cp") > 1 && x.placements()[chip.mesh().axis_index("cp")] == Shard(1)
    }

    /// The ring in which these queries attend; none if the chip will have all tokens of some heads.
    pub(super) fn ring(&self, chip: &Chip, q: &Sharded) -> Option<Ring<'static>> {
        let exchange = self.exchange(chip.mesh());
        (self.splits_tokens(chip, q) && exchange < chip.size_of("cp")).then(|| Ring {
            axis: "cp",
            exchange,
            order: self.order_of(chip, q),
        })
    }
}
