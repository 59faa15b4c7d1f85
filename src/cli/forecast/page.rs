//! A forecast as a page: timeline, breakdown, memory, scaling.

use supernode::cluster::Machine;
use supernode::forecast::{Forecast, Setting};
use supernode::mesh::Mesh;
use supernode::pipeline::{Ran, Work};
use supernode::report::{Bar, Curve, Lane, Page, bars, curves, timeline};
use supernode::{Error, ErrorKind, Result};

/// Pieces that a page draws: more are narrower than a line.
const MOST_DRAWN: usize = 12_000;

/// The page of a training step.
pub(super) fn page(
    name: &str,
    setting: &Setting,
    machine: &Machine,
    f: &Forecast,
) -> Result<String> {
    let chips = setting.mesh.chips();
    let (low, high) = setting.interval(machine)?;
    let title = format!("{name} on {chips} chips of {}", machine.system.title);
    let mut page = Page::new(&title);
    let row = |name: &str, value: String| (name.to_string(), value);
    page.table(
        "The step",
        &[
            row("mesh", setting.mesh.to_string()),
            row(
                "seconds",
                format!(
                    "{:.4}, with 80 % between {low:.4} and {high:.4}",
                    f.step_seconds
                ),
            ),
            row(
                "tokens a second",
                format!("{:.0}", f.tokens / f.step_seconds),
            ),
            row(
                "TFLOP/s a chip",
                format!(
                    "{:.1}",
                    f.model_flops / f.step_seconds / chips as f64 / 1e12
                ),
            ),
            row(
                "share of the matmul peak",
                format!("{:.1} %", 100.0 * f.mfu),
            ),
            row(
                "sequences, tokens of each",
                format!("{}, {}", setting.global_batch, setting.context),
            ),
        ],
    );
    let says = "of the busiest stage, in seconds";
    page.figure("Where the step goes", says, &bars(&breakdown(f)));
    let gb = |bytes: f64| format!("{:.1} GB", bytes / 1e9);
    let memory: Vec<Bar> = f
        .memory
        .causes()
        .iter()
        .map(|(name, bytes)| bar(name, *bytes, gb(*bytes)))
        .chain(
            machine
                .chip
                .find("memory.capacity")
                .map(|c| bar("the chip has", c, gb(c))),
        )
        .collect();
    page.figure("Memory of the fullest chip", "by cause", &bars(&memory));
    page.figure(
        "The pipeline",
        "every stage's passes; point at one for its micro-batch. Of a long step only the beginning is drawn.",
        &timeline(&lanes(f), &["forward", "backward", "input gradient", "weight gradient", "update"]),
    );
    let scaling = scaling(setting, machine)?;
    page.figure(
        "Scaling",
        "more chips along dp: the same batch (strong), and a batch that grows with them (weak)",
        &curves(&scaling, "chips", "tokens a second"),
    );
    Ok(page.render())
}

fn bar(name: &str, value: f64, label: String) -> Bar {
    Bar {
        name: name.into(),
        value,
        label,
    }
}

fn breakdown(f: &Forecast) -> Vec<Bar> {
    let share = |seconds: f64| format!("{seconds:.4} s, {:.1} %", 100.0 * seconds / f.step_seconds);
    let kernels = f.compute_seconds.iter().map(|(k, s)| (k.to_string(), *s));
    let waits = f
        .exposed
        .iter()
        .map(|(k, s)| (format!("waits for {k}"), *s));
    let rest = [
        ("bubble".to_string(), f.bubble_seconds),
        ("slow chips".to_string(), f.straggler_seconds),
    ];
    let all = kernels.chain(waits).chain(rest);
    all.map(|(name, seconds)| bar(&name, seconds, share(seconds)))
        .collect()
}

fn lanes(f: &Forecast) -> Vec<Lane> {
    let each = MOST_DRAWN / f.timeline.len().max(1);
    let cut = f.timeline.iter().any(|ran| ran.len() > each);
    let last = f
        .timeline
        .iter()
        .flatten()
        .map(|r| r.end)
        .fold(0.0, f64::max);
    let lane = |(stage, ran): (usize, &Vec<Ran>)| {
        let mut spans: Vec<_> = ran
            .iter()
            .take(each)
            .map(|r| {
                let (kind, name) = match r.piece.work {
                    Work::Forward => (0, "forward"),
                    Work::Backward => (1, "backward"),
                    Work::Inputs => (2, "input gradient"),
                    Work::Weights => (3, "weight gradient"),
                };
                let says = format!(
                    "{name} of micro-batch {}, chunk {}",
                    r.piece.micro, r.piece.chunk
                );
                (r.start, r.end, kind, says)
            })
            .collect();
        if !cut {
            spans.push((
                last,
                f.step_seconds,
                4,
                "gradients over dp, optimizer, slow chips".into(),
            ));
        }
        Lane {
            name: format!("stage {stage}"),
            spans,
        }
    };
    f.timeline.iter().enumerate().map(lane).collect()
}

/// The setting with other numbers of chips along dp, as far as they divide.
fn scaling(setting: &Setting, machine: &Machine) -> Result<Vec<Curve>> {
    let dp = setting.mesh.size_of("dp");
    let with = |dp: usize, batch: usize| {
        let axes = setting.mesh.axes().iter().map(|a| {
            let size = if a.name() == "dp" { dp } else { a.size() };
            (a.name().to_string(), size)
        });
        Setting {
            mesh: Mesh::new(axes.collect::<Vec<_>>()),
            global_batch: batch,
            ..setting.clone()
        }
    };
    if !setting.mesh.has("dp") {
        let why = "the scaling curves need an axis dp in --mesh";
        return Err(Error::new(ErrorKind::Mesh, why));
    }
    let mut sizes: Vec<(usize, usize)> = Vec::new();
    for power in 0..=12 {
        let factor = 1usize << (power / 2);
        match power % 2 {
            0 => sizes.push((dp * factor, setting.global_batch * factor)),
            _ if dp.is_multiple_of(factor * 2)
                && setting.global_batch.is_multiple_of(factor * 2) =>
            {
                sizes.push((dp / factor / 2, setting.global_batch / factor / 2));
            }
            _ => {}
        }
    }
    sizes.sort_unstable();
    let curve = |name: &str, grows: bool| {
        let point = |(dp, batch): &(usize, usize)| {
            let batch = if grows { *batch } else { setting.global_batch };
            let s = with(*dp, batch);
            // What does not divide or join has no point.
            let f = s.price_only(machine).ok()?;
            Some((s.mesh.chips() as f64, f.tokens / f.step_seconds))
        };
        Curve {
            name: name.into(),
            points: sizes.iter().filter_map(point).collect(),
        }
    };
    Ok(vec![
        curve("the same batch", false),
        curve("a growing batch", true),
    ])
}
