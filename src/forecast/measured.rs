//! Curves of a machine's kernels and transfers, taken from the times in a real run's trace.
//!
//! Each op has a curve of its own, seconds over what it works on: operations for products and attention, bytes for what streams, the
//! bytes of the whole tensor for a collective. Events of a similar size (within a factor of the square root of 2) make one point, their
//! mean; a mean and no best, because a step is as long as the sum of all. What a collective waits for its partners is in it.

use super::work::Work;
use crate::cluster::{Curve, Trust};
use crate::trace::{Event, EventKind, Trace};
use std::collections::BTreeMap;

/// The size that an event's time depends on; none for a wait or what moves to one peer.
pub(super) fn amount(event: &Event) -> Option<(String, f64)> {
    if event.kind == EventKind::Op {
        let name = event.op.trim_end_matches(".backward");
        let amount = match name {
            "matmul" | "attention" => event.flops,
            _ => event.bytes,
        };
        return Some((event.op.to_string(), (amount as f64).max(1.0)));
    }
    match Work::of_event(event).first() {
        Some(Work::Collective { kind, bytes, .. }) => Some((kind.name().into(), bytes.max(1.0))),
        _ => None,
    }
}

/// Curves of everything that the latest steps of these runs timed, for a group of `chips`, and the seconds of each run's
/// latest step that no event accounts for, by event.
pub fn curves(traces: &[Trace], chips: usize, source: &str) -> Vec<Curve> {
    let mut buckets: BTreeMap<(String, i64), (f64, f64, f64)> = BTreeMap::new();
    for chip in traces.iter().flat_map(|t| &t.classes).map(|c| &c.chip) {
        let step = chip.latest.as_ref().or(chip.first.as_ref());
        for event in step.iter().flat_map(|s| &s.events) {
            let (Some(time), Some((name, amount))) = (event.time, amount(event)) else {
                continue;
            };
            let bucket = (2.0 * amount.log2()).round() as i64;
            let sum = buckets.entry((name, bucket)).or_default();
            sum.0 += amount;
            sum.1 += time.duration_ns as f64 * 1e-9;
            sum.2 += 1.0;
        }
    }
    let mut points: BTreeMap<String, Vec<(f64, f64)>> = BTreeMap::new();
    for ((name, _), (amount, seconds, count)) in buckets {
        let point = (amount / count, (seconds / count).max(1e-9));
        points.entry(name).or_default().push(point);
    }
    let curve = |(kernel, mut points): (String, Vec<(f64, f64)>)| {
        // Two points make a line; a single one stands for its rate.
        if let [(amount, seconds)] = points[..] {
            points.push((2.0 * amount, 2.0 * seconds));
        }
        Curve {
            kernel,
            group: chips,
            points,
            source: source.into(),
            trust: Trust::Fitted,
        }
    };
    points.into_iter().map(curve).collect()
}

/// Seconds of a step beside its events, for each of them: what the program does between kernels.
pub fn gap(trace: &Trace, step_seconds: f64) -> f64 {
    let chip = &trace.classes[0].chip;
    let step = chip.latest.as_ref().or(chip.first.as_ref());
    let events = || step.iter().flat_map(|s| &s.events);
    let timed: f64 = events()
        .filter_map(|e| e.time)
        .map(|t| t.duration_ns as f64 * 1e-9)
        .sum();
    ((step_seconds - timed) / events().count().max(1) as f64).max(0.0)
}
