//! The ghost gives every chip's events and peak memory exactly: the same as threads, event by event and to the byte.

use crate::tiny;
use serde_json::Value;
use supernode::DType;
use supernode::mesh::Mesh;
use supernode::model::{Config, Transformer};
use supernode::ops::{CountLabels, Ratio};
use supernode::placement::Placement::{Partial, Replicate, Shard};
use supernode::spmd::{Chip, Device, FromIndex, Init, Sharded, World};
use supernode::trace::{EventKind, Trace};
use supernode::train::{AdamW, Optimizer, Training};

const MESHES: [&str; 5] = ["single", "dp=2", "tp=2", "dp=2,tp=2", "tp=3,dp=2"];

/// Runs the program on threads and as a ghost, asserts that the traces are equal and that memory is, by three counts.
fn agree(mesh: &str, program: impl Fn(&Chip) + Sync) -> Trace {
    let mesh = Mesh::parse(mesh).expect("a mesh");
    let world = World::threads(&mesh, Device::cpu())
        .expect("a small mesh")
        .with_threads(1);
    let run = world
        .run(&program)
        .unwrap_or_else(|e| panic!("on {mesh}: {e}"));
    let ghost = World::ghost(&mesh)
        .trace(&program)
        .unwrap_or_else(|e| panic!("on {mesh}: {e}"));
    equal(run.trace(), run.pool_peaks(), &ghost);
    ghost
}

fn equal(real: &Trace, pool_peaks: &[u64], ghost: &Trace) {
    assert_eq!(real.difference(ghost), None, "on {}", real.mesh);
    assert_eq!(ghost.difference(real), None);
    assert_eq!(
        pool_peaks,
        ghost.peak_bytes(),
        "the pool's own count on {}",
        real.mesh
    );
    for rank in 0..real.mesh.chips() {
        let (real, ghost) = (real.chip(rank), ghost.chip(rank));
        assert!(ghost.events().count() > 0);
        assert_eq!(real.peak_scratch_bytes, ghost.peak_scratch_bytes);
        let totals = |t: &supernode::trace::ChipTrace| {
            let ops: Vec<_> = t
                .ops
                .iter()
                .map(|o| (o.op.clone(), o.calls, o.flops, o.bytes))
                .collect();
            let moved: Vec<_> = t
                .collectives
                .iter()
                .map(|c| {
                    (
                        c.op.clone(),
                        c.axis.clone(),
                        c.calls,
                        c.bytes,
                        c.floor_bytes,
                    )
                })
                .collect();
            (ops, moved, t.steps)
        };
        assert_eq!(totals(real), totals(ghost));
        let live = ghost.events().map(|e| e.memory.peak).max().expect("events");
        assert!(live <= ghost.peak_bytes, "no event saw more than the peak");
        assert!(
            ghost.events().all(|e| e.time.is_none()) && real.events().all(|e| e.time.is_some())
        );
    }
}

pub(crate) fn input(
    chip: &Chip,
    name: &str,
    shape: &[usize],
    placed: &[(&str, supernode::placement::Placement)],
) -> Sharded {
    chip.input(
        name,
        shape,
        chip.placed(placed),
        &FromIndex(|i| (i % 7) as f32 - 3.0),
    )
}

#[test]
fn matmul_programs() {
    for mesh in MESHES {
        agree(mesh, |chip| {
            let x = input(chip, "x", &[12, 18], &[("dp", Shard(0))]);
            let w = chip.parameter(
                "w",
                [18, 30],
                chip.placed(&[("tp", Shard(1))]),
                Init::normal(0.02),
            );
            x.matmul(&w).gather();
        });
        agree(mesh, |chip| {
            // Megatron's pair, forward and backward.
            let x = input(chip, "x", &[12, 18], &[("dp", Shard(0))]).variable();
            let w1 = chip.parameter(
                "w1",
                [18, 30],
                chip.placed(&[("tp", Shard(1))]),
                Init::normal(0.02),
            );
            let w2 = chip.parameter(
                "w2",
                [30, 18],
                chip.placed(&[("tp", Shard(0))]),
                Init::normal(0.02),
            );
            for pass in 0..3 {
                let loss = chip.record(|| {
                    let y = chip.scope("up", || x.matmul(&w1)).matmul(&w2);
                    y.redistribute(x.placements()).sum().gather()
                });
                chip.step(pass, || loss.backward());
                chip.take_gradient(&x);
            }
            chip.take_gradients();
        });
    }
}

#[test]
fn uneven_splits() {
    for mesh in ["tp=2", "tp=3", "dp=2,tp=3", "dp=3,tp=4"] {
        let trace = agree(mesh, |chip| {
            let x = input(chip, "x", &[7, 10], &[("dp", Shard(0)), ("tp", Partial)]).variable();
            let w = chip.parameter(
                "w",
                [10, 11],
                chip.placed(&[("tp", Shard(1))]),
                Init::normal(0.02),
            );
            let loss = chip.record(|| {
                x.redistribute(chip.placed(&[("dp", Shard(0))]))
                    .matmul(&w)
                    .sum()
                    .gather()
            });
            loss.backward();
            chip.take_gradient(&x);
            chip.take_gradients();
        });
        assert_eq!(
            trace.classes.len(),
            trace.mesh.chips(),
            "no two chips need hold the same on {mesh}"
        );
    }
}

/// A training step's variants: what the options change.
fn variants() -> Vec<(&'static str, Training)> {
    let plain = |config: Config| tiny::training(config, 12, 1);
    let mut all: Vec<_> = tiny::models_of_three()
        .into_iter()
        .map(|(name, config)| (name, plain(config)))
        .collect();
    let llama = || tiny::models_of_three()[2].1.clone();
    let mut with = |name, change: fn(&mut Training)| {
        let mut training = plain(llama());
        change(&mut training);
        all.push((name, training));
    };
    with("recompute", |t| {
        t.model = t.model.clone().with_recompute(true)
    });
    with("accumulation", |t| t.options.micro_batch = Some(2));
    with("accumulation with recompute", |t| {
        t.model = t.model.clone().with_recompute(true);
        t.options.micro_batch = Some(3);
    });
    with("bf16", |t| {
        t.model = t.model.clone().with_dtype(DType::Bf16)
    });
    with("bf16 with recompute", |t| {
        t.model = t.model.clone().with_dtype(DType::Bf16).with_recompute(true)
    });
    with("f16", |t| t.model = t.model.clone().with_dtype(DType::F16));
    with("dropout", |t| {
        let config = Config {
            dropout: 0.1,
            ..t.model.config().clone()
        };
        t.model = tiny::transformer(config);
    });
    with("query and key norms", |t| {
        let config = Config {
            qk_norm: true,
            ..t.model.config().clone()
        };
        t.model = tiny::transformer(config);
    });
    with("no clipping", |t| {
        t.options.optimizer = AdamW {
            clip: None,
            ..AdamW::default()
        }
    });
    all
}

#[test]
fn training_steps() {
    for (name, training) in variants() {
        for mesh in MESHES {
            let mesh = Mesh::parse(mesh).expect("a mesh");
            let world = tiny::world(&mesh);
            let never = std::sync::atomic::AtomicBool::new(false);
            let run = training
                .run(&world, &|_| (), &never)
                .unwrap_or_else(|e| panic!("{name} on {mesh}: {e}"));
            let ghost = training
                .trace(&World::ghost(&mesh))
                .unwrap_or_else(|e| panic!("{name} on {mesh}: {e}"));
            assert_eq!(run.trace().difference(&ghost), None, "{name}");
            equal(run.trace(), run.pool_peaks(), &ghost);
            assert_eq!(ghost.classes.len(), 1, "{name} on {mesh}");
        }
    }
}

/// A loop over steps as a user writes it, with a batch that dp need not divide.
pub(crate) fn steps(chip: &Chip, model: &Transformer, rows: usize, count: u64) {
    let mut optimizer = Optimizer::new(AdamW::default(), 0);
    optimizer.prepare(chip);
    for step in 0..count {
        chip.step(step, || {
            let batch = |name: &str| {
                let contents = FromIndex(move |i| ((i * 7 + step * 3) % tiny::VOCAB as u64) as u32);
                chip.input(
                    name,
                    [rows, model.config().context],
                    Transformer::batch_placement(chip),
                    &contents,
                )
            };
            let (tokens, labels) = (batch("tokens"), batch("labels"));
            let loss = chip.record(|| {
                let sum = model.losses(chip, &tokens, &labels).sum().gather();
                let count = chip
                    .apply_one(CountLabels { ignored: u32::MAX }, &[&labels])
                    .gather();
                chip.apply_one(Ratio, &[&sum, &count])
            });
            loss.backward();
            optimizer.step(chip, 1e-3);
        });
    }
}

#[test]
fn several_steps_and_uneven_batches() {
    for (name, config) in tiny::models_of_three() {
        let model = tiny::transformer(config);
        for mesh in MESHES {
            let trace = agree(mesh, |chip| steps(chip, &model, 6, 3));
            let chip = trace.chip(0);
            assert_eq!(chip.steps, 3);
            let (first, latest) = (
                chip.first.as_ref().expect("a step"),
                chip.latest.as_ref().expect("another"),
            );
            assert_eq!(
                (first.number, latest.number),
                (0, 2),
                "{name}: first and latest step are kept"
            );
        }
        let trace = agree("dp=2,tp=3", |chip| steps(chip, &model, 5, 2));
        assert_eq!(
            trace.classes.len(),
            2,
            "{name}: five rows over dp=2 make two kinds of chips, tp none"
        );
    }
}

#[test]
fn a_trace_in_a_file_is_the_same_trace_and_a_viewers_too() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("trace.json");
    let mesh = Mesh::new([("dp", 2), ("tp", 2)]);
    let model = tiny::transformer(tiny::llama());
    let program = |chip: &Chip| {
        steps(chip, &model, 5, 2);
        let x = input(chip, "x", &[4, 6], &[("tp", Partial)]);
        x.start_redistribute(chip.replicated()).wait();
        if chip.coordinate("tp") == 0 {
            chip.send(&x, "tp", 1);
        } else {
            chip.receive(x.tensor().ty(), "tp", -1);
        }
    };
    let real = tiny::world(&mesh)
        .run(program)
        .expect("a program that runs");
    let ghost = World::ghost(&mesh)
        .trace(program)
        .expect("a program that runs");
    assert_eq!(real.trace().difference(&ghost), None);
    for trace in [real.trace(), &ghost] {
        trace.save(&path).expect("a file");
        let loaded = Trace::load(&path).expect("a trace");
        assert_eq!(trace.difference(&loaded), None);
        assert_eq!(
            serde_json::to_value(trace).expect("JSON"),
            serde_json::to_value(&loaded).expect("JSON")
        );
        let text = std::fs::read_to_string(&path).expect("a file");
        let json: Value = serde_json::from_str(&text).expect("valid JSON");
        let events = json["traceEvents"].as_array().expect("a list");
        let spans: Vec<_> = events.iter().filter(|e| e["ph"] == "X").collect();
        let kept: usize = trace.classes.iter().map(|c| c.chip.events().count()).sum();
        assert_eq!(spans.len(), kept, "one event per kept event");
        assert_eq!(
            events.len() - spans.len(),
            3 * trace.classes.len(),
            "and a name per chip and stream"
        );
        for span in spans {
            assert!(
                span["ts"].as_f64().is_some_and(|t| t >= 0.0)
                    && span["dur"].as_f64().is_some_and(|d| d >= 0.0)
            );
            assert!(
                span["pid"].is_u64() && span["tid"].is_u64() && span["name"].is_string(),
                "{span}"
            );
        }
    }
    let kinds = |kind| ghost.chip(0).events().filter(|e| e.kind == kind).count();
    assert_eq!(
        (
            kinds(EventKind::Send),
            kinds(EventKind::Receive),
            kinds(EventKind::Wait)
        ),
        (1, 0, 1)
    );
}

#[test]
fn a_file_that_is_no_trace_is_told() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("trace.json");
    let kind = |text: &str| {
        std::fs::write(&path, text).expect("a file");
        Trace::load(&path).expect_err("no trace").kind()
    };
    let missing = Trace::load(&dir.path().join("nothing.json")).expect_err("no file");
    assert_eq!(missing.kind(), supernode::ErrorKind::Io);
    assert!(missing.to_string().contains("nothing.json"), "{missing}");
    for text in [
        "",
        "{",
        "{}",
        "[]",
        "{\"traceEvents\": []}",
        "{\"version\": 999, \"supernode\": null}",
    ] {
        assert_eq!(kind(text), supernode::ErrorKind::Input, "{text}");
    }
}

#[test]
fn a_ghost_never_asks_for_contents() {
    let mesh = Mesh::new([("tp", 4)]);
    let trace = World::ghost(&mesh).trace(|chip| {
        // A trillion parameters.
        let w = chip.parameter(
            "w",
            [1 << 20, 1 << 20],
            chip.placed(&[("tp", Shard(1))]),
            Init::normal(0.02),
        );
        let contents = FromIndex(|_| -> f32 { panic!("a ghost asked for contents") });
        let x = chip.input("x", [1 << 10, 1 << 20], [Replicate], &contents);
        assert!(chip.is_ghost() && x.read().is_none());
        x.matmul(&w).gather()
    });
    let trace = trace.expect("a ghost has room");
    assert_eq!(trace.collectives()[0].bytes, 3 * ((1u64 << 30) / 4 * 4));
    assert_eq!(
        trace.peak_bytes(),
        [(1u64 << 40) + (1 << 32) + (1 << 30) + 2 * (1 << 32); 4]
    );
}
