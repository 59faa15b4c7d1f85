//! Every way to split gives the single chip's losses and gradients, and the ghost's trace: fsdp and ZeRO, context and
//! sequence parallelism, alone and together with dp and tp.

use crate::tiny::{Cut, assert_close, bits, gpt2, llama, losses, models_of_three, training, world};
use std::sync::atomic::AtomicBool;
use supernode::mesh::Mesh;
use supernode::model::{Config, ContextMethod};
use supernode::spmd::Zero;
use supernode::train::Training;
use supernode::{DType, World};

pub(crate) const STEPS: u64 = 10;
pub(crate) const ROWS: usize = 8;

/// A mesh, ZeRO's stage if it is given, and whether tp splits tokens between its pairs.
pub(crate) type Case = (&'static str, Option<usize>, bool);

/// Each way by itself, on two and four chips.
const ALONE: [Case; 12] = [
    ("fsdp=2", None, false),
    ("fsdp=4", None, false),
    ("dp=2", Some(1), false),
    ("dp=4", Some(1), false),
    ("dp=2", Some(2), false),
    ("dp=4", Some(2), false),
    ("dp=2", Some(3), false),
    ("dp=4", Some(3), false),
    ("cp=2", None, false),
    ("cp=4", None, false),
    ("tp=2", None, true),
    ("tp=4", None, true),
];

const PAIRS: [Case; 14] = [
    ("dp=2,fsdp=2", None, false),
    ("dp=2,fsdp=2", Some(1), false),
    ("dp=2,fsdp=2", Some(2), false),
    ("dp=2,fsdp=2", Some(0), false),
    ("dp=2,cp=2", Some(1), false),
    ("dp=2,tp=2", Some(1), true),
    ("dp=2,tp=2", Some(2), false),
    ("dp=2,tp=2", Some(3), true),
    ("fsdp=2,cp=2", None, false),
    ("cp=2,fsdp=2", None, false),
    ("fsdp=2,tp=2", None, true),
    ("tp=2,fsdp=2", None, false),
    ("cp=2,tp=2", None, true),
    ("tp=2,cp=2", None, true),
];

const MORE: [Case; 13] = [
    ("dp=2,fsdp=2,tp=2", None, false),
    ("dp=2,fsdp=2,tp=2", Some(2), true),
    ("dp=2,fsdp=2,cp=2", None, false),
    ("dp=2,cp=2,tp=2", Some(1), true),
    ("dp=2,cp=2,tp=2", Some(3), false),
    ("fsdp=2,cp=2,tp=2", None, true),
    ("tp=2,cp=2,fsdp=2", None, false),
    ("cp=2,fsdp=2,tp=2", Some(1), true),
    ("fsdp=2,tp=4,cp=2", None, false),
    ("dp=4,fsdp=2,tp=2", None, false),
    ("dp=2,fsdp=4,cp=2", Some(2), false),
    ("dp=2,fsdp=2,cp=2,tp=2", None, true),
    ("dp=2,fsdp=2,tp=2,cp=2", None, false),
];

pub(crate) fn split(training: &Training, (_, zero, sequence): Case) -> Training {
    let mut training = training.clone();
    training.options.zero = zero.map(|n| Zero::stage(n).expect("a stage"));
    training.model = training.model.with_sequence_parallel(sequence);
    training
}

/// Losses within `bound` of one chip's, and events, bytes and memory as the ghost has them.
pub(crate) fn agree(name: &str, plain: &Training, cases: &[Case], bound: f64) {
    agree_on(name, plain, cuts(cases.iter().copied()), bound);
}

/// The same for any cuts.
pub(crate) fn agree_on(name: &str, plain: &Training, cuts: impl Iterator<Item = Cut>, bound: f64) {
    let single = losses(plain, &world(&Mesh::single()));
    let learnt = single[0] - single[single.len() - 1];
    assert!(learnt > 0.05, "{name} learns: {single:?}");
    for (mesh, what, training) in cuts.map(|cut| cut(plain)) {
        let what = format!("{name} on {what}");
        assert_close(&losses(&training, &world(&mesh)), &single, bound, &what);
        let once = Training {
            options: supernode::train::Options {
                steps: 1,
                ..training.options.clone()
            },
            ..training
        };
        let run = once
            .run(&world(&mesh), &|_| (), &AtomicBool::new(false))
            .unwrap_or_else(|e| panic!("{what}: {e}"));
        let ghost = once
            .trace(&World::ghost(&mesh))
            .unwrap_or_else(|e| panic!("{what}: {e}"));
        assert_eq!(run.trace().difference(&ghost), None, "{what}");
        assert_eq!(run.pool_peaks(), ghost.peak_bytes(), "{what}");
    }
}

#[test]
fn each_way_alone() {
    for (name, config) in [("gpt2", gpt2()), ("llama", llama())] {
        agree(name, &training(config, ROWS, STEPS), &ALONE, 1e-5);
    }
}

#[test]
fn ways_in_pairs() {
    for (name, config) in [("gpt2", gpt2()), ("llama", llama())] {
        agree(name, &training(config, ROWS, STEPS), &PAIRS, 1e-5);
    }
}

#[test]
fn three_and_four_ways_at_once() {
    for (name, config) in [("gpt2", gpt2()), ("llama", llama())] {
        agree(name, &training(config, ROWS, STEPS), &MORE, 1e-5);
    }
}

#[test]
fn lengths_that_do_not_divide() {
    // 16 tokens over 3 chips; 29 characters, 24 channels and 48 columns over 3 and 2.
    let cases = [
        ("cp=3", None, false),
        ("tp=3", None, true),
        ("fsdp=3", None, false),
        ("cp=3,fsdp=2", None, false),
        ("fsdp=2,tp=3", Some(2), true),
    ];
    for (name, config) in models_of_three() {
        agree(name, &training(config, 6, STEPS), &cases, 1e-5);
    }
}

#[test]
fn recomputation_dropout_and_micro_batches_go_with_them() {
    let cases = [
        ("fsdp=2", None, false),
        ("dp=2,tp=2", Some(2), true),
        ("fsdp=2,cp=2,tp=2", None, true),
    ];
    let config = Config {
        dropout: 0.2,
        ..llama()
    };
    let mut plain = training(config, ROWS, STEPS);
    agree("with dropout", &plain, &cases, 1e-5);
    plain.model = plain.model.with_recompute(true);
    agree("recomputed", &plain, &cases, 1e-5);
    // Draws of dropout belong to a pass: without it the number of passes changes nothing.
    plain.model = training(llama(), ROWS, STEPS).model;
    plain.options.micro_batch = Some(2);
    agree("in micro-batches", &plain, &cases, 1e-5);
}

#[test]
fn bf16_agrees_within_its_rounding() {
    let mut plain = training(llama(), ROWS, STEPS);
    plain.model = plain.model.with_dtype(DType::Bf16);
    let cases = [("fsdp=2", None, false), ("fsdp=2,cp=2,tp=2", None, true)];
    agree("bf16", &plain, &cases, 0.02);
}

/// Every case: its mesh, its name, and the training split so.
pub(crate) fn all() -> impl Iterator<Item = Cut> {
    cuts(ALONE.into_iter().chain(PAIRS).chain(MORE))
}

/// Cases as [`super::gradients::agree`] takes them.
pub(crate) fn cuts(cases: impl IntoIterator<Item = Case>) -> impl Iterator<Item = Cut> {
    cases.into_iter().map(|case| -> Cut {
        Box::new(move |plain| {
            let mesh = Mesh::parse(case.0).expect("a mesh");
            (mesh, format!("{case:?}"), split(plain, case))
        })
    })
}

#[test]
fn two_runs_are_equal_bit_for_bit() {
    for case in [("fsdp=2,cp=2,tp=2", None, true), ("dp=4", Some(2), false)] {
        let training = split(&training(llama(), ROWS, 4), case);
        let mesh = Mesh::parse(case.0).expect("a mesh");
        let first = losses(&training, &world(&mesh).with_threads(1));
        let again = losses(&training, &world(&mesh).with_threads(2));
        assert_eq!(bits(&first), bits(&again), "{case:?}");
    }
}

#[test]
fn a_checkpoint_goes_on_another_mesh() {
    let dir = tempfile::tempdir().expect("a directory");
    let plain = training(llama(), ROWS, 6);
    let single = losses(&plain, &world(&Mesh::single()));
    let mut part = split(&plain, ("", Some(3), true));
    part.options.checkpoint = Some(dir.path().into());
    part.options.steps = 3;
    let first = losses(&part, &world(&Mesh::parse("fsdp=2,tp=2").expect("a mesh")));
    assert_close(&first, &single[..3], 1e-5, "before");
    part.options.resume = true;
    part.options.steps = 6;
    part.options.zero = Some(Zero::State);
    part.model = plain.model.clone();
    let mesh = Mesh::parse("dp=2,cp=2").expect("a mesh");
    let reports = crate::tiny::reports(&part, &world(&mesh)).expect("a run that goes on");
    let rest = crate::tiny::step_losses(&reports);
    assert_close(&rest, &single[3..], 1e-5, "after");
}

#[test]
fn samples_do_not_depend_on_the_mesh() {
    let mut plain = training(llama(), ROWS, 2);
    plain.options.sample = 6;
    let sample = |training: &Training, mesh: &str| {
        let mesh = Mesh::parse(mesh).expect("a mesh");
        let run = training.run(&world(&mesh), &|_| (), &AtomicBool::new(false));
        let run = run.unwrap_or_else(|e| panic!("on {mesh}: {e}"));
        run.outputs()[0].sample.clone()
    };
    let single = sample(&plain, "single");
    assert_eq!(single.len(), 7);
    for case in [("fsdp=2,tp=2", None, true), ("cp=2,tp=2", None, true)] {
        assert_eq!(sample(&split(&plain, case), case.0), single, "{case:?}");
    }
}

#[test]
fn impossible_splits_say_what_stands_in_the_way() {
    let refused = |mesh: &'static str, zero| {
        let mut training = split(&training(llama(), ROWS, 1), (mesh, zero, false));
        let mesh = Mesh::parse(mesh).expect("a mesh");
        let ulysses = mesh.has("cp").then_some(ContextMethod::Ulysses);
        training.model = training.model.with_context_method(ulysses);
        training.check(&mesh).expect_err("refused").to_string()
    };
    let cases: [(&'static str, Option<usize>, &[&str]); 5] = [
        ("fsdp=3", None, &["fsdp=3", "batch of 8", "fsdp=2 does"]),
        (
            "dp=4,fsdp=4",
            None,
            &["fsdp=4", "the 2 that dp leaves", "fsdp=2 does"],
        ),
        ("cp=3", None, &["cp=3", "16 heads", "cp=2 does"]),
        (
            "tp=4,cp=4",
            None,
            &["cp=4", "2 kv-heads", "tp=4", "cp=2 does"],
        ),
        ("tp=2", Some(2), &["fsdp or dp", "tp=2", "fsdp=2 would do"]),
    ];
    for (mesh, zero, parts) in cases {
        let message = refused(mesh, zero);
        for part in parts {
            assert!(message.contains(part), "'{part}' is missing in: {message}");
        }
    }
    let stage = Zero::stage(4).expect_err("refused").to_string();
    assert!(stage.contains("0 to 3") && stage.contains('4'), "{stage}");
}
