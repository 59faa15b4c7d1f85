//! ZeRO, sequence and context parallelism send exactly the bytes, and ZeRO keeps exactly the bytes, that their formulas say.

use crate::tiny;
use std::sync::Mutex;
use supernode::mesh::Mesh;
use supernode::model::Transformer;
use supernode::placement::Placement::Shard;
use supernode::spmd::{Chip, FromIndex, Init, World, Zero};
use supernode::trace::Trace;
use supernode::train::{AdamW, Optimizer, Training};

/// Bytes that a chip sends in all collectives of a kind over an axis, which are at their floor.
fn sent(trace: &Trace, op: &str, axis: &str) -> u64 {
    let chip = trace.chip(0);
    let found = || {
        chip.collectives
            .iter()
            .filter(|c| *c.op == *op && c.axis == axis)
    };
    for c in found() {
        assert!(
            10 * c.bytes <= 11 * c.floor_bytes,
            "{op}: {} against {}",
            c.bytes,
            c.floor_bytes
        );
    }
    found().map(|c| c.bytes).sum()
}

fn traced(training: &Training, mesh: &Mesh) -> Trace {
    let ghost = training.trace(&World::ghost(mesh));
    ghost.unwrap_or_else(|e| panic!("on {mesh}: {e}"))
}

#[test]
fn zero_sends_what_its_formulas_say() {
    for n in [2u64, 4, 8] {
        for passes in [1u64, 2] {
            let config = tiny::llama();
            let all = 4 * config.parameters();
            // Its backward does not read the embedding's table.
            let table = 4 * (config.vocab * config.hidden) as u64;
            let mut training = tiny::training(config, 2 * n as usize, 1);
            training.options.micro_batch = Some(2 / passes as usize);
            let share = |bytes: u64| bytes * (n - 1) / n;
            let (state, early) = ((share(all), share(all)), (share(all), passes * share(all)));
            let cases = [
                (0, "dp", (0, 0)),
                (1, "dp", state),
                (2, "dp", early),
                (
                    3,
                    "dp",
                    (passes * share(2 * all - table), passes * share(all)),
                ),
                (
                    3,
                    "fsdp",
                    (passes * share(2 * all - table), passes * share(all)),
                ),
            ];
            for (stage, axis, (gathered, scattered)) in cases {
                training.options.zero = Some(Zero::stage(stage).expect("a stage"));
                let trace = traced(&training, &Mesh::new([(axis, n as usize)]));
                let found = (
                    sent(&trace, "all-gather", axis),
                    sent(&trace, "reduce-scatter", axis),
                );
                let what = format!("stage {stage} over {axis}={n} in {passes} passes");
                assert_eq!(found, (gathered, scattered), "{what}");
                assert_eq!(
                    sent(&trace, "all-reduce", axis) > share(all),
                    stage == 0,
                    "{what}"
                );
                assert_eq!(trace.classes.len(), 1, "{what}");
            }
        }
    }
}

#[test]
fn zero_keeps_what_its_formulas_say() {
    let config = tiny::llama();
    let psi = config.parameters();
    let model = tiny::transformer(config);
    for n in [1u64, 2, 4] {
        let mesh = Mesh::new([("dp", n as usize)]);
        for stage in 0..=3 {
            let live = Mutex::new(Vec::new());
            let program = |chip: &Chip| {
                let count = || {
                    let count = chip.memory().count();
                    live.lock()
                        .expect("no panic")
                        .push(count.allocated - count.freed);
                };
                chip.split_parameters(Zero::stage(stage).expect("a stage"), "dp");
                let mut optimizer = Optimizer::new(AdamW::default(), 0);
                optimizer.prepare(chip);
                let batch = || {
                    let placed = Transformer::batch_placement(chip);
                    let contents = FromIndex(|i| (i % tiny::VOCAB as u64) as u32);
                    chip.input("tokens", [4, tiny::CONTEXT], placed, &contents)
                };
                let sum = || model.losses(chip, &batch(), &batch()).sum();
                chip.record(sum).backward();
                count();
                drop(optimizer.step(chip, 1e-3));
                count();
            };
            World::ghost(&mesh)
                .trace(program)
                .expect("a program that runs");
            let divided = |from: usize| if stage >= from { n } else { 1 };
            let kept = 4 * psi / divided(3) + 8 * psi / divided(1);
            let want = [kept + 4 * psi / divided(2), kept];
            assert_eq!(
                *live.lock().expect("no panic"),
                want,
                "stage {stage}, dp={n}"
            );
        }
    }
}

#[test]
fn sequence_parallelism_scatters_and_gathers_what_was_reduced() {
    for n in [2u64, 4] {
        let mesh = Mesh::new([("tp", n as usize)]);
        let config = tiny::llama();
        let pairs = 2 * config.layers as u64 + 1;
        let width = 4 * (tiny::CONTEXT * config.hidden) as u64;
        let mut training = tiny::training(config, 4, 1);
        let plain = traced(&training, &mesh);
        training.model = training.model.with_sequence_parallel(true);
        let split = traced(&training, &mesh);
        let once = 4 * width * (n - 1) / n;
        for op in ["reduce-scatter", "all-gather"] {
            assert_eq!(sent(&plain, op, "tp"), 0);
            assert_eq!(sent(&split, op, "tp"), 2 * pairs * once, "{op} over tp={n}");
        }
        let spared = sent(&plain, "all-reduce", "tp") - 2 * pairs * 2 * once;
        // What is left are the losses' sums, and now the gradients of norms: their tokens are split.
        let norms = 4 * pairs * training.model.config().hidden as u64;
        let left = sent(&split, "all-reduce", "tp");
        assert_eq!(left, spared + 2 * norms * (n - 1) / n, "tp={n}");
        assert!(
            split.peak_bytes()[0] < plain.peak_bytes()[0],
            "and memory is spared"
        );
    }
}

#[test]
fn ulysses_sends_what_its_formula_says() {
    for p in [2u64, 4, 8] {
        let config = tiny::gpt2();
        let layers = config.layers as u64;
        let (batch, width) = (4, 4 * config.hidden as u64);
        let tokens = (batch * tiny::CONTEXT) as u64;
        let training = tiny::training(config, batch, 1);
        let trace = traced(&training, &Mesh::new([("cp", p as usize)]));
        // Queries, keys, values, results; forward and backward.
        let want = 2 * layers * 4 * tokens * width * (p - 1) / (p * p);
        assert_eq!(sent(&trace, "all-to-all", "cp"), want, "cp={p}");
        assert_eq!(sent(&trace, "all-gather", "cp"), 0, "cp={p}");
    }
}

#[test]
fn a_parameter_gathered_outside_of_recording_is_refused() {
    let program = |chip: &Chip| {
        chip.split_parameters(Zero::Parameters, "dp");
        let x = chip.input("x", [4, 6], [Shard(0)], &FromIndex(|i| i as f32));
        let w = chip.parameter("w", [6, 8], chip.replicated(), Init::ones());
        drop(chip.record(|| x.matmul(&w).sum()));
    };
    let world = tiny::world(&Mesh::new([("dp", 2)]));
    let error = world
        .run(program)
        .expect_err("a gradient would be lost")
        .to_string();
    for part in ["matmul", "outside of Chip::record", "zero.rs"] {
        assert!(error.contains(part), "'{part}' is missing in: {error}");
    }
}

#[test]
fn a_layout_says_what_lives_where_and_what_moves_when() {
    let config = tiny::llama();
    let psi = config.parameters();
    let training = tiny::training(config, 8, 1);
    let layout = |mesh: &str| {
        let ghost = World::ghost(&Mesh::parse(mesh).expect("a mesh"));
        (
            training.layout(&ghost).expect("a layout"),
            training.trace(&ghost).expect("a trace"),
        )
    };
    let (table, trace) = layout("fsdp=2");
    assert_eq!(table.kept_bytes(0), (4 * psi / 2, 8 * psi / 2));
    let moved: u64 = table.moves.iter().map(|m| m.bytes).sum();
    assert_eq!(
        moved,
        trace.collectives().iter().map(|c| c.bytes).sum::<u64>()
    );
    let (table, _) = layout("dp=2,fsdp=2,tp=2");
    let row = table
        .parameters
        .iter()
        .find(|r| r.name == "layers.*.attention.wo");
    let row = row.expect("attention's last matrix");
    assert_eq!((row.count, &row.shape[..]), (2, &[64, 64][..]));
    assert_eq!((row.bytes, row.state_bytes), (64 * 64, 2 * 64 * 64));
    let text = table.to_string();
    for part in [
        "dp=2,fsdp=2,tp=2",
        "fsdp cuts 1, tp cuts 0",
        "backward",
        "reduce-scatter",
        "update",
    ] {
        assert!(text.contains(part), "'{part}' is missing in:\n{text}");
    }
}
