//! What a transfer costs on a machine's network.
//!
//! Ranks lie on chips in order: rank r on chip r. A group of n chips, `stride` ranks apart, meets on the lowest level that
//! holds `n * stride` chips. Where several of its members share a lower level, the collective is hierarchical: reduce-scatter
//! below, the rest above on a share of the tensor, all-gather below (so the slow links carry the least). On one level it is the
//! better of a ring and of recursive halving (`n` of each: 2 (n-1) latencies or 2 log2 n, the same bytes), or the
//! measured curve where there is one. A group over several axes joined by `+` is a hierarchy too, the nearest axis below. Groups
//! that run beside each other each use the ports of their own chips; what a level's wiring leaves of them stands in [`links`].

mod exchange;
mod links;

use super::interval::{Class, Slower};
use super::work::Work;
use crate::cluster::{Curve, Level, Machine, Wiring};
use crate::collective::{Kind, Schedule, Step};
use crate::error::{Error, ErrorKind, Result};
use crate::mesh::Mesh;
use exchange::Exchanging;

/// A machine's network, ready to be asked.
#[derive(Clone, Debug)]
pub struct Network {
    levels: Vec<Level>,
    curves: Vec<Curve>,
    exchange: Exchanging,
}

/// Chips of a group, and ranks from one to the next.
type Members = (usize, usize);

impl Network {
    /// The network of `machine`.
    ///
    /// # Errors
    /// If a number is missing.
    pub fn of(machine: &Machine) -> Result<Network> {
        Ok(Network {
            levels: machine.levels()?,
            curves: machine.system.curves().to_vec(),
            exchange: Exchanging::of(machine),
        })
    }

    /// The same network with a class of transfers slower.
    pub fn slowed(mut self, slower: Slower) -> Network {
        let (links, curves) = (slower.of(Class::Links), slower.of(Class::Curves));
        for level in &mut self.levels {
            level.bandwidth /= links;
            level.latency *= links;
        }
        for point in self.curves.iter_mut().flat_map(|c| &mut c.points) {
            point.1 *= curves;
        }
        self.exchange.slow(links);
        self
    }

    /// Seconds of a transfer of `work` on `mesh`; 0 for a kernel.
    ///
    /// # Errors
    /// If the mesh has more chips than the machine joins.
    pub fn seconds(&self, mesh: &Mesh, work: &Work) -> Result<f64> {
        let Some(axis) = work.axis() else {
            return Ok(0.0);
        };
        let groups = members(mesh, axis);
        let Some(last) = groups.last() else {
            return Ok(0.0);
        };
        match work {
            Work::Collective { kind, bytes, .. } => self.over(*kind, &groups, *bytes),
            Work::Message { bytes, .. } => self.message(last.1, *bytes),
            Work::Ring { bytes, .. } => self.ring(*last, *bytes),
            Work::Exchange { .. } => self.exchange(&groups, work),
            _ => Ok(0.0),
        }
    }

    /// Whether so many chips can be joined.
    ///
    /// # Errors
    /// If not, with the most that can.
    pub fn fits(&self, chips: usize) -> Result<()> {
        self.level(chips).map(|_| ())
    }

    /// The position of the lowest level that joins `chips` chips in a row.
    fn level(&self, chips: usize) -> Result<usize> {
        let found = self.levels.iter().position(|l| l.chips >= chips);
        found.ok_or_else(|| {
            let most = self.levels.last().map_or(0, |l| l.chips);
            Error::new(
                ErrorKind::Mesh,
                format!("{chips} chips, but the machine joins at most {most}; use a smaller mesh"),
            )
        })
    }

    /// A message of `bytes` to the chip `distance` ranks further on.
    ///
    /// # Errors
    /// If the machine has no such chip.
    pub fn message(&self, distance: usize, bytes: f64) -> Result<f64> {
        let level = &self.levels[self.level(distance + 1)?];
        Ok(level.latency + bytes / links::pair(level))
    }

    /// Shares that travel once round a ring of `n` chips: n - 1 messages one after the other, each over the slowest level.
    fn ring(&self, (n, stride): Members, bytes: f64) -> Result<f64> {
        let level = &self.levels[self.level(n * stride)?];
        let share = bytes / n as f64;
        Ok((n - 1) as f64 * (level.latency + share / links::pair(level)))
    }

    /// A collective over groups within groups, the nearest first.
    fn over(&self, kind: Kind, groups: &[Members], bytes: f64) -> Result<f64> {
        let Some((first, rest)) = groups.split_first() else {
            return Ok(0.0);
        };
        let (n, stride) = *first;
        let near = |kind, bytes| self.collective(kind, n, stride, bytes);
        if rest.is_empty() {
            return near(kind, bytes);
        }
        let part = bytes / n as f64;
        let far = |bytes| self.over(kind, rest, bytes);
        Ok(match kind {
            Kind::AllReduce => {
                near(Kind::ReduceScatter, bytes)? + far(part)? + near(Kind::AllGather, bytes)?
            }
            Kind::ReduceScatter | Kind::AllGather => near(kind, bytes)? + far(part)?,
            Kind::AllToAll | Kind::Broadcast { .. } | Kind::Barrier => {
                near(kind, bytes)? + far(bytes)?
            }
            Kind::Shift => near(kind, bytes)?.max(far(bytes)?),
        })
    }

    /// A collective over `n` chips, `stride` ranks apart, of a tensor of `bytes` in all.
    ///
    /// # Errors
    /// If the machine has not as many chips.
    pub fn collective(&self, kind: Kind, n: usize, stride: usize, bytes: f64) -> Result<f64> {
        if n <= 1 {
            return Ok(0.0);
        }
        let top = self.level(n * stride)?;
        // Members in reach of each other below the top level.
        let near = (0..top).rev().find_map(|l| {
            let near = (self.levels[l].chips / stride).min(n);
            (near > 1 && n.is_multiple_of(near)).then_some(near)
        });
        let Some(q) = near.filter(|q| *q < n) else {
            return Ok(self.flat(kind, top, n, stride, bytes));
        };
        let below = |kind, bytes| self.collective(kind, q, stride, bytes);
        let above = |kind, bytes| self.flat(kind, top, n / q, stride * q, bytes);
        let whole = bytes;
        let part = bytes / q as f64;
        Ok(match kind {
            Kind::AllReduce => {
                below(Kind::ReduceScatter, whole)?
                    + above(kind, part)
                    + below(Kind::AllGather, whole)?
            }
            Kind::ReduceScatter | Kind::AllGather => below(kind, whole)? + above(kind, part),
            Kind::AllToAll => {
                // Each member keeps 1/n for itself; the rest goes to the neighbours and beyond at once, on different ports.
                let far = bytes * (n - q) as f64 / n as f64;
                let level = &self.levels[top];
                let beyond = (n - q) as f64 * level.latency + far / level.bandwidth;
                below(kind, bytes * q as f64 / n as f64)?.max(beyond)
            }
            Kind::Broadcast { .. } => above(kind, whole) + below(kind, whole)?,
            // The slowest of the messages, which go all at once, crosses the top level.
            Kind::Shift => {
                let level = &self.levels[top];
                level.latency + bytes / n as f64 / links::pair(level)
            }
            Kind::Barrier => above(kind, 0.0) + below(kind, 0.0)?,
        })
    }

    /// A collective on one level.
    fn flat(&self, kind: Kind, level: usize, n: usize, stride: usize, bytes: f64) -> f64 {
        // Behind a switch it does not matter how far apart the members are.
        let near = level == 0 && (stride == 1 || self.levels[0].wiring == Wiring::Switch);
        let measured = self
            .curves
            .iter()
            .filter(|c| near && c.kernel == "all-reduce");
        let measured = measured.min_by_key(|c| (c.group < n, c.group.abs_diff(n)));
        let halves = match kind {
            Kind::AllReduce => 1.0,
            Kind::ReduceScatter | Kind::AllGather => 0.5,
            _ => 0.0,
        };
        let level = &self.levels[level];
        if let (Some(curve), true) = (measured, halves > 0.0) {
            let sent = |n: usize| (n - 1) as f64 / n as f64;
            let seconds = halves * curve.at(bytes) * sent(n) / sent(curve.group);
            // Links may be set slower than those that were measured: no curve is faster than they.
            return seconds.max(on_links(kind, level, n, stride, bytes));
        }
        on_links(kind, level, n, stride, bytes)
    }
}

/// A collective by the links of its level.
fn on_links(kind: Kind, level: &Level, n: usize, stride: usize, bytes: f64) -> f64 {
    let bandwidth = links::group(level, kind, n, stride);
    if kind == Kind::AllReduce && level.reduces {
        // The switch adds: every chip sends its tensor once, and gets the sum once, at the same time.
        return 2.0 * level.latency + bytes / bandwidth;
    }
    closed_form(kind, n, bytes, level.latency, bandwidth)
}

/// The groups of rank 0 over the axes of `names`, joined by `+`: the nearest first, those that continue each other as one.
fn members(mesh: &Mesh, names: &str) -> Vec<Members> {
    let mut groups: Vec<Members> = names
        .split('+')
        .filter_map(|name| part(mesh, name))
        .filter(|(n, _)| *n > 1)
        .collect();
    groups.sort_by_key(|g| g.1);
    let mut joined: Vec<Members> = Vec::new();
    for (n, stride) in groups {
        match joined.last_mut() {
            Some((m, s)) if *m * *s == stride => *m *= n,
            _ => joined.push((n, stride)),
        }
    }
    joined
}

/// The group along an axis or, as `cp[..4]` and `cp[4..]`, a part of it; none if the mesh has no such axis.
fn part(mesh: &Mesh, name: &str) -> Option<Members> {
    let (axis, range) = match name.split_once('[') {
        Some((axis, range)) => (axis, range.trim_end_matches(']').split_once("..")),
        None => (name, None),
    };
    if mesh.size_of(axis) == 1 {
        return None;
    }
    let group = mesh.group(0, axis);
    let (n, stride) = (group.size(), group.stride());
    let block = |text: &str| text.parse().unwrap_or(1).clamp(1, n);
    Some(match range {
        Some(("", last)) => (block(last), stride),
        Some((first, _)) => (n / block(first), stride * block(first)),
        None => (n, stride),
    })
}

/// The better of ring and recursive halving over `n` chips, each with `bandwidth` to any other.
pub fn closed_form(kind: Kind, n: usize, bytes: f64, latency: f64, bandwidth: f64) -> f64 {
    let n = n as f64;
    let rounds = (n - 1.0).min(n.log2().ceil());
    let share = bytes * (n - 1.0) / n / bandwidth;
    match kind {
        Kind::AllReduce => 2.0 * (rounds * latency + share),
        Kind::ReduceScatter | Kind::AllGather => rounds * latency + share,
        Kind::AllToAll => (n - 1.0) * latency + share,
        Kind::Broadcast { .. } => (rounds + n - 1.0).min(2.0 * rounds) * latency + 2.0 * share,
        Kind::Shift => latency + bytes / n / bandwidth,
        Kind::Barrier => rounds * latency,
    }
}

/// Seconds of the lists of all chips of a group, walked round by round: a round lasts a latency and the bytes of its largest
/// sender. `size` is an element's bytes.
pub fn walk(lists: &[Schedule], size: f64, latency: f64, bandwidth: f64) -> f64 {
    let rounds = |list: &Schedule| -> Vec<usize> {
        let sent = list.steps.iter().filter_map(|step| match step {
            Step::Round { sends, .. } => Some(sends.iter().map(|s| s.place.len).sum()),
            _ => None,
        });
        sent.collect()
    };
    let all: Vec<Vec<usize>> = lists.iter().map(rounds).collect();
    let longest = all.iter().map(Vec::len).max().unwrap_or(0);
    let round = |r: usize| {
        let most = all
            .iter()
            .filter_map(|l| l.get(r))
            .max()
            .copied()
            .unwrap_or(0);
        latency + most as f64 * size / bandwidth
    };
    (0..longest).map(round).sum()
}
