//! A block with a mixture of experts against the textbook's, token by token in f64; what dispatch and combine send; and what
//! happens when one chip brings something else.

use crate::tiny::{mixture, training, transformer, world};
use crate::watchdog::watched;
use std::collections::BTreeMap;
use std::sync::atomic::AtomicBool;
use std::time::Instant;
use supernode::World;
use supernode::mesh::Mesh;
use supernode::model::{Config, Mixture, Transformer};
use supernode::ops;
use supernode::placement::Placement::Shard;
use supernode::reference::{self, Slotted};
use supernode::spmd::{Chip, Device, FromIndex};
use supernode::trace::{EventKind, Phase};

const B: usize = 4;
const T: usize = 8;

fn one_block() -> Config {
    let sizes = Mixture {
        capacity_factor: Some(1.0),
        ..mixture().mixture.expect("it has one")
    };
    Config {
        layers: 1,
        mixture: Some(sizes),
        ..mixture()
    }
}

/// Weights by name, of a size at which all of the block counts; attention adds nothing.
fn weight(name: &str, n: usize) -> Vec<f64> {
    let size = match name {
        name if name.ends_with("attention.wo") => 0.0,
        name if name.ends_with("norm2.weight") => 1.0,
        _ => 0.3,
    };
    let values = reference::normals(name, n).into_iter();
    values.map(|x| f64::from((x * size) as f32)).collect()
}

fn input() -> Vec<f64> {
    let values = reference::normals("x", B * T * 32).into_iter();
    values.map(|x| f64::from(x as f32)).collect()
}

/// `x + mixture(norm(x))` in f64, with what was chosen.
fn textbook(
    config: &Config,
    x: &[f64],
    weights: &BTreeMap<&str, Vec<f64>>,
) -> (Vec<f64>, Vec<u32>) {
    let m = config.mixture.as_ref().expect("a mixture");
    let (c, e, k, f) = (config.hidden, m.experts, m.experts_per_token, m.expert_ffn);
    let w = |name: &str| &weights[name][..];
    let (n, _) = reference::rms_norm([B * T, c], x, Some(w("norm2.weight")), config.eps.into());
    let logits = reference::matmul([B * T, e, c], &n, w("mlp.router.weight"));
    let scores = reference::softmax([B * T, e], &logits);
    let rule = reference::Route {
        k,
        normalize: true,
        scale: 1.0,
    };
    let (gates, experts) = reference::route(rule, e, &scores, None);
    let sizes = Slotted {
        b: B,
        t: T,
        k,
        e,
        s: m.capacity(T),
        c,
    };
    let of = reference::Experts {
        f,
        gate: w("mlp.experts.gate"),
        up: w("mlp.experts.up"),
        down: w("mlp.experts.down"),
    };
    let y = reference::mixture(sizes, &n, &gates, &experts, of);
    (x.iter().zip(&y).map(|(x, y)| x + y).collect(), experts)
}

const NAMES: [(&str, usize); 5] = [
    ("norm2.weight", 32),
    ("mlp.router.weight", 32 * 4),
    ("mlp.experts.gate", 4 * 32 * 32),
    ("mlp.experts.up", 4 * 32 * 32),
    ("mlp.experts.down", 4 * 32 * 32),
];

/// The block's result and the gradients of its weights and of x, whole, for the loss `sum of dy y`.
fn on(mesh: &str, sequence_parallel: bool) -> BTreeMap<String, Vec<f64>> {
    let mesh = Mesh::parse(mesh).expect("a mesh");
    let model = transformer(one_block()).with_sequence_parallel(sequence_parallel);
    let program = |chip: &Chip| {
        chip.restore_from(|name, shape| {
            let short = name.trim_start_matches("layers.0.");
            let values = weight(short, shape.iter().product());
            Ok(Some(values.iter().map(|&x| x as f32).collect()))
        });
        let placed = Transformer::batch_placement(chip);
        let placed = match (sequence_parallel, chip.size_of("tp") > 1) {
            (true, true) => placed.with(chip.mesh().axis_index("tp"), Shard(1)),
            _ => placed,
        };
        let from = |name: &'static str| {
            let values = reference::normals(name, B * T * 32);
            let values: Vec<f32> = values.iter().map(|&x| x as f32).collect();
            chip.input(name, [B, T, 32], placed.clone(), &values)
        };
        let (x, dy) = (from("x").variable(), from("dy"));
        let mut all = BTreeMap::new();
        let whole = |x: &supernode::spmd::Sharded| -> Vec<f64> {
            x.gather()
                .read()
                .expect("contents")
                .iter()
                .map(|&x| x.into())
                .collect()
        };
        chip.record(|| {
            let y = model.block(chip, 0, &x);
            all.insert("y".to_string(), whole(&y));
            y.multiply(&dy).sum().gather()
        })
        .backward();
        let dx = chip.take_gradient(&x).expect("x has a gradient");
        all.insert("x".into(), whole(&dx));
        for (index, gradient) in chip.take_gradients() {
            let name = chip.parameters()[index]
                .name
                .trim_start_matches("layers.0.")
                .to_string();
            all.insert(name, whole(&gradient));
        }
        all
    };
    world(&mesh)
        .run(program)
        .unwrap_or_else(|e| panic!("on {mesh}: {e}"))
        .outputs()[0]
        .clone()
}

#[test]
fn a_block_is_the_textbooks_on_every_mesh() {
    let config = one_block();
    let weights: BTreeMap<&str, Vec<f64>> =
        NAMES.iter().map(|&(n, len)| (n, weight(n, len))).collect();
    let x = input();
    let (y, chosen) = textbook(&config, &x, &weights);
    let dy: Vec<f64> = reference::normals("dy", B * T * 32)
        .iter()
        .map(|&x| f64::from(x as f32))
        .collect();
    let loss = |x: &[f64], weights: &BTreeMap<&str, Vec<f64>>| {
        let (y, again) = textbook(&config, x, weights);
        assert_eq!(again, chosen, "no step of the differences turns a choice");
        y.iter().zip(&dy).map(|(y, dy)| y * dy).sum::<f64>()
    };
    // Along one random direction by each weight and by x.
    let h = 1e-5;
    let slope = |name: &str, u: &[f64]| {
        let at = |step: f64| {
            let moved = |v: &[f64]| {
                v.iter()
                    .zip(u)
                    .map(|(v, u)| v + step * u)
                    .collect::<Vec<f64>>()
            };
            let mut weights = weights.clone();
            if name == "x" {
                return loss(&moved(&x), &weights);
            }
            let changed = moved(&weights[name]);
            *weights.get_mut(name).expect("a name") = changed;
            loss(&x, &weights)
        };
        (at(h) - at(-h)) / (2.0 * h)
    };
    let names: Vec<&str> = NAMES.iter().map(|n| n.0).chain(["x"]).collect();
    let wanted: Vec<(&str, Vec<f64>, f64)> = names
        .iter()
        .map(|&name| {
            let n = if name == "x" {
                x.len()
            } else {
                weights[name].len()
            };
            let u = reference::normals(&format!("direction {name}"), n);
            let slope = slope(name, &u);
            (name, u, slope)
        })
        .collect();
    // Roundings in the longest chain of a result: norm, router, softmax, two products and the sum over experts.
    let size = y.iter().map(|y| y.abs()).fold(0.0, f64::max);
    let bound = reference::gamma(5 * 32, f64::from(f32::EPSILON) / 2.0) * 4.0 * size;
    for (mesh, sequence_parallel) in [
        ("single", false),
        ("ep=2", false),
        ("ep=4", false),
        ("tp=2", true),
        ("cp=2", false),
        ("dp=2,ep=2", false),
        ("ep=2,tp=2", true),
        ("ep=2,cp=2", false),
        ("ep=2,cp=2,tp=2", false),
        ("dp=2,ep=2,cp=2,tp=2", true),
    ] {
        let got = on(mesh, sequence_parallel);
        let bounds = vec![bound; y.len()];
        reference::assert_within(&format!("the block on {mesh}"), &got["y"], &y, &bounds);
        for (name, u, want) in &wanted {
            let g = &got[*name];
            let slope: f64 = g.iter().zip(u).map(|(g, u)| g * u).sum();
            let size: f64 = g.iter().zip(u).map(|(g, u)| (g * u).abs()).sum();
            let error = (slope - want).abs();
            assert!(
                error <= 1e-5 * size,
                "{name} on {mesh}: {slope} against {want}"
            );
        }
    }
}

/// Dispatch and combine each send `(ep - 1) / ep` of a chip's buffers, `e s c` elements a sequence, forward and again backward.
#[test]
fn dispatch_and_combine_send_what_the_formula_says() {
    for (mesh, ep, others, factor) in [
        ("ep=2", 2, 1, Some(1.25)),
        ("ep=4", 4, 1, Some(1.0)),
        ("dp=2,ep=2", 2, 2, None),
        ("ep=4,tp=2", 4, 1, Some(2.0)),
        ("dp=2,ep=2,cp=2", 2, 4, Some(1.0)),
    ] {
        let mut config = mixture();
        let m = config.mixture.as_mut().expect("a mixture");
        m.capacity_factor = factor;
        let (e, k, capacity) = (m.experts, m.experts_per_token, m.capacity(16));
        if let Some(factor) = factor {
            // T k h e (E - 1) / E of the literature, but for the rounding up of an expert's slots.
            let fair = f64::from(factor) * (16 * k) as f64;
            assert!((e * capacity) as f64 >= fair && ((e * capacity) as f64) < fair + e as f64);
        }
        let rows = 16;
        let plain = training(config.clone(), rows, 1);
        let mesh = Mesh::parse(mesh).expect("a mesh");
        let run = plain
            .run(&world(&mesh), &|_| (), &AtomicBool::new(false))
            .unwrap_or_else(|e| panic!("on {mesh}: {e}"));
        let ghost = plain.trace(&World::ghost(&mesh)).expect("a trace");
        assert_eq!(run.trace().difference(&ghost), None);
        // What a chip holds of [e, b, s, c] in f32, b being split over dp and ep, s over cp.
        let held = e * (rows / ep) * capacity * config.hidden * 4 / others;
        let each = (held * (ep - 1) / ep) as u64;
        for (phase, scope) in [(Phase::Forward, "dispatch"), (Phase::Forward, "combine")] {
            let chip = run.trace().chip(0);
            let of = |e: &&supernode::trace::Event| {
                e.kind == EventKind::Collective
                    && e.phase == phase
                    && chip.scope(e).ends_with(scope)
                    && &*e.op == "all-to-all"
            };
            let events: Vec<_> = chip.events().filter(of).collect();
            assert_eq!(events.len(), config.layers, "{scope} on {mesh}");
            for event in events {
                let traffic = event.traffic.as_ref().expect("it moves something");
                assert_eq!(
                    (&*traffic.axis, traffic.bytes),
                    ("ep", each),
                    "{scope} on {mesh}"
                );
                assert_eq!(traffic.floor_bytes, each);
            }
        }
        let all = run.trace().collectives().iter();
        let total = all.filter(|c| c.axis == "ep" && &*c.op == "all-to-all");
        let total: u64 = total.map(|c| c.bytes).sum();
        assert_eq!(total, 4 * config.layers as u64 * each, "a step on {mesh}");
    }
}

/// A chip whose buffers have another shape is found at the all-to-all; operands that do not fit end the run by name.
#[test]
fn what_one_chip_brings_that_others_do_not_ends_in_one_error() {
    let mesh = Mesh::new([("ep", 2)]);
    for wrong in ["capacity", "operands", "experts"] {
        let mesh = mesh.clone();
        let (error, took) = watched(move || {
            let program = |chip: &Chip| {
                let here = chip.coordinate("ep") == 1;
                let numbers = FromIndex(|i| (i % 4) as u32);
                let floats = FromIndex(|i| i as f32);
                let placed = [Shard(0)];
                let x = chip.input("x", [2, 4, 8], placed, &floats);
                let last = if here && wrong == "experts" { 5 } else { 0 };
                let chosen = FromIndex(move |i| if i % 8 == 7 { last } else { (i % 4) as u32 });
                let experts = chip.input("experts", [2, 4, 2], placed, &chosen);
                let op = ops::Slots {
                    experts: 4,
                    capacity: if here && wrong == "capacity" { 3 } else { 2 },
                    order: None,
                };
                let placed_ = chip.apply(op, &[&experts]);
                let slots = match here && wrong == "operands" {
                    true => chip.input("slots", [2, 3, 2], placed, &numbers),
                    false => placed_[0].clone(),
                };
                let sent = chip.apply_one(ops::Dispatch, &[&x, &placed_[1], &slots]);
                chip.scope("dispatch", || drop(sent.redistribute([Shard(0)])));
            };
            let world = World::threads(&mesh, Device::cpu()).expect("a small mesh");
            let (world, began) = (world.with_threads(1), Instant::now());
            let error = world.run(program).expect_err("a fault");
            (error.to_string(), began.elapsed())
        });
        assert!(took.as_secs_f64() < 1.0, "{wrong}: found after {took:?}");
        let parts: &[&str] = match wrong {
            "capacity" => &["all-to-all over ep", "rank 0", "rank 1", "dispatch"],
            "operands" => &["dispatch wants", "u32[2, 3, 2]", "rank 1", "ep=1"],
            _ => &["slots: assignment 7 names expert 5 of 4", "rank 1"],
        };
        for part in parts {
            assert!(
                error.contains(part),
                "{wrong}: '{part}' is missing in: {error}"
            );
        }
    }
}
