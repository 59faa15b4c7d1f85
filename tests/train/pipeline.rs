//! Pipelines give the single chip's losses and the ghost's traces under every schedule and beside every other split; they
//! send what the formula says, in the order of the list; checkpoints know no stages.

use crate::tiny::{
    Cut, assert_close, bits, gpt2, llama, losses, reports, step_losses, training, weights, world,
};
use std::collections::BTreeSet;
use std::sync::atomic::AtomicBool;
use supernode::World;
use supernode::mesh::Mesh;
use supernode::model::Config;
use supernode::pipeline::{Plan, Schedule, Work, layers_of_parts};
use supernode::spmd::Zero;
use supernode::trace::{ChipTrace, EventKind, Phase, Stream, Trace};
use supernode::train::{Options, Report, Training};

const STEPS: u64 = 10;
const ROWS: usize = 8;

/// A mesh, a schedule, virtual stages if they are given, ZeRO's stage likewise, and whether tp splits tokens between its pairs.
#[derive(Clone, Copy, Debug)]
struct Case(&'static str, Schedule, Option<usize>, Option<usize>, bool);

use Schedule::{GPipe, OneForwardOneBackward as Alternating, ZbH1, ZbV};

/// Every schedule by itself: two layers, the embedding and the head are four slots.
const ALONE: [Case; 9] = [
    Case("pp=2", GPipe, None, None, false),
    Case("pp=2", Alternating, None, None, false),
    Case("pp=2", Alternating, Some(2), None, false),
    Case("pp=2", ZbH1, None, None, false),
    Case("pp=2", ZbV, None, None, false),
    Case("pp=3", Alternating, None, None, false),
    Case("pp=4", GPipe, None, None, false),
    Case("pp=4", Alternating, None, None, false),
    Case("pp=4", ZbH1, None, None, false),
];

const PAIRS: [Case; 9] = [
    Case("pp=2,dp=2", Alternating, None, None, false),
    Case("dp=2,pp=2", ZbH1, None, Some(1), false),
    Case("pp=2,dp=2", ZbV, None, Some(2), false),
    Case("pp=2,fsdp=2", Alternating, None, None, false),
    Case("fsdp=2,pp=2", ZbV, None, None, false),
    Case("pp=2,tp=2", Alternating, Some(2), None, false),
    Case("tp=2,pp=2", GPipe, None, None, true),
    Case("pp=2,tp=2", ZbH1, None, None, true),
    Case("pp=2,cp=2", Alternating, None, None, false),
];

const MORE: [Case; 8] = [
    Case("pp=2,dp=2,tp=2", Alternating, None, None, true),
    Case("pp=2,dp=2,tp=2", ZbV, None, Some(1), false),
    Case("pp=2,fsdp=2,tp=2", ZbH1, None, None, false),
    Case("dp=2,pp=2,cp=2", Alternating, Some(2), Some(3), false),
    Case("pp=4,dp=2,tp=2", Alternating, None, None, false),
    Case("pp=2,dp=2,fsdp=2,tp=2", Alternating, None, None, true),
    Case("pp=2,fsdp=2,cp=2,tp=2", ZbV, None, None, false),
    Case("pp=2,dp=2,cp=2,tp=2", GPipe, None, Some(2), true),
];

fn split(training: &Training, case: Case) -> Training {
    let mut training = training.clone();
    let options = &mut training.options;
    (options.schedule, options.virtual_stages) = (case.1, case.2);
    options.zero = case.3.map(|n| Zero::stage(n).expect("a stage"));
    training.model = training.model.with_sequence_parallel(case.4);
    training
}

fn mesh(case: Case) -> Mesh {
    Mesh::parse(case.0).expect("a mesh")
}

/// One step by threads and as a ghost: the same events, bytes and memory.
fn traced(training: &Training, mesh: &Mesh, what: &str) -> Trace {
    let once = Training {
        options: Options {
            steps: 1,
            ..training.options.clone()
        },
        ..training.clone()
    };
    let run = once
        .run(&world(mesh), &|_| (), &AtomicBool::new(false))
        .unwrap_or_else(|e| panic!("{what}: {e}"));
    let ghost = once
        .trace(&World::ghost(mesh))
        .unwrap_or_else(|e| panic!("{what}: {e}"));
    assert_eq!(run.trace().difference(&ghost), None, "{what}");
    assert_eq!(run.pool_peaks(), ghost.peak_bytes(), "{what}");
    assert_eq!(
        ghost.classes.len(),
        mesh.size_of("pp"),
        "{what}: a class for each stage"
    );
    ghost
}

fn agree(name: &str, plain: &Training, cases: &[Case]) {
    let single = losses(plain, &world(&Mesh::single()));
    assert!(single[0] - single[single.len() - 1] > 0.05, "{name} learns");
    for case in cases {
        let (training, what) = (split(plain, *case), format!("{name} on {case:?}"));
        let got = losses(&training, &world(&mesh(*case)));
        assert_close(&got, &single, 1e-5, &what);
        traced(&training, &mesh(*case), &what);
    }
}

/// Every case: its mesh, its name, and the training split so.
pub(crate) fn all() -> impl Iterator<Item = Cut> {
    let cases = ALONE.into_iter().chain(PAIRS).chain(MORE);
    cases.map(|case| -> Cut {
        Box::new(move |plain| (mesh(case), format!("{case:?}"), split(plain, case)))
    })
}

fn tied_and_not() -> [(&'static str, Config); 2] {
    [("gpt2", gpt2()), ("llama", llama())]
}

#[test]
fn every_schedule_alone() {
    for (name, config) in tied_and_not() {
        agree(name, &training(config, ROWS, STEPS), &ALONE);
    }
}

#[test]
fn pipelines_beside_one_other_split() {
    for (name, config) in tied_and_not() {
        agree(name, &training(config, ROWS, STEPS), &PAIRS);
    }
}

#[test]
fn pipelines_beside_two_and_three_others() {
    for (name, config) in tied_and_not() {
        agree(name, &training(config, ROWS, STEPS), &MORE);
    }
}

#[test]
fn micro_batches_recomputation_and_dropout_go_with_them() {
    let config = Config {
        dropout: 0.2,
        layers: 3,
        ..llama()
    };
    let mut plain = training(config, ROWS, STEPS);
    plain.model = plain.model.with_recompute(true);
    // Draws of dropout belong to a micro-batch.
    plain.options.micro_batch = Some(2);
    let cases = [
        Case("pp=2", ZbH1, None, None, false),
        Case("pp=3", Alternating, None, None, false),
        Case("pp=2", ZbV, None, None, false),
    ];
    agree("recomputed, with dropout", &plain, &cases);
}

/// Without a sum over stages (tied embeddings, clipping) nothing is added in another order than on one chip with the same
/// micro-batches: losses are equal bit for bit.
#[test]
fn a_pipeline_gives_the_bits_of_one_chip_with_the_same_micro_batches() {
    let mut plain = training(llama(), ROWS, STEPS);
    plain.options.micro_batch = Some(2);
    plain.options.optimizer.clip = None;
    let single = losses(&plain, &world(&Mesh::single()));
    for case in ALONE {
        let got = losses(&split(&plain, case), &world(&mesh(case)));
        assert_eq!(bits(&got), bits(&single), "{case:?}");
    }
}

#[test]
fn two_runs_are_equal_bit_for_bit() {
    for case in [MORE[0], MORE[6]] {
        let training = split(&training(gpt2(), ROWS, 4), case);
        let first = losses(&training, &world(&mesh(case)).with_threads(1));
        let again = losses(&training, &world(&mesh(case)).with_threads(2));
        assert_eq!(bits(&first), bits(&again), "{case:?}");
    }
}

/// Each stage sends values [b, t, c] to the part behind and gradients to the part before, once for every micro-batch; a tied
/// embedding [v, c] crosses once each way.
#[test]
fn bytes_are_the_formulas() {
    for (name, config) in tied_and_not() {
        for case in ALONE
            .into_iter()
            .chain([PAIRS[0], PAIRS[5], PAIRS[7], MORE[0]])
        {
            let mut training = split(&training(config.clone(), ROWS, 1), case);
            training.options.micro_batch = Some(2);
            let mesh = mesh(case);
            let what = format!("{name} on {case:?}");
            let ghost = training.trace(&World::ghost(&mesh)).expect("a trace");
            let (p, tp) = (mesh.size_of("pp"), mesh.size_of("tp"));
            let dp = mesh.size_of("dp") * mesh.size_of("fsdp");
            let micros = ROWS / dp / 2;
            let chunks = case.2.unwrap_or(case.1.chunks());
            let plan = Plan::new(case.1, p, chunks, micros).expect("a plan");
            // Two sequences of 16 tokens in f32; with sequence parallelism each chip of tp has its share of tokens.
            let value = 2 * 16 * config.hidden * 4 / if case.4 { tp } else { 1 };
            let crosses = |part: &usize| plan.place(*part).0 != plan.place(part - 1).0;
            let borders: Vec<usize> = (1..plan.parts()).filter(crosses).collect();
            for stage in 0..p {
                let sends = |part: &&usize| plan.place(**part - 1).0 == stage;
                let takes = |part: &&usize| plan.place(**part).0 == stage;
                let messages =
                    borders.iter().filter(sends).count() + borders.iter().filter(takes).count();
                let ends = [0, plan.last_stage()];
                let shares = config.tied && plan.last_stage() > 0 && ends.contains(&stage);
                let table = config.vocab.div_ceil(tp) * config.hidden * 4;
                let want = messages * micros * value + if shares { table } else { 0 };
                let at: Vec<usize> = mesh
                    .axes()
                    .iter()
                    .map(|a| if a.name() == "pp" { stage } else { 0 })
                    .collect();
                let chip = ghost.chip(mesh.rank_at(&at));
                let sent = chip.collectives.iter().find(|c| *c.op == *"send");
                let sent = sent.expect("every stage sends");
                assert_eq!(sent.axis, "pp");
                assert_eq!(sent.bytes, want as u64, "{what} stage {stage}");
                assert_eq!(sent.bytes, sent.floor_bytes);
                assert_eq!(
                    sent.bytes, sent.overlapped_bytes,
                    "sends run beside the program"
                );
                assert_eq!(
                    sent.calls as usize,
                    messages * micros + shares as usize,
                    "{what} stage {stage}"
                );
            }
        }
    }
}

/// Pieces of work in the order in which a chip did them, with the part's first layer: attention marks a forward or a backward
/// of that layer, and its two norms' gradients the weights.
fn order(chip: &ChipTrace, first_layers: &[usize]) -> Vec<(Phase, usize)> {
    let mut pieces = Vec::new();
    let mut norms = 0;
    for event in chip.events() {
        let scope = chip.scope(event);
        let Some(rest) = scope.split("layers.").nth(1) else {
            continue;
        };
        let layer = rest.split('.').next().expect("a number");
        let layer = layer.parse::<usize>().expect("a number");
        let marks = match (event.phase, &*event.op) {
            (Phase::Forward, "attention") | (Phase::Backward, "attention.backward") => true,
            (Phase::Weight, "rms_norm.backward") => {
                norms += first_layers.contains(&layer) as usize;
                norms % 2 == 1
            }
            _ => false,
        };
        if marks && first_layers.contains(&layer) {
            pieces.push((event.phase, layer));
        }
    }
    pieces
}

#[test]
fn a_stage_works_in_the_order_of_its_list() {
    // Six layers, so that every part of up to four has one.
    let config = Config {
        layers: 6,
        ..llama()
    };
    let cases = [
        Case("pp=4", GPipe, None, None, false),
        Case("pp=4", Alternating, None, None, false),
        Case("pp=2", Alternating, Some(2), None, false),
        Case("pp=4", ZbH1, None, None, false),
        Case("pp=2", ZbV, None, None, false),
    ];
    for case in cases {
        let training = split(&training(config.clone(), ROWS, 1), case);
        let mesh = mesh(case);
        let ghost = training.trace(&World::ghost(&mesh)).expect("a trace");
        let p = mesh.size_of("pp");
        let chunks = case.2.unwrap_or(case.1.chunks());
        let plan = Plan::new(case.1, p, chunks, ROWS).expect("a plan");
        let layers = layers_of_parts(6, plan.parts()).expect("parts with layers");
        let first: Vec<usize> = layers.iter().map(|range| range.start).collect();
        for stage in 0..p {
            let want = plan.list(stage).into_iter().map(|piece| {
                let phase = match piece.work {
                    Work::Forward => Phase::Forward,
                    Work::Backward | Work::Inputs => Phase::Backward,
                    Work::Weights => Phase::Weight,
                };
                (phase, first[plan.part(stage, piece.chunk)])
            });
            let got = order(ghost.chip(stage), &first);
            assert_eq!(got, want.collect::<Vec<_>>(), "{case:?} stage {stage}");
        }
    }
}

/// What a stage holds grows with its micro-batches under GPipe, and under the others no further than the formula says.
#[test]
fn memory_grows_with_what_is_held() {
    let config = Config {
        layers: 6,
        ..llama()
    };
    let peak = |case: Case, rows: usize| {
        let training = split(&training(config.clone(), rows, 1), case);
        let trace = training.trace(&World::ghost(&mesh(case))).expect("a trace");
        trace.peak_bytes()[0]
    };
    let grows = |case: Case| (6..12).map(move |m| peak(case, m + 1) - peak(case, m));
    let gpipe = Case("pp=4", GPipe, None, None, false);
    let each: BTreeSet<u64> = grows(gpipe).collect();
    assert!(each.len() == 1 && !each.contains(&0), "{each:?}");
    for schedule in [Alternating, ZbH1] {
        let case = Case("pp=4", schedule, None, None, false);
        assert!(grows(case).all(|more| more == 0), "{schedule}");
        // Four are held, however many there are.
        assert!(peak(case, 12) < peak(gpipe, 12), "{schedule}");
    }
}

#[test]
fn checkpoints_go_from_pipelines_to_other_meshes_and_back() {
    for (name, config) in tied_and_not() {
        let plain = training(config, ROWS, 6);
        let single = losses(&plain, &world(&Mesh::single()));
        let ways = [
            (PAIRS[0], Case("tp=2", Alternating, None, Some(0), false)),
            (Case("tp=2", Alternating, None, None, true), MORE[1]),
            (ALONE[4], ALONE[7]),
        ];
        for (before, after) in ways {
            let what = format!("{name} from {before:?} to {after:?}");
            let dir = tempfile::tempdir().expect("a directory");
            let mut part = split(&plain, before);
            part.options.checkpoint = Some(dir.path().into());
            part.options.steps = 3;
            assert_close(
                &losses(&part, &world(&mesh(before))),
                &single[..3],
                1e-5,
                &what,
            );
            let mut rest = split(&plain, after);
            rest.options.checkpoint = Some(dir.path().into());
            rest.options.resume = true;
            let reports = reports(&rest, &world(&mesh(after))).expect("a run that goes on");
            assert_close(&step_losses(&reports), &single[3..], 1e-5, &what);
        }
    }
}

#[test]
fn a_resumed_pipeline_goes_on_bit_for_bit() {
    let case = Case("pp=2,dp=2", ZbV, None, Some(1), false);
    let run = |steps: u64, dir: &std::path::Path, resume: bool| {
        let mut training = split(&training(gpt2(), ROWS, steps), case);
        training.options.checkpoint = Some(dir.into());
        training.options.resume = resume;
        reports(&training, &world(&mesh(case))).expect("a run");
        weights(dir).into_values().collect::<Vec<_>>()
    };
    let (one, two) = (tempfile::tempdir(), tempfile::tempdir());
    let (one, two) = (one.expect("a directory"), two.expect("a directory"));
    let whole = run(4, one.path(), false);
    run(2, two.path(), false);
    assert_eq!(run(4, two.path(), true), whole);
}

#[test]
fn validation_and_samples_do_not_depend_on_stages() {
    for (name, config) in tied_and_not() {
        let mut plain = training(config, ROWS, 2);
        plain.options.sample = 6;
        plain.options.eval_every = Some(2);
        let run = |training: &Training, mesh: &Mesh| {
            let run = training.run(&world(mesh), &|_| (), &AtomicBool::new(false));
            let run = run.unwrap_or_else(|e| panic!("{name} on {mesh}: {e}"));
            let all = run.outputs().iter();
            all.map(|o| (o.val_loss.expect("a validation"), o.sample.clone()))
                .collect::<Vec<_>>()
        };
        let (want, text) = run(&plain, &Mesh::single())[0].clone();
        assert_eq!(text.len(), 7);
        for case in [ALONE[2], ALONE[4], ALONE[7], PAIRS[6], MORE[0]] {
            for (loss, sample) in run(&split(&plain, case), &mesh(case)) {
                assert!((loss - want).abs() <= 1e-5, "{name} on {case:?}: {loss}");
                assert_eq!(sample, text, "{name} on {case:?}");
            }
        }
    }
}

#[test]
fn the_layout_says_which_stage_holds_what() {
    let training = training(gpt2(), ROWS, 1);
    let mesh = Mesh::parse("pp=2,dp=2").expect("a mesh");
    let layout = training.layout(&World::ghost(&mesh)).expect("a layout");
    let names = |stage: usize| -> BTreeSet<&str> {
        let held = layout.parameters.iter().filter(|r| r.stage == stage);
        held.map(|r| r.name.as_str()).collect()
    };
    let (first, last) = (names(0), names(1));
    assert!(first.contains("wpe") && !last.contains("wpe"));
    assert!(last.contains("norm.weight") && !first.contains("norm.weight"));
    assert!(
        first.contains("wte") && last.contains("wte"),
        "a tied embedding is on both"
    );
    let psi = training.model.config().parameters() + 29 * 32;
    let kept = (0..2).map(|stage| layout.kept_bytes(stage).0).sum::<u64>();
    assert_eq!(kept, 4 * psi);
    let sends = |m: &&supernode::train::Move| m.op == "send" && m.axis == "pp";
    assert_eq!(layout.moves.iter().filter(sends).count(), 4);
    let text = layout.to_string();
    assert!(text.contains("stage  parameter"), "{text}");
}

#[test]
fn impossible_pipelines_say_what_stands_in_the_way() {
    let refused = |mesh: &'static str, schedule, chunks, micro: Option<usize>| {
        let mut training = training(llama(), ROWS, 1);
        training.options.schedule = schedule;
        training.options.virtual_stages = chunks;
        training.options.micro_batch = micro;
        let mesh = Mesh::parse(mesh).expect("a mesh");
        training.check(&mesh).expect_err("refused").to_string()
    };
    type Wrong = (
        &'static str,
        Schedule,
        Option<usize>,
        Option<usize>,
        &'static [&'static str],
    );
    let cases: [Wrong; 6] = [
        (
            "pp=5",
            Alternating,
            None,
            None,
            &["pp=5", "2 layers", "only 4", "pp=4 would do"],
        ),
        (
            "pp=3",
            ZbV,
            None,
            None,
            &["pp=3", "2 virtual stages", "6 parts", "pp=2 would do"],
        ),
        ("pp=2", GPipe, Some(2), None, &["gpipe", "one chunk"]),
        ("pp=2", ZbV, Some(3), None, &["zb-v", "two chunks", "3"]),
        ("pp=2", Alternating, Some(0), None, &["chunks", "not 0"]),
        (
            "pp=2",
            Alternating,
            None,
            Some(3),
            &["micro-batch of 3", "2 does"],
        ),
    ];
    for (mesh, schedule, chunks, micro, parts) in cases {
        let message = refused(mesh, schedule, chunks, micro);
        for part in parts {
            assert!(message.contains(part), "'{part}' is missing in: {message}");
        }
    }
    let mut training = training(llama(), ROWS, 1);
    training.model = training.model.with_sequence_parallel(true);
    let why = training.check(&Mesh::parse("dp=2").expect("a mesh"));
    let why = why.expect_err("refused").to_string();
    assert!(why.contains("chips of tp") && why.contains("tp=2"), "{why}");
}

#[test]
fn sends_are_waited_for_where_they_are_known_to_have_arrived() {
    let training = split(&training(llama(), ROWS, 1), ALONE[7]);
    let trace = traced(&training, &mesh(ALONE[7]), "1f1b");
    for rank in 0..4 {
        let chip = trace.chip(rank);
        let started = chip.events().filter(|e| e.stream == Stream::Communication);
        let tickets: BTreeSet<_> = started.map(|e| e.ticket.expect("a ticket")).collect();
        let waits = chip.events().filter(|e| e.kind == EventKind::Wait);
        let waited: BTreeSet<_> = waits.map(|e| e.ticket.expect("a ticket")).collect();
        assert!(!tickets.is_empty());
        assert_eq!(tickets, waited, "rank {rank}");
    }
}

#[test]
fn every_stage_reports_the_same_loss_and_norm() {
    let case = ALONE[7];
    let training = split(&training(gpt2(), ROWS, 2), case);
    let single = reports(&training, &world(&Mesh::single())).expect("a run");
    let got = reports(&training, &world(&mesh(case))).expect("a run");
    let norms = |reports: &[Report]| -> Vec<f64> {
        let norm = |r: &Report| match r {
            Report::Step { gradient_norm, .. } => Some(*gradient_norm),
            _ => None,
        };
        reports.iter().filter_map(norm).collect()
    };
    assert_close(&norms(&got), &norms(&single), 1e-5, "norms");
    let run = training.run(&world(&mesh(case)), &|_| (), &AtomicBool::new(false));
    let run = run.expect("a run");
    let ends: BTreeSet<u64> = run
        .outputs()
        .iter()
        .map(|o| o.loss.expect("a loss").to_bits())
        .collect();
    assert_eq!(ends.len(), 1, "{ends:?}");
}
