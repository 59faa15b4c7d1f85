//! A forecast's pipeline in Chrome's trace format, which Perfetto opens: a process per stage.

use super::step::Forecast;
use crate::pipeline::Work;
use serde_json::{Value, json};

/// Pieces beyond which a viewer shows nothing more: the first ones of each stage are kept.
const MOST_PIECES: usize = 200_000;

impl Forecast {
    /// The step as an object with `traceEvents`: every stage's forwards and backwards, in microseconds, and what follows them.
    pub fn chrome_trace(&self) -> Value {
        let mut events = Vec::new();
        let each = MOST_PIECES / self.timeline.len().max(1);
        let mut last = 0.0f64;
        for (stage, ran) in self.timeline.iter().enumerate() {
            let name = format!("stage {stage}");
            events.push(
                json!({"ph": "M", "name": "process_name", "pid": stage, "args": {"name": name}}),
            );
            last = ran.iter().map(|r| r.end).fold(last, f64::max);
            for r in ran.iter().take(each) {
                let kind = match r.piece.work {
                    Work::Forward => "forward",
                    Work::Backward => "backward",
                    Work::Inputs => "input gradient",
                    Work::Weights => "weight gradient",
                };
                events.push(json!({
                    "ph": "X", "name": format!("{kind} {}", r.piece.micro), "cat": kind, "pid": stage, "tid": 0,
                    "ts": r.start * 1e6, "dur": (r.end - r.start) * 1e6,
                    "args": {"chunk": r.piece.chunk, "micro_batch": r.piece.micro},
                }));
            }
        }
        for stage in 0..self.timeline.len() {
            events.push(json!({
                "ph": "X", "name": "gradients over dp, optimizer", "cat": "update", "pid": stage, "tid": 0,
                "ts": last * 1e6, "dur": (self.step_seconds - last) * 1e6,
            }));
        }
        json!({"traceEvents": events, "displayTimeUnit": "ms"})
    }
}
