//! Mixtures of experts on every kind of mesh with an axis ep: losses, gradients, traces and what is dropped are those of one
//! chip.
//!
//! A router's choice is no continuous function: a token whose last chosen and first unchosen score lie within rounding may go
//! elsewhere on another mesh, and the losses part. The models' seeds and spreads of their routers' weights are such that no
//! choice of any step hangs on less than 1e-4 (`Route::CLOSE`, a thousand times what rounding moves here);
//! `no_choice_is_close` holds them to that.

use super::gradients;
use super::splits::{Case, agree, cuts, split};
use crate::tiny::{
    assert_close, batches, bits, deepseek, losses, mixture, reports, step_losses, world,
};
use supernode::mesh::Mesh;
use supernode::model::{Balance, Config, ContextMethod, Mixture};
use supernode::train::{ExpertLoads, Report, Training};
use supernode::{DType, World};

const STEPS: u64 = 10;
const ROWS: usize = 16;

const ALONE: [Case; 2] = [("ep=2", None, false), ("ep=4", None, false)];

const PAIRS: [Case; 10] = [
    ("dp=2,ep=2", None, false),
    ("ep=2,dp=2", None, false),
    ("dp=2,ep=2", Some(1), false),
    ("dp=2,ep=2", Some(2), false),
    ("dp=2,ep=2", Some(3), false),
    ("fsdp=2,ep=2", None, false),
    ("ep=2,tp=2", None, true),
    ("tp=2,ep=2", None, false),
    ("ep=2,cp=2", None, false),
    ("cp=2,ep=2", None, false),
];

const MORE: [Case; 17] = [
    ("dp=2,ep=2,tp=2", None, true),
    ("dp=2,tp=2,ep=2", Some(1), false),
    ("dp=2,fsdp=2,ep=2", None, false),
    ("dp=2,ep=2,cp=2", Some(2), false),
    ("ep=2,cp=2,tp=2", None, true),
    ("fsdp=2,ep=2,tp=2", None, false),
    ("fsdp=2,ep=2,cp=2", None, false),
    ("tp=2,fsdp=2,ep=2", Some(2), true),
    ("ep=4,tp=2", None, false),
    ("dp=4,ep=4", Some(3), false),
    ("dp=2,ep=4,tp=2", None, true),
    ("dp=2,fsdp=2,ep=2,tp=2", None, true),
    ("dp=2,ep=2,cp=2,tp=2", Some(1), false),
    ("fsdp=2,ep=2,cp=2,tp=2", None, true),
    ("pp=2,ep=2", None, false),
    ("dp=2,pp=2,ep=2", Some(1), false),
    ("pp=2,ep=2,tp=2", None, true),
];

fn models() -> [(&'static str, Config); 2] {
    [("mixture", mixture()), ("deepseek", deepseek())]
}

/// A model's training on the batches of its seed.
fn training(config: Config, rows: usize, steps: u64) -> Training {
    let seed = if config.latent.is_some() { 85 } else { 22 };
    Training {
        batches: batches(rows, seed),
        ..crate::tiny::training(config, rows, steps)
    }
}

fn loads(training: &Training, mesh: &str) -> Vec<ExpertLoads> {
    let mesh = Mesh::parse(mesh).expect("a mesh");
    let reports = reports(training, &world(&mesh)).unwrap_or_else(|e| panic!("on {mesh}: {e}"));
    let of = |report: &Report| match report {
        Report::Step { experts, .. } => *experts,
        _ => None,
    };
    let loads: Vec<ExpertLoads> = reports.iter().filter_map(of).collect();
    assert_eq!(loads.len() as u64, training.options.steps);
    loads
}

fn with(config: &Config, change: impl FnOnce(&mut Mixture)) -> Config {
    let mut config = config.clone();
    change(config.mixture.as_mut().expect("a mixture"));
    config
}

#[test]
fn no_choice_is_close() {
    for (name, config) in models() {
        for loads in loads(&training(config, ROWS, STEPS), "single") {
            assert_eq!(loads.close, 0, "{name}: {loads:?}; another seed would do");
        }
    }
}

#[test]
fn experts_alone() {
    for (name, config) in models() {
        agree(name, &training(config, ROWS, STEPS), &ALONE, 1e-5);
    }
}

#[test]
fn experts_in_pairs() {
    for (name, config) in models() {
        agree(name, &training(config, ROWS, STEPS), &PAIRS, 1e-5);
    }
}

#[test]
fn experts_in_threes_and_fours() {
    for (name, config) in models() {
        agree(name, &training(config, ROWS, STEPS), &MORE, 1e-5);
    }
}

#[test]
fn gathered_gradients_are_those_of_one_chip() {
    for (name, config) in models() {
        // The batch of this test has eight sequences.
        let mut cases: Vec<Case> = [&ALONE[..], &PAIRS, &MORE].concat();
        cases.retain(|case| case.0 != "dp=4,ep=4");
        let batch = |rows, steps| training(config.clone(), rows, steps);
        gradients::agree(name, &batch, cuts(cases));
    }
}

#[test]
fn recomputation_and_micro_batches_go_with_them() {
    let cases = [("ep=2", None, false), ("fsdp=2,ep=2,tp=2", None, true)];
    for (name, config) in models() {
        let mut plain = training(config, ROWS, STEPS);
        let single = losses(&plain, &world(&Mesh::single()));
        plain.options.micro_batch = Some(2);
        let micro = losses(&plain, &world(&Mesh::single()));
        assert_close(&micro, &single, 1e-5, "one chip in micro-batches");
        agree(name, &plain, &cases, 1e-5);
        plain.model = plain.model.with_recompute(true);
        agree(name, &plain, &cases, 1e-5);
        let counted = loads(&plain, "single");
        plain.options.micro_batch = None;
        plain.model = plain.model.with_recompute(false);
        assert_eq!(counted, loads(&plain, "single"), "{name}: counted once");
    }
}

#[test]
fn two_runs_are_equal_bit_for_bit() {
    let case = ("dp=2,ep=2,tp=2", None, true);
    for (name, config) in models() {
        let training = split(&training(config, ROWS, 4), case);
        let mesh = Mesh::parse(case.0).expect("a mesh");
        let first = losses(&training, &world(&mesh).with_threads(1));
        let again = losses(&training, &world(&mesh).with_threads(2));
        assert_eq!(bits(&first), bits(&again), "{name}");
    }
}

#[test]
fn bf16_learns() {
    for (name, config) in models() {
        let mut training = training(config, ROWS, STEPS);
        let f32 = losses(&training, &world(&Mesh::single()));
        training.model = training.model.with_dtype(DType::Bf16);
        for mesh in ["single", "ep=2,tp=2"] {
            let got = losses(&training, &world(&Mesh::parse(mesh).expect("a mesh")));
            // Choices turn here and there: what is asked is the course of the losses.
            assert_close(&got, &f32, 0.05, &format!("{name} in bf16 on {mesh}"));
            assert!(got[got.len() - 1] < got[0] - 0.05, "{name}: {got:?}");
        }
    }
}

/// What a sequence loses does not depend on the mesh, and is what its capacity says.
#[test]
fn what_is_dropped_is_counted_and_is_the_same_on_every_mesh() {
    let assignments = (ROWS * 16 * 2) as u64;
    for (name, config) in models() {
        let layers =
            (config.layers - config.mixture.as_ref().expect("a mixture").dense_layers) as u64;
        for (factor, some) in [(Some(0.5), true), (Some(1.0), true), (None, false)] {
            let config = with(&config, |m| m.capacity_factor = factor);
            let plain = training(config, ROWS, 3);
            let single = loads(&plain, "single");
            for loads in &single {
                assert_eq!(loads.asked, layers * assignments);
                assert_eq!(loads.dropped > 0, some, "{name} with {factor:?}");
                assert!(
                    loads.busiest >= 1.0 && loads.close == 0,
                    "{name}: {loads:?}"
                );
            }
            if factor == Some(0.5) {
                // Half the fair share: at most half of what is asked finds a slot.
                assert!(
                    single.iter().all(|l| 2 * l.dropped >= l.asked),
                    "{single:?}"
                );
            }
            for mesh in ["ep=4", "dp=2,ep=2,tp=2", "ep=2,cp=2", "pp=2,ep=2"] {
                assert_eq!(
                    loads(&plain, mesh),
                    single,
                    "{name} with {factor:?} on {mesh}"
                );
            }
        }
    }
}

/// Chips of a ring keep an early and a late part of the sequence; slots are filled in the order of the text all the same.
#[test]
fn a_ring_drops_what_one_chip_drops() {
    for (name, config) in models() {
        let mut plain = training(config, ROWS, STEPS);
        let single = loads(&plain, "single");
        plain.model = plain.model.with_context_method(Some(ContextMethod::Ring));
        let cases = [("cp=2", None, false), ("ep=2,cp=2,tp=2", None, true)];
        agree(name, &plain, &cases, 1e-5);
        let counts = |all: Vec<ExpertLoads>| -> Vec<(u64, u64)> {
            all.iter().map(|l| (l.asked, l.dropped)).collect()
        };
        assert_eq!(counts(loads(&plain, "ep=2,cp=4")), counts(single), "{name}");
    }
}

#[test]
fn the_auxiliary_loss_and_the_bias_even_out_the_loads() {
    let steps = 60;
    let course = |config: &Config, balance: Balance| {
        let config = with(config, |m| m.balance = balance);
        let loads = loads(&training(config, 8, steps), "single");
        let mean = |range: std::ops::Range<usize>| {
            let n = range.len() as f64;
            loads[range].iter().map(|l| l.busiest).sum::<f64>() / n
        };
        (mean(0..5), mean(55..60))
    };
    for (name, config) in models() {
        let (_, left_alone) = course(&config, Balance::Nothing);
        let (_, by_loss) = course(&config, Balance::Auxiliary { weight: 0.5 });
        let (_, by_bias) = course(&config, Balance::Bias { rate: 0.02 });
        assert!(
            by_loss < left_alone - 0.1,
            "{name}: {by_loss} against {left_alone}"
        );
        assert!(
            by_bias < left_alone - 0.1,
            "{name}: {by_bias} against {left_alone}"
        );
    }
}

#[test]
fn a_checkpoint_goes_on_another_mesh() {
    let dir = tempfile::tempdir().expect("a directory");
    let plain = training(deepseek(), ROWS, 6);
    let single = losses(&plain, &world(&Mesh::single()));
    let mut part = plain.clone();
    part.options.checkpoint = Some(dir.path().into());
    part.options.steps = 3;
    let first = losses(&part, &world(&Mesh::parse("dp=2,ep=2").expect("a mesh")));
    assert_close(&first, &single[..3], 1e-5, "before");
    part.options.resume = true;
    part.options.steps = 6;
    let mesh = Mesh::parse("ep=4,tp=2").expect("a mesh");
    let rest = step_losses(&reports(&part, &world(&mesh)).expect("a run that goes on"));
    assert_close(&rest, &single[3..], 1e-5, "after");
}

#[test]
fn parameters_are_counted() {
    for (name, config) in models() {
        let training = training(config.clone(), ROWS, 1);
        let layout = training
            .layout(&World::ghost(&Mesh::single()))
            .expect("a layout");
        let count = layout.kept_bytes(0).0 / 4;
        assert_eq!(count, config.parameters(), "{name}");
    }
}

#[test]
fn impossible_mixtures_say_what_stands_in_the_way() {
    let refused = |config: Config, mesh: &str, rows: usize| {
        let training = training(mixture(), rows, 1);
        let mesh = Mesh::parse(mesh).expect("a mesh");
        match config.check(&mesh) {
            Err(e) => e.to_string(),
            Ok(()) => training.check(&mesh).expect_err("refused").to_string(),
        }
    };
    let changed = |change: fn(&mut Mixture)| with(&mixture(), change);
    let cases: [(Config, &str, usize, &[&str]); 9] = [
        (
            mixture(),
            "ep=3",
            12,
            &["ep=3", "4 experts", "ep=2 does", "6 experts"],
        ),
        (mixture(), "ep=4", 6, &["ep=4", "batch of 6", "ep=3 does"]),
        (
            mixture(),
            "dp=2,ep=4",
            4,
            &["ep=4", "the 2 that dp leaves", "ep=2 does"],
        ),
        (
            mixture(),
            "dp=2,fsdp=2,ep=4",
            8,
            &["ep=4", "the 2 that dp and fsdp leave"],
        ),
        (
            crate::tiny::llama(),
            "ep=2",
            8,
            &["ep=2", "the model has none", "dp=2"],
        ),
        (
            changed(|m| m.experts_per_token = 5),
            "single",
            8,
            &["5 experts per token", "from 1 to 4"],
        ),
        (
            changed(|m| m.experts_per_token = 1),
            "single",
            8,
            &["learns nothing"],
        ),
        (
            changed(|m| m.capacity_factor = Some(0.0)),
            "single",
            8,
            &["capacity factor 0"],
        ),
        (
            changed(|m| m.dense_layers = 2),
            "single",
            8,
            &["2 dense layers of 2", "at most 1"],
        ),
    ];
    for (config, mesh, rows, parts) in cases {
        let message = refused(config, mesh, rows);
        for part in parts {
            assert!(message.contains(part), "'{part}' is missing in: {message}");
        }
    }
    let narrow = changed(|m| m.expert_ffn = 30);
    let message = refused(narrow, "tp=4", 8);
    assert!(
        message.contains("tp=4") && message.contains("width of 30"),
        "{message}"
    );
}
