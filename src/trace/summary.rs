//! Totals of a trace, and the table that a person reads.

use super::{ChipTrace, Event, EventKind, Trace};
use serde::{Deserialize, Serialize};
use std::fmt::Write;
use std::sync::Arc;

/// What all calls of one op amount to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpTotal {
    /// The op.
    pub op: Arc<str>,
    /// Calls.
    pub calls: u64,
    /// Floating-point operations: a step of a large model has more than 64 bits count.
    pub flops: u128,
    /// Bytes read and written on the chip.
    pub bytes: u64,
    /// Nanoseconds; 0 in a ghost.
    pub duration_ns: u64,
}

/// What all calls of one collective, send or receive along one axis amount to, for one chip.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CollectiveTotal {
    /// The collective.
    pub op: Arc<str>,
    /// The mesh axis.
    pub axis: String,
    /// Calls.
    pub calls: u64,
    /// Bytes sent by the chip.
    pub bytes: u64,
    /// The least that any point-to-point algorithm could send, in bytes.
    pub floor_bytes: u64,
    /// Bytes of the calls that ran beside computation.
    pub overlapped_bytes: u64,
    /// Nanoseconds; 0 in a ghost.
    pub duration_ns: u64,
}

impl ChipTrace {
    /// Adds an event to the totals.
    pub(super) fn count(&mut self, event: &Event) {
        let duration_ns = event.time.map_or(0, |t| t.duration_ns);
        self.peak_scratch_bytes = self.peak_scratch_bytes.max(event.scratch);
        for copy in &event.host {
            self.host.get_or_insert_default().add(copy);
        }
        if let Some(traffic) = &event.traffic {
            let found = self
                .collectives
                .iter()
                .position(|c| c.op == event.op && c.axis == traffic.axis);
            let at = found.unwrap_or_else(|| {
                self.collectives.push(CollectiveTotal {
                    op: event.op.clone(),
                    axis: traffic.axis.clone(),
                    calls: 0,
                    bytes: 0,
                    floor_bytes: 0,
                    overlapped_bytes: 0,
                    duration_ns: 0,
                });
                self.collectives.len() - 1
            });
            let total = &mut self.collectives[at];
            total.calls += 1;
            total.bytes = total.bytes.saturating_add(traffic.bytes);
            total.floor_bytes = total.floor_bytes.saturating_add(traffic.floor_bytes);
            if event.stream == super::Stream::Communication {
                total.overlapped_bytes += traffic.bytes;
            }
            total.duration_ns += duration_ns;
        } else if event.kind == EventKind::Op {
            let found = self.ops.iter().position(|o| o.op == event.op);
            let at = found.unwrap_or_else(|| {
                let op = event.op.clone();
                self.ops.push(OpTotal {
                    op,
                    calls: 0,
                    flops: 0,
                    bytes: 0,
                    duration_ns: 0,
                });
                self.ops.len() - 1
            });
            let total = &mut self.ops[at];
            total.calls += 1;
            total.flops += u128::from(event.flops);
            total.bytes = total.bytes.saturating_add(event.bytes);
            total.duration_ns = total.duration_ns.saturating_add(duration_ns);
        }
    }
}

/// `1234567` as `1.23 M`: three digits and a decimal prefix.
pub(crate) fn short(n: impl Into<u128>) -> String {
    let mut value = n.into() as f64;
    for prefix in ["", "k", "M", "G", "T", "P", "E"] {
        if value < 999.5 || prefix == "E" {
            let digits = if prefix.is_empty() || value >= 99.95 {
                0
            } else if value >= 9.995 {
                1
            } else {
                2
            };
            return format!("{value:.digits$} {prefix}");
        }
        value /= 1000.0;
    }
    unreachable!("the last prefix always returns")
}

impl Trace {
    /// A table of what ran and what moved: for the class of rank 0 the ops by time (or flops), on a graphics processor its
    /// products by sizes with the tile that they took, then for each collective and axis calls, bytes, floor bytes and the overlapped
    /// share, what went through host memory, then each class's peak memory.
    pub fn summary(&self) -> String {
        let mut out = String::new();
        let chip = self.chip(0);
        let classes = self.classes.len();
        let _ = writeln!(
            out,
            "{} chips ({}), world {}, {classes} class(es)",
            self.mesh.chips(),
            self.mesh,
            self.world
        );
        let mut ops: Vec<&OpTotal> = chip.ops.iter().collect();
        ops.sort_by_key(|o| std::cmp::Reverse((o.duration_ns, o.flops, o.bytes)));
        let _ = writeln!(
            out,
            "{:<28}{:>8}{:>12}{:>12}{:>12}",
            "op (chip 0)", "calls", "flop", "bytes", "ms"
        );
        for o in ops {
            let ms = o.duration_ns as f64 / 1e6;
            let _ = writeln!(
                out,
                "{:<28}{:>8}{:>12}{:>12}{ms:>12.2}",
                o.op,
                o.calls,
                short(o.flops),
                short(o.bytes)
            );
        }
        chip.list_products(&mut out);
        if !chip.collectives.is_empty() {
            let head = [
                "moved (chip 0)",
                "axis",
                "calls",
                "bytes",
                "floor",
                "overlap",
            ];
            let _ = writeln!(
                out,
                "{:<20}{:>8}{:>8}{:>12}{:>12}{:>12}",
                head[0], head[1], head[2], head[3], head[4], head[5]
            );
        }
        for c in &chip.collectives {
            let share = if c.bytes == 0 {
                0.0
            } else {
                100.0 * c.overlapped_bytes as f64 / c.bytes as f64
            };
            let (bytes, floor) = (short(c.bytes), short(c.floor_bytes));
            let _ = writeln!(
                out,
                "{:<20}{:>8}{:>8}{bytes:>12}{floor:>12}{share:>10.0} %",
                c.op, c.axis, c.calls
            );
        }
        if let Some(copies) = chip.host.filter(|c| c.to_host + c.to_device > 0) {
            let took = |ns: u64| match ns {
                0 => String::new(),
                _ => format!(" in {:.2} ms", ns as f64 / 1e6),
            };
            let _ = writeln!(
                out,
                "through host memory (chip 0): {}B from the device{}, {}B to it{}",
                short(copies.to_host),
                took(copies.to_host_ns),
                short(copies.to_device),
                took(copies.to_device_ns)
            );
        }
        let peak = self
            .classes
            .iter()
            .map(|c| c.chip.peak_bytes)
            .max()
            .unwrap_or(0);
        let scratch = self
            .classes
            .iter()
            .map(|c| c.chip.peak_scratch_bytes)
            .max()
            .unwrap_or(0);
        let _ = writeln!(
            out,
            "peak memory per chip: {}B of tensors, {}B of scratch",
            short(peak),
            short(scratch)
        );
        out
    }

    /// Totals of collectives over the run, for the chip of rank 0.
    pub fn collectives(&self) -> &[CollectiveTotal] {
        &self.chip(0).collectives
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn short_numbers_have_three_digits() {
        let cases = [
            (0u64, "0 "),
            (999, "999 "),
            (1000, "1.00 k"),
            (12_345, "12.3 k"),
            (999_600, "1.00 M"),
            (123_456_789, "123 M"),
        ];
        for (n, want) in cases {
            assert_eq!(super::short(n), want);
        }
    }
}
