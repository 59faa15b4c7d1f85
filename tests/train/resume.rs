//! Checkpoints and what ends a run: nothing is lost, nothing is mixed up, and a resumed run is the uninterrupted one.

use crate::tiny::{
    self, CONTEXT, assert_close, bits, losses, mesh_of, reports, step_losses, training, weights,
    world,
};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use supernode::ErrorKind;
use supernode::mesh::Mesh;
use supernode::model::Config;
use supernode::spmd::{Chip, FromIndex};
use supernode::train::data::{Alphabet, Batches, Split, Tokens};
use supernode::train::schedule::LearningRate;
use supernode::train::{AdamW, Report, Training, checkpoint};

const HALF: u64 = 6;

/// The training, to `steps` steps, with checkpoints in `dir`.
fn into(dir: &Path, of: &Training, steps: u64, resume: bool) -> Training {
    let mut training = of.clone();
    training.options.checkpoint = Some(dir.into());
    training.options.steps = steps;
    training.options.resume = resume;
    training
}

fn refused(training: &Training, mesh: &Mesh) -> supernode::Error {
    reports(training, &world(mesh)).expect_err("it cannot run")
}

#[test]
fn a_resumed_run_is_the_uninterrupted_one_bit_for_bit() {
    let meshes = ["single", "dp=2", "tp=2", "dp=2,tp=2"];
    for (name, config) in tiny::models() {
        let config = Config {
            dropout: 0.1,
            ..config
        };
        let training = training(config, 8, 2 * HALF);
        for on in meshes {
            let dirs = [
                tempfile::tempdir().expect("a directory"),
                tempfile::tempdir().expect("a directory"),
            ];
            let (whole, halves) = (dirs[0].path(), dirs[1].path());
            let world = world(&mesh_of(on));
            let want = losses(&into(whole, &training, 2 * HALF, false), &world);
            let first = losses(&into(halves, &training, HALF, false), &world);
            assert_eq!(bits(&first), bits(&want[..HALF as usize]), "{name} on {on}");
            let told =
                reports(&into(halves, &training, 2 * HALF, true), &world).expect("it goes on");
            assert_eq!(told[0], Report::Resumed { step: HALF });
            assert_eq!(
                bits(&step_losses(&told)),
                bits(&want[HALF as usize..]),
                "{name} on {on}"
            );
            assert!(
                weights(halves) == weights(whole),
                "final parameters and state of {name} on {on}"
            );
        }
    }
}

#[test]
fn a_run_goes_on_on_another_mesh() {
    for (name, config) in tiny::models() {
        let training = training(config, 8, 2 * HALF);
        let want = losses(&training, &world(&Mesh::single()));
        for (from, to) in [
            ("single", "dp=2,tp=2"),
            ("dp=2,tp=4", "single"),
            ("tp=8", "dp=4"),
            ("dp=2", "tp=2"),
        ] {
            let dir = tempfile::tempdir().expect("a directory");
            losses(
                &into(dir.path(), &training, HALF, false),
                &world(&mesh_of(from)),
            );
            let told = reports(
                &into(dir.path(), &training, 2 * HALF, true),
                &world(&mesh_of(to)),
            )
            .expect("it goes on");
            assert_close(
                &step_losses(&told),
                &want[HALF as usize..],
                1e-5,
                &format!("{name} from {from} to {to}"),
            );
        }
    }
}

#[test]
fn a_checkpoint_holds_whole_unpadded_tensors_whatever_the_mesh() {
    let training = training(tiny::llama(), 8, 1);
    let shapes = |on: &str| {
        let dir = tempfile::tempdir().expect("a directory");
        losses(&into(dir.path(), &training, 1, false), &world(&mesh_of(on)));
        let loaded = checkpoint::load(dir.path()).expect("a checkpoint");
        let all = loaded
            .tensors()
            .map(|(name, dtype, shape)| (name.to_string(), dtype, shape.to_vec()));
        all.collect::<Vec<_>>()
    };
    let single = shapes("single");
    let embedding = single
        .iter()
        .find(|(name, ..)| name == "wte")
        .expect("an embedding");
    assert_eq!(embedding.2, [tiny::VOCAB, 64], "no padding");
    let elements: usize = single
        .iter()
        .map(|(.., shape)| shape.iter().product::<usize>())
        .sum();
    assert_eq!(
        elements as u64,
        3 * training.model.config().parameters(),
        "weights and two moments"
    );
    assert_eq!(shapes("dp=2,tp=4"), single);
}

#[test]
fn a_stop_request_finishes_the_step_and_saves() {
    for on in ["single", "dp=2,tp=2"] {
        let dir = tempfile::tempdir().expect("a directory");
        let of = training(tiny::gpt2(), 8, 1000);
        let (stop, told) = (AtomicBool::new(false), Mutex::new(Vec::new()));
        let observe = |report: &Report| {
            if matches!(report, Report::Step { step: 3, .. }) {
                stop.store(true, SeqCst);
            }
            told.lock()
                .expect("nobody panics while it is held")
                .push(report.clone());
        };
        let run = into(dir.path(), &of, 1000, false)
            .run(&world(&mesh_of(on)), &observe, &stop)
            .expect("it ends well");
        let steps = run.outputs()[0].steps;
        // Over several chips another one may have asked for step 4 before the first one told of step 3.
        assert!(
            steps == 3 || (on != "single" && steps == 4),
            "{steps} steps on {on}"
        );
        assert!(
            run.outputs().iter().all(|f| f.steps == steps),
            "all chips stop together"
        );
        let told = told.into_inner().expect("nobody panics while it is held");
        let last = [
            Report::Stopping { step: steps },
            Report::Saved {
                step: steps,
                path: dir.path().into(),
            },
        ];
        assert_eq!(told[told.len() - 2..], last, "on {on}");
        let want = losses(
            &into(&dir.path().join("other"), &of, steps + 2, false),
            &world(&mesh_of(on)),
        );
        let rest = reports(
            &into(dir.path(), &of, steps + 2, true),
            &world(&mesh_of(on)),
        )
        .expect("it goes on");
        assert_eq!(
            bits(&step_losses(&rest)),
            bits(&want[steps as usize..]),
            "and nothing was lost on {on}"
        );
    }
}

#[test]
fn a_loss_that_is_not_a_number_stops_the_run_and_keeps_the_last_good_checkpoint() {
    for on in ["single", "dp=2,tp=2"] {
        let dir = tempfile::tempdir().expect("a directory");
        let of = training(tiny::gpt2(), 8, 20);
        losses(&into(dir.path(), &of, HALF, false), &world(&mesh_of(on)));
        let good = weights(dir.path());
        let mut wild = into(dir.path(), &of, 20, true);
        wild.options.learning_rate = LearningRate::Constant { lr: 1e30 };
        for eval_every in [None, Some(1)] {
            wild.options.eval_every = eval_every;
            let error = refused(&wild, &mesh_of(on));
            assert_eq!(error.kind(), ErrorKind::NotFinite, "{error}");
            let sentence = error.to_string();
            // Step 7 does the damage; its evaluation or step 8 finds it.
            let step = if eval_every.is_some() {
                "step 7"
            } else {
                "step 8"
            };
            assert!(
                sentence.contains(step) && sentence.contains("checkpoint of step 6"),
                "{sentence}"
            );
            assert!(
                weights(dir.path()) == good,
                "the checkpoint is untouched on {on}, evaluating every {eval_every:?}"
            );
        }
        let told = reports(&into(dir.path(), &of, HALF + 2, true), &world(&mesh_of(on)))
            .expect("it goes on");
        assert_eq!(step_losses(&told).len(), 2);
    }
}

#[test]
fn a_loss_that_is_not_a_number_without_a_checkpoint_says_so() {
    let mut wild = training(tiny::nanogpt(), 8, 20);
    wild.options.learning_rate = LearningRate::Constant { lr: 1e30 };
    let error = refused(&wild, &Mesh::single());
    assert_eq!(error.kind(), ErrorKind::NotFinite);
    assert!(
        error.to_string().contains("the loss of step 2 is NaN")
            && error.to_string().contains("no checkpoint was written"),
        "{error}"
    );
}

fn of_text(text: &str, seed: u64) -> Batches {
    let tokens =
        Tokens::from_text(text.as_bytes(), Alphabet::Characters, "a text").expect("a text");
    let split = Split::new(tokens.len(), 0.9).expect("a share");
    Batches::new(tokens.into(), split, CONTEXT, 8, seed).expect("a text longer than a context")
}

#[test]
fn a_checkpoint_of_another_run_is_refused_with_what_differs() {
    let dir = tempfile::tempdir().expect("a directory");
    let of = training(tiny::gpt2(), 8, 1);
    losses(&into(dir.path(), &of, 1, false), &world(&Mesh::single()));
    let good = weights(dir.path());
    let resumed = into(dir.path(), &of, 2, true);
    let check = |training: &Training, seed: u64, parts: &[&str]| {
        let world = world(&Mesh::single()).with_seed(seed);
        let error = reports(training, &world).expect_err("another run's");
        assert_eq!(error.kind(), ErrorKind::Checkpoint, "{error}");
        for part in parts.iter().chain(&["of another"]) {
            assert!(
                error.to_string().contains(part),
                "'{part}' is missing in: {error}"
            );
        }
    };
    let shape = |change: fn(&mut Config)| {
        let mut config = tiny::gpt2();
        change(&mut config);
        Training {
            model: tiny::transformer(config),
            ..resumed.clone()
        }
    };
    check(
        &shape(|c| c.layers = 3),
        7,
        &["model", "layers", "2 there", "3 in this run"],
    );
    check(
        &shape(|c| c.hidden = 64),
        7,
        &["model", "hidden", "32 there", "64 in this run"],
    );
    check(
        &shape(|c| c.tied = false),
        7,
        &["model", "tied", "true there", "false in this run"],
    );
    check(&resumed, 8, &["seed", "7 there", "8 in this run"]);
    let text = tiny::text().replacen("quick", "quiet", 40);
    check(
        &Training {
            batches: of_text(&text, 7),
            ..resumed.clone()
        },
        7,
        &["text", "fingerprint"],
    );
    let mut other = resumed.clone();
    other.options.optimizer = AdamW {
        beta1: 0.5,
        ..AdamW::default()
    };
    check(&other, 7, &["kind of run", "beta1", "0.89999", "0.5"]);
    check(
        &Training {
            batches: tiny::batches(4, 7),
            ..resumed.clone()
        },
        7,
        &["kind of run", "batch", "8 there", "4 in this run"],
    );
    assert!(weights(dir.path()) == good);
    assert_eq!(losses_of(&resumed).len(), 1, "the right run goes on");
}

fn losses_of(training: &Training) -> Vec<f64> {
    step_losses(&reports(training, &world(&Mesh::single())).expect("it runs"))
}

#[test]
fn a_directory_that_holds_a_checkpoint_or_none_is_told() {
    let dir = tempfile::tempdir().expect("a directory");
    let of = training(tiny::gpt2(), 8, 1);
    let none = refused(&into(dir.path(), &of, 2, true), &Mesh::single());
    assert_eq!(none.kind(), ErrorKind::Checkpoint);
    assert!(
        none.to_string().contains("there is no checkpoint in"),
        "{none}"
    );
    losses(&into(dir.path(), &of, 1, false), &world(&Mesh::single()));
    let there = refused(&into(dir.path(), &of, 2, false), &Mesh::single());
    assert!(
        there
            .to_string()
            .contains("already holds a checkpoint of step 1"),
        "{there}"
    );
}

#[test]
fn a_damaged_checkpoint_is_refused() {
    let dir = tempfile::tempdir().expect("a directory");
    let of = training(tiny::gpt2(), 8, 1);
    losses(&into(dir.path(), &of, 1, false), &world(&Mesh::single()));
    let (name, whole) = weights(dir.path()).pop_first().expect("a file");
    let path = dir.path().join(name);
    let mut flipped = whole.clone();
    let middle = flipped.len() / 2;
    flipped[middle] ^= 4;
    for (bytes, word) in [
        (&whole[..whole.len() - 1], "cut short"),
        (&flipped, "damaged"),
    ] {
        std::fs::write(&path, bytes).expect("a file");
        let error = refused(&into(dir.path(), &of, 2, true), &mesh_of("dp=2"));
        assert_eq!(error.kind(), ErrorKind::Checkpoint);
        assert!(error.to_string().contains(word), "{error}");
    }
    std::fs::write(&path, &whole).expect("a file");
    assert_eq!(losses_of(&into(dir.path(), &of, 2, true)).len(), 1);
}

#[test]
fn meshes_that_do_not_divide_are_told_before_anything_runs() {
    let check = |training: &Training, on: &str, kind: ErrorKind, parts: &[&str]| {
        let error = refused(training, &mesh_of(on));
        assert_eq!(error.kind(), kind, "{error}");
        for part in parts {
            assert!(
                error.to_string().contains(part),
                "'{part}' is missing in: {error}"
            );
        }
    };
    let of = training(tiny::gpt2(), 8, 1);
    check(
        &of,
        "tp=3",
        ErrorKind::Mesh,
        &["tp=3 does not divide 8 heads", "tp=2 does"],
    );
    check(
        &of,
        "dp=3",
        ErrorKind::Mesh,
        &["dp=3 does not divide a batch of 8", "dp=2 does", "9"],
    );
    check(
        &of,
        "xy=2",
        ErrorKind::Mesh,
        &["xy=2", "dp, fsdp, ep, cp, tp and pp"],
    );
    let mut micro = of.clone();
    micro.options.micro_batch = Some(3);
    check(
        &micro,
        "dp=2",
        ErrorKind::Input,
        &["micro-batch of 3", "share of 4", "2 does"],
    );
    micro.options.micro_batch = Some(0);
    check(&micro, "dp=2", ErrorKind::Input, &["micro-batch of 0"]);
}

/// The mean loss over the validation split, one window after another on one chip.
fn window_by_window(training: &Training) -> f64 {
    let run = world(&Mesh::single()).run(|chip: &Chip| {
        let batches = &training.batches;
        let mut sum = 0.0;
        for window in 0..batches.validation_windows() {
            let (mut tokens, mut labels) = (vec![0; CONTEXT], vec![0; CONTEXT]);
            batches.fill_validation(window..window + 1, &mut tokens, &mut labels);
            let input = |name: &str, of: Vec<u32>| {
                chip.input(
                    name,
                    [1, CONTEXT],
                    chip.replicated(),
                    &FromIndex(move |i| of[i as usize]),
                )
            };
            let losses =
                training
                    .model
                    .losses(chip, &input("tokens", tokens), &input("labels", labels));
            sum += losses
                .read()
                .expect("a real chip")
                .iter()
                .map(|x| f64::from(*x))
                .sum::<f64>();
        }
        sum / batches.validation_labels() as f64
    });
    run.expect("it runs").outputs()[0]
}

#[test]
fn the_validation_loss_is_the_mean_over_all_windows_whatever_batch_and_mesh() {
    // Without learning, the validation loss depends on nothing but the text and the first weights.
    let of = |rows: usize| {
        let mut training = training(tiny::llama(), rows, 1);
        training.options.learning_rate = LearningRate::Constant { lr: 0.0 };
        training.options.eval_every = Some(1);
        training
    };
    let windows = of(8).batches.validation_windows();
    assert!(
        windows % 7 != 0 && windows % 8 != 0 && windows % 16 != 0,
        "{windows} windows: the last batch is not full"
    );
    let want = window_by_window(&of(8));
    assert!((want - (29f64).ln()).abs() < 0.1, "{want}");
    for (rows, on) in [
        (1, "single"),
        (7, "single"),
        (8, "single"),
        (64, "single"),
        (8, "dp=2"),
        (8, "tp=2"),
        (16, "dp=4,tp=2"),
    ] {
        let told = reports(&of(rows), &world(&mesh_of(on))).expect("it runs");
        let got = told.iter().find_map(|r| match r {
            Report::Validation { step: 1, loss } => Some(*loss),
            _ => None,
        });
        let got = got.expect("an evaluation");
        assert!(
            (got - want).abs() <= 1e-6,
            "{got} against {want} with {rows} rows on {on}"
        );
    }
}
