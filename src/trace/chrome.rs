//! Events in Chrome's trace format ("Trace Event Format"), which Perfetto opens too: a process per chip, a thread per
//! stream, and one for copies through host memory. A ghost has no times; its events are a microsecond long, one after another, so
//! that their order can be seen.

use super::{ChipTrace, Product, Stream, Time, Trace};
use crate::mesh::Axis;
use serde_json::{Value as Json, json};

/// Tracks of a chip: its two streams, and copies through host memory.
const COMPUTE: usize = 0;
const COMMUNICATION: usize = 1;
const COPIES: usize = 2;

/// A viewer gains nothing from thousands of equal chips.
const MOST_CHIPS: usize = 64;

impl Trace {
    /// The kept events as entries of `traceEvents`, for up to 64 chips (a ghost: one chip per class).
    pub fn chrome_events(&self) -> Vec<Json> {
        let mut out = Vec::new();
        for (number, class) in self.classes.iter().take(MOST_CHIPS).enumerate() {
            let coordinate = |(axis, at): (&Axis, &Option<usize>)| match at {
                Some(i) => format!("{}={i}", axis.name()),
                None => format!("{}=*", axis.name()),
            };
            let axes = self.mesh.axes();
            let name: Vec<String> = axes.iter().zip(&class.pattern).map(coordinate).collect();
            let name = format!("chip {}", name.join(","));
            out.push(
                json!({"ph": "M", "name": "process_name", "pid": number, "args": {"name": name}}),
            );
            if let Some(tiles) = &class.chip.tiles {
                let labels = tiles.to_string();
                out.push(json!({"ph": "M", "name": "process_labels", "pid": number, "args": {"labels": labels}}));
            }
            let mut tracks = vec![(COMPUTE, "compute"), (COMMUNICATION, "communication")];
            if class.chip.host.is_some() {
                tracks.push((COPIES, "copies through host memory"));
            }
            for (track, name) in tracks {
                let args = json!({"name": name});
                out.push(json!({"ph": "M", "name": "thread_name", "pid": number, "tid": track, "args": args}));
            }
            chip_events(&class.chip, number, &mut out);
        }
        out
    }
}

/// Begin and length of a time, as viewers count.
fn microseconds(time: Time) -> (f64, f64) {
    (time.start_ns as f64 / 1e3, time.duration_ns as f64 / 1e3)
}

fn chip_events(chip: &ChipTrace, pid: usize, out: &mut Vec<Json>) {
    for (order, event) in chip.events().enumerate() {
        let (start, length) = event.time.map_or((order as f64, 1.0), microseconds);
        let shapes = |values: &[super::Value]| -> Vec<String> {
            values
                .iter()
                .map(|v| format!("{} {}", v.ty, v.placement))
                .collect()
        };
        let mut args = json!({
            "scope": chip.scope(event), "site": chip.site(event), "inputs": shapes(&event.inputs),
            "outputs": shapes(&event.outputs), "flops": event.flops, "bytes": event.bytes,
        });
        if let Some(t) = &event.traffic {
            args["axis"] = json!(t.axis);
            args["sent_bytes"] = json!(t.bytes);
        }
        if !event.host.is_empty() {
            let [to_host, to_device] = event.host_bytes();
            args["to_host_bytes"] = json!(to_host);
            args["to_device_bytes"] = json!(to_device);
        }
        if !event.products.is_empty() {
            let cut: Vec<String> = chip.products_of(event).map(Product::to_string).collect();
            args["products"] = json!(cut);
        }
        let thread = match event.stream {
            Stream::Compute => COMPUTE,
            Stream::Communication => COMMUNICATION,
        };
        out.push(json!({
            "ph": "X", "name": &*event.op, "cat": format!("{:?}", event.phase).to_lowercase(),
            "pid": pid, "tid": thread, "ts": start, "dur": length, "args": args,
        }));
        for copy in &event.host {
            let (start, length) = copy.time.map_or((start, length), microseconds);
            let name = if copy.to_host { "to host" } else { "to device" };
            let args = json!({"bytes": copy.bytes, "number": copy.number, "op": &*event.op});
            out.push(json!({
                "ph": "X", "name": name, "cat": "copy", "pid": pid, "tid": COPIES, "ts": start, "dur": length, "args": args,
            }));
        }
    }
}
