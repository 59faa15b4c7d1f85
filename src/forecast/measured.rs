//! Curves of a machine's kernels and transfers, taken from the times in a real run's trace.
//!
//! Each op has a curve of its own, seconds over what it works on: operations for products and attention, bytes for what streams, the
//! bytes of the whole tensor for a collective. Events of a similar size (within a factor of the square root of 2) make one point, their
//! mean; a mean and no best, because a step is as long as the sum of all. What a collective waits for its partners is in it; one that
//! runs beside computation has another curve (`.beside`) than one that the program stands still for.

use super::work::Work;
use crate::cluster::{Curve, Trust};
use crate::trace::{Class, Event, EventKind, Stream, Trace};
use std::collections::{BTreeMap, HashMap};

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
    let Some(Work::Collective { kind, bytes, .. }) = Work::of_event(event).into_iter().next()
    else {
        return None;
    };
    let beside = match event.stream {
        Stream::Communication => ".beside",
        Stream::Compute => "",
    };
    Some((format!("{}{beside}", kind.name()), bytes.max(1.0)))
}

/// Curves of everything that the latest steps of these runs timed: of ops while `chips` chips compute, of collectives by the size of
/// their group.
pub fn curves(traces: &[Trace], chips: usize, source: &str) -> Vec<Curve> {
    type Key = (String, usize, i64);
    let mut buckets: BTreeMap<Key, (f64, f64, f64)> = BTreeMap::new();
    for event in traces.iter().flat_map(|t| &t.classes).flat_map(latest) {
        let (Some(time), Some((name, amount))) = (event.time, amount(event)) else {
            continue;
        };
        let group = event.traffic.as_ref().map_or(chips, |t| t.chips);
        let bucket = (2.0 * amount.log2()).round() as i64;
        let sum = buckets.entry((name, group, bucket)).or_default();
        sum.0 += amount;
        sum.1 += time.duration_ns as f64 * 1e-9;
        sum.2 += 1.0;
    }
    let mut points: BTreeMap<(String, usize), Vec<(f64, f64)>> = BTreeMap::new();
    for ((name, group, _), (amount, seconds, count)) in buckets {
        let point = (amount / count, (seconds / count).max(1e-9));
        points.entry((name, group)).or_default().push(point);
    }
    let curve = |((kernel, group), mut points): ((String, usize), Vec<(f64, f64)>)| {
        // Two points make a line; a single one stands for its rate.
        if let [(amount, seconds)] = points[..] {
            points.push((2.0 * amount, 2.0 * seconds));
        }
        Curve {
            kernel,
            group,
            points,
            source: source.into(),
            trust: Trust::Fitted,
        }
    };
    points.into_iter().map(curve).collect()
}

fn latest(class: &Class) -> impl Iterator<Item = &Event> {
    let step = class.chip.latest.as_ref().or(class.chip.first.as_ref());
    step.into_iter().flat_map(|s| &s.events)
}

/// Seconds of a step of `step_seconds` that the first chip's program spends between its events, for each of them. A transfer beside
/// computation takes none of its program's time but for its wait.
pub fn gap(trace: &Trace, step_seconds: f64) -> f64 {
    let account: f64 = account(trace).values().sum();
    let events = trace.classes.first().map_or(0, |c| latest(c).count());
    ((step_seconds - account) / events.max(1) as f64).max(0.0)
}

/// Seconds that the latest step of the first chip's program spent in each kernel, and standing still for each axis.
pub fn account(trace: &Trace) -> BTreeMap<String, f64> {
    let mut seconds = BTreeMap::new();
    let mut axes = HashMap::new();
    for event in trace.classes.first().into_iter().flat_map(latest) {
        let axis = event.traffic.as_ref().map(|t| t.axis.clone());
        if let (Some(ticket), Some(axis)) = (event.ticket, &axis) {
            axes.insert(ticket, axis.clone());
        }
        if event.stream == Stream::Communication {
            continue;
        }
        let name = match event.kind {
            EventKind::Op => Work::of_event(event)
                .first()
                .map_or("elementwise".into(), |w| w.name().into()),
            _ => {
                let waited = event.ticket.and_then(|t| axes.get(&t).cloned());
                axis.or(waited).unwrap_or_default()
            }
        };
        let time = event.time.map_or(0.0, |t| t.duration_ns as f64 * 1e-9);
        *seconds.entry(name).or_default() += time;
    }
    seconds
}
