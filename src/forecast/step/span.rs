//! Seconds of a list of tasks.

use super::Setting;
use crate::cluster::Machine;
use crate::error::Result;
use crate::forecast::interval::{Class, Slower};
use crate::forecast::kernel::Rates;
use crate::forecast::network::Network;
use crate::forecast::program::{Beside, Task};
use crate::forecast::schedule::Pipeline;
use crate::mesh::Mesh;
use std::collections::BTreeMap;

/// Seconds of a list of tasks: in all, of gradients of weights, by kernel, and waiting for each axis.
#[derive(Clone, Debug, Default)]
pub(in super::super) struct Span {
    pub seconds: f64,
    pub weights: f64,
    pub kernels: BTreeMap<&'static str, f64>,
    pub exposed: BTreeMap<String, f64>,
}

impl Span {
    pub(crate) fn add(&mut self, other: &Span, times: f64) {
        self.seconds += times * other.seconds;
        self.weights += times * other.weights;
        for (k, s) in &other.kernels {
            *self.kernels.entry(k).or_default() += times * s;
        }
        for (k, s) in &other.exposed {
            *self.exposed.entry(k.clone()).or_default() += times * s;
        }
    }

    /// Waits for an axis, the first of several joined by `+`, whole or a part.
    pub(crate) fn wait(&mut self, axis: &str, seconds: f64) {
        self.seconds += seconds;
        if seconds > 0.0 {
            let first = axis.split(['+', '[']).next().unwrap_or(axis);
            *self.exposed.entry(first.into()).or_default() += seconds;
        }
    }

    /// Computes, or keeps the chip from it.
    pub(crate) fn work(&mut self, name: &'static str, seconds: f64) {
        if seconds <= 0.0 {
            return;
        }
        self.seconds += seconds;
        *self.kernels.entry(name).or_default() += seconds;
    }
}

/// Everything that prices need of a machine and a mesh.
pub(in super::super) struct Prices<'a> {
    pub rates: Rates,
    pub network: Network,
    pub mesh: &'a Mesh,
    overlap: Option<&'a str>,
    /// Whether tokens travel to experts while other micro-batches compute.
    experts_beside: bool,
    /// Share of the chip that a transfer takes from the kernel beside it.
    interference: f64,
    /// Seconds between one kernel and the next.
    gap: f64,
    /// Whether each part of a layer begins on an idle chip and is waited for.
    alone: bool,
}

impl<'a> Prices<'a> {
    pub(crate) fn of(mesh: &'a Mesh, machine: &'a Machine, dtype: &str) -> Result<Prices<'a>> {
        let overlap = machine.stack.word("stack.tp_overlap");
        Ok(Prices {
            rates: Rates::of(machine, dtype)?,
            network: Network::of(machine)?,
            mesh,
            overlap,
            experts_beside: machine.stack.word("stack.exchange_overlap") == Some("yes"),
            interference: machine.stack.value("stack.interference")?.clamp(0.0, 0.9),
            gap: machine.stack.find("stack.gap").unwrap_or(0.0),
            alone: machine.stack.word("stack.parts") == Some("alone"),
        })
    }

    /// With a class of work slower.
    pub(crate) fn slowed(mut self, slower: Slower) -> Self {
        self.rates = self.rates.slowed(slower);
        self.network = self.network.slowed(slower);
        self.gap *= slower.of(Class::Launch);
        self
    }

    fn hides(&self, beside: Beside) -> bool {
        matches!(
            (beside, self.overlap),
            (Beside::Always, _) | (_, Some("all")) | (Beside::Backward, Some("backward"))
        )
    }

    /// The parts of a pass through a layer, one after another.
    pub(crate) fn parts(&self, parts: &[Vec<Task>]) -> Result<Span> {
        if !self.alone {
            return self.span(&parts.concat());
        }
        let mut sum = Span::default();
        for part in parts {
            sum.add(&self.span(part)?, 1.0);
        }
        Ok(sum)
    }

    /// Tasks one after another. A transfer that may hide does so behind the one kernel that follows it; exchanges of tokens behind
    /// everything, if other micro-batches compute meanwhile. Where the host launches kernels slower than they run it decides, and
    /// transfers come on top: one begins when the last of its chips has been told to. A host that runs ahead is never waited for
    /// in the long run, `max(launches, kernels)`; from an idle chip a kernel begins when it has been launched and the one before it has
    /// ended.
    pub(crate) fn span(&self, tasks: &[Task]) -> Result<Span> {
        let mut span = Span::default();
        let mut beside: Vec<(&str, f64)> = vec![];
        let (mut exchanged, mut launches, mut end) = (0.0, 0, 0.0f64);
        let slowed = self.interference / (1.0 - self.interference);
        for task in tasks {
            let Some(axis) = task.work.axis() else {
                let alone = self.rates.seconds(&task.work);
                launches += 1;
                let moving: f64 = beside.iter().map(|(_, moves)| moves).sum();
                let mut busy = alone + slowed * moving.min(alone);
                span.work(task.work.name(), busy);
                end = end.max(self.rates.launch * launches as f64) + busy;
                if task.weight {
                    span.weights += busy;
                }
                for (axis, moves) in beside.drain(..) {
                    span.wait(axis, (moves - busy).max(0.0));
                    busy = (busy - moves).max(0.0);
                }
                continue;
            };
            let moves = self.network.seconds(self.mesh, &task.work)?;
            match task.beside {
                Beside::Experts if self.experts_beside => exchanged += moves,
                how if self.hides(how) => beside.push((axis, moves)),
                _ => span.wait(axis, moves),
            }
        }
        for (axis, moves) in beside {
            span.wait(axis, moves);
        }
        if exchanged > 0.0 {
            let kernels: f64 = span.kernels.values().sum();
            span.work("interference", slowed * exchanged.min(kernels));
            span.wait("ep", (exchanged - kernels).max(0.0));
        }
        if self.gap > 0.0 {
            span.work("launch", self.gap * tasks.len() as f64);
        }
        let kernels: f64 = span.kernels.values().sum();
        let last = match self.alone {
            true => end,
            false => self.rates.launch * launches as f64,
        };
        let behind = last - kernels;
        if behind > 0.0 {
            span.work("launch", behind);
        }
        Ok(span)
    }
}

impl Setting {
    pub(in super::super) fn prices<'a>(&'a self, machine: &'a Machine) -> Result<Prices<'a>> {
        let mut prices = Prices::of(&self.mesh, machine, &self.dtype)?;
        // Two directions exist for nothing else.
        prices.experts_beside |= self.pipeline == Pipeline::DualPipe;
        Ok(prices)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::forecast::work::Work;

    #[test]
    fn a_transfer_hides_behind_the_next_kernel_only_if_software_says_so() {
        let mesh = Mesh::new([("tp", 8)]);
        let kernel = Task::from(Work::matmul(8192, 8192, 8192));
        let move_ = Task {
            beside: Beside::Backward,
            ..Task::from(Work::Collective {
                kind: crate::collective::Kind::AllGather,
                axis: "tp".into(),
                bytes: 1e8,
            })
        };
        let seconds = |word: &str| {
            let mut machine = Machine::named("dgx-a100").unwrap();
            machine.set("stack.tp_overlap", word).unwrap();
            machine.set("stack.interference", "0").unwrap();
            let prices = Prices::of(&mesh, &machine, "bf16").unwrap();
            prices.span(&[move_.clone(), kernel.clone()]).unwrap()
        };
        let (none, beside) = (seconds("none"), seconds("backward"));
        assert!(none.exposed["tp"] > 0.0 && !beside.exposed.contains_key("tp"));
        assert!(beside.seconds < none.seconds);
    }
}
