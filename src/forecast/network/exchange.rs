//! Tokens to experts and back: an all-to-all whose messages stay with the neighbours or leave them.
//!
//! A chip sends `tokens * copies` rows. Their destinations are spread evenly, so of a group of `n` members, `q` of which a level
//! holds, that level carries `(q - q_below) / n` of the rows. Levels that are different ports work at once, levels that share a
//! chip's ports one after the other. Software that removes duplicates (DeepEP) sends a token once to every node that it visits and
//! copies it there; of N nodes a token with k experts meets `N (1 - (1 - 1/N)^k)`, or at most those that its groups lie on.

use super::{Members, Network};
use crate::cluster::Machine;
use crate::error::Result;
use crate::forecast::expert::rounds;
use crate::forecast::work::Work;

/// What a machine and its software say about exchanges.
#[derive(Clone, Debug)]
pub(super) struct Exchanging {
    once_a_node: bool,
    /// Share of the links' bandwidth that an exchange reaches.
    share: f64,
    /// Measured rates of narrow and of 2-byte elements: bytes a second within a node, and beyond it.
    measured: [Option<(f64, f64)>; 2],
}

impl Exchanging {
    pub(super) fn of(machine: &Machine) -> Exchanging {
        let rate = |kind: &str| {
            let find = |side: &str| machine.system.find(&format!("exchange.{kind}.{side}"));
            Some((find("near")?, find("far")?))
        };
        Exchanging {
            once_a_node: machine.stack.word("stack.exchange") == Some("deduplicated"),
            share: machine.system.find("exchange.share").unwrap_or(1.0),
            measured: [rate("narrow"), rate("wide")],
        }
    }
}

impl Exchanging {
    /// Measured rates lower by a factor.
    pub(super) fn slow(&mut self, by: f64) {
        for (near, far) in self.measured.iter_mut().flatten() {
            (*near, *far) = (*near / by, *far / by);
        }
    }
}

impl Network {
    /// Seconds of an exchange over `groups`, the nearest first.
    pub(super) fn exchange(&self, groups: &[Members], work: &Work) -> Result<f64> {
        let Work::Exchange {
            tokens,
            copies,
            token_bytes,
            groups: (all, some),
            narrow,
            ..
        } = work
        else {
            return Ok(0.0);
        };
        let n: usize = groups.iter().map(|g| g.0).product();
        let span = groups.iter().map(|g| g.0 * g.1).max().unwrap_or(1);
        let top = self.level(span)?;
        // Members that level l holds.
        let held: Vec<usize> = (0..=top)
            .map(|l| match l == top {
                true => n,
                false => groups
                    .iter()
                    .map(|g| (self.levels[l].chips / g.1).clamp(1, g.0))
                    .product(),
            })
            .collect();
        let row = tokens * token_bytes;
        let copies = *copies as f64;
        let latency = rounds(n, self.levels[top].latency);
        if let Some((near, far)) = self.exchange.measured[!narrow as usize] {
            let within = (held[0] - 1) as f64 / n as f64;
            let beyond = (n - held[0]) as f64 / n as f64;
            return Ok(latency + row * copies * (within / near + beyond / far));
        }
        let (mut together, mut apart) = (0.0f64, 0.0);
        let mut below = 1;
        for (l, q) in held.iter().enumerate() {
            let rows = match (self.exchange.once_a_node, l) {
                (true, l) if l > 0 => {
                    let nodes = n as f64 / held[0] as f64;
                    let reach = (nodes * *some as f64 / *all as f64).max(1.0);
                    let met = reach * (1.0 - (1.0 - 1.0 / reach).powf(copies));
                    let here = (q - below) as f64 / (n - held[0]).max(1) as f64;
                    met * (1.0 - 1.0 / nodes) * here
                }
                (true, _) => copies * (q - 1) as f64 / *q as f64,
                _ => copies * (q - below) as f64 / n as f64,
            };
            let level = &self.levels[l];
            let seconds = row * rows / (level.bandwidth * self.exchange.share);
            match level.shared {
                true => apart += seconds,
                false => together = together.max(seconds),
            }
            below = *q;
        }
        Ok(latency + together.max(apart))
    }
}
