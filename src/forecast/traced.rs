//! The price of a ghost's trace: its events replayed on two streams.

use super::kernel::Rates;
use super::network::Network;
use super::work::Work;
use crate::cluster::{Curve, Machine};
use crate::error::Result;
use crate::trace::{Event, EventKind, Stream, Trace};
use std::collections::{BTreeMap, HashMap};

/// What the chips of one class take.
#[derive(Clone, Debug)]
pub struct ClassPrice {
    /// The class's coordinates, none where they do not matter.
    pub pattern: Vec<Option<usize>>,
    /// Seconds of its latest step, or of the whole program if it has no steps.
    pub seconds: f64,
    /// Seconds of kernels, by kernel.
    pub compute: BTreeMap<&'static str, f64>,
    /// Seconds in which it waits for the network, by axis.
    pub exposed: BTreeMap<String, f64>,
    /// Highest number of live bytes.
    pub peak_bytes: u64,
}

/// What a trace takes: its classes, of which the slowest decides.
#[derive(Clone, Debug)]
pub struct TracePrice {
    /// By class, as in the trace.
    pub classes: Vec<ClassPrice>,
}

impl TracePrice {
    /// Seconds of the slowest class.
    pub fn seconds(&self) -> f64 {
        self.classes.iter().map(|c| c.seconds).fold(0.0, f64::max)
    }
}

/// Prices each class of `trace` on `machine`, matmuls at the peak of `dtype`.
///
/// Collectives and messages are met at once by all of a class; a chip of another class that comes late is not waited for, so the
/// slowest class is a lower bound of a run in which classes differ.
///
/// # Errors
/// A number that the machine does not have, or more chips than it joins.
pub fn price_trace(trace: &Trace, machine: &Machine, dtype: &str) -> Result<TracePrice> {
    let rates = Rates::of(machine, dtype)?;
    let network = Network::of(machine)?;
    let measured = Measured(machine.system.curves());
    let gap = machine.stack.find("stack.gap").unwrap_or(0.0);
    let mut classes = Vec::new();
    for class in &trace.classes {
        let step = class.chip.latest.as_ref().or(class.chip.first.as_ref());
        let events = step.map_or(&class.chip.outside, |s| &s.events);
        let mut price = ClassPrice {
            pattern: class.pattern.clone(),
            seconds: 0.0,
            compute: BTreeMap::new(),
            exposed: BTreeMap::new(),
            peak_bytes: class.chip.peak_bytes,
        };
        let mut tickets = HashMap::new();
        let mut wire = 0.0f64;
        let mut launches = 0;
        for event in events {
            if gap > 0.0 {
                price.seconds += gap;
                *price.compute.entry("launch").or_default() += gap;
            }
            if event.kind == EventKind::Wait {
                if let Some((axis, end)) = event.ticket.and_then(|t| tickets.remove(&t)) {
                    wait_until(&mut price, axis, end);
                }
                continue;
            }
            if let Some(busy) = measured.seconds(event) {
                launches += event.traffic.is_none() as usize;
                // A transfer beside computation is over when its wait finds it so.
                match event.traffic.as_ref().map(|t| t.axis.clone()) {
                    Some(axis) if beside(event) => {
                        wire = wire.max(price.seconds) + busy;
                        if let Some(ticket) = event.ticket {
                            tickets.insert(ticket, (axis, wire));
                        }
                    }
                    Some(axis) => {
                        let end = price.seconds + busy;
                        wait_until(&mut price, axis, end);
                    }
                    None => {
                        price.seconds += busy;
                        let works = Work::of_event(event);
                        let name = works.first().map_or("elementwise", |w| w.name());
                        *price.compute.entry(name).or_default() += busy;
                    }
                }
                continue;
            }
            for work in Work::of_event(event) {
                launches += work.axis().is_none() as usize;
                let moves = network.seconds(&trace.mesh, &work)?;
                match work.axis().map(axis_of) {
                    Some(axis) if beside(event) => {
                        wire = wire.max(price.seconds) + moves;
                        if let Some(ticket) = event.ticket {
                            tickets.insert(ticket, (axis, wire));
                        }
                    }
                    Some(axis) => {
                        let end = price.seconds + moves;
                        wait_until(&mut price, axis, end);
                    }
                    None => {
                        let busy = rates.seconds(&work);
                        price.seconds += busy;
                        *price.compute.entry(work.name()).or_default() += busy;
                    }
                }
            }
        }
        price.seconds = price.seconds.max(wire);
        // As in a generated step: where the host is slower than the kernels it decides, and transfers come on top.
        let kernels: f64 = price.compute.values().sum();
        let behind = rates.launch * launches as f64 - kernels;
        if behind > 0.0 {
            price.seconds += behind;
            *price.compute.entry("launch").or_default() += behind;
        }
        classes.push(price);
    }
    Ok(TracePrice { classes })
}

/// Curves of ops by their names, which a machine has that `calibrate` measured.
struct Measured<'a>(&'a [Curve]);

impl Measured<'_> {
    fn seconds(&self, event: &Event) -> Option<f64> {
        let (name, amount) = super::measured::amount(event)?;
        let chips = event.traffic.as_ref().map(|t| t.chips);
        // Without curves of ops the machine was not calibrated, and its all-reduces belong to its network.
        self.0.iter().find(|c| c.kernel == "matmul")?;
        let known = |c: &&Curve| c.kernel == name && chips.is_none_or(|n| n == c.group);
        let curve = self.0.iter().find(known)?;
        // Below the first point an op costs in proportion too, but never less than half of it.
        let first = curve.points[0];
        Some(match amount < first.0 {
            true => first.1 * (amount / first.0).max(0.5),
            false => curve.at(amount),
        })
    }
}

/// The axis of a part of it, `cp[..2]`: where time is waited for.
fn axis_of(name: &str) -> String {
    name.split('[').next().unwrap_or(name).into()
}

fn beside(event: &Event) -> bool {
    event.stream == Stream::Communication
}

fn wait_until(price: &mut ClassPrice, axis: String, end: f64) {
    let waited = (end - price.seconds).max(0.0);
    price.seconds += waited;
    *price.exposed.entry(axis).or_default() += waited;
}
