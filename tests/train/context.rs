//! Every way to split a sequence over cp gives the single chip's losses, gradients and checkpoints, alone and together with
//! the other axes, and the ghost's trace.

use super::splits::{Case, ROWS, STEPS, agree, split};
use crate::tiny::{
    Cut, assert_close, gpt2, latent, llama, losses, mixture, models_of_three, step_losses, text,
    training, world,
};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use supernode::mesh::Mesh;
use supernode::model::{Config, ContextMethod};
use supernode::train::Training;
use supernode::train::data::{Alphabet, Batches, Tokens};
use supernode::{DType, World};

const RING: ContextMethod = ContextMethod::Ring;
const ULYSSES: ContextMethod = ContextMethod::Ulysses;
const USP: ContextMethod = ContextMethod::Usp { exchange: Some(2) };

const EACH: [(ContextMethod, &[Case]); 3] = [
    (
        RING,
        &[
            ("cp=2", None, false),
            ("cp=4", None, false),
            ("dp=2,cp=2", None, false),
            ("cp=2,dp=2", Some(2), false),
            ("fsdp=2,cp=2", None, false),
            ("cp=2,tp=2", None, false),
            ("tp=2,cp=2", None, true),
            ("pp=2,cp=2", None, false),
        ],
    ),
    (
        ULYSSES,
        &[
            ("cp=2", None, false),
            ("cp=4", None, false),
            ("cp=2,tp=2", None, false),
        ],
    ),
    (
        USP,
        &[
            ("cp=2", None, false),
            ("cp=4", None, false),
            ("dp=2,cp=4", Some(1), false),
            ("fsdp=2,cp=4", None, false),
            ("cp=4,tp=2", None, true),
        ],
    ),
];

/// Three axes and more, up to 16 chips.
const MORE: [(ContextMethod, &[Case]); 2] = [
    (
        RING,
        &[
            ("dp=2,fsdp=2,cp=2", None, false),
            ("dp=2,cp=2,tp=2", Some(1), true),
            ("fsdp=2,cp=2,tp=2", None, true),
            ("tp=2,cp=2,fsdp=2", None, false),
            ("dp=2,cp=4,tp=2", None, false),
            ("dp=2,fsdp=2,cp=2,tp=2", None, true),
        ],
    ),
    (
        USP,
        &[
            ("dp=2,cp=4,tp=2", Some(3), false),
            ("fsdp=2,cp=4,tp=2", None, true),
            ("cp=8,tp=2", None, false),
        ],
    ),
];

fn with(mut training: Training, method: ContextMethod) -> Training {
    training.model = training.model.with_context_method(Some(method));
    training
}

#[test]
fn each_way_alone_and_in_pairs() {
    for (name, config) in [("gpt2", gpt2()), ("llama", llama())] {
        for (method, cases) in EACH {
            let plain = with(training(config.clone(), ROWS, STEPS), method);
            agree(&format!("{name} by {method}"), &plain, cases, 1e-5);
        }
    }
}

#[test]
fn three_and_four_ways_at_once() {
    for (name, config) in [("gpt2", gpt2()), ("llama", llama())] {
        for (method, cases) in MORE {
            let plain = with(training(config.clone(), ROWS, STEPS), method);
            agree(&format!("{name} by {method}"), &plain, cases, 1e-5);
        }
    }
}

/// Every case: its mesh, its name, and the training split so.
pub(crate) fn all() -> impl Iterator<Item = Cut> {
    let each = EACH.into_iter().chain(MORE);
    let cases = each.flat_map(|(method, cases)| cases.iter().map(move |case| (method, *case)));
    cases.map(|(method, case)| -> Cut {
        Box::new(move |plain| {
            let mesh = Mesh::parse(case.0).expect("a mesh");
            let training = with(split(plain, case), method);
            (mesh, format!("{case:?} by {method}"), training)
        })
    })
}

#[test]
fn lengths_that_do_not_divide() {
    // 16 tokens over 3 and 6 chips; 13 over 4.
    for (name, config) in models_of_three() {
        let plain = with(training(config, 6, STEPS), RING);
        agree(
            name,
            &plain,
            &[("cp=3", None, false), ("cp=6", None, false)],
            1e-5,
        );
    }
    let odd = Config {
        context: 13,
        ..gpt2()
    };
    let mut plain = with(training(gpt2(), ROWS, 4), RING);
    let tokens = Tokens::from_text(text().as_bytes(), Alphabet::Characters, "tiny text");
    let (tokens, split) = (
        Arc::new(tokens.expect("a text")),
        plain.batches.split().clone(),
    );
    plain.batches = Batches::new(tokens, split, 13, ROWS, 7).expect("batches");
    plain.model = crate::tiny::transformer(odd).with_context_method(Some(RING));
    agree(
        "13 tokens",
        &plain,
        &[("cp=4", None, false), ("cp=2,tp=2", None, true)],
        1e-5,
    );
}

#[test]
fn the_ring_is_the_default_where_heads_do_not_divide() {
    let mesh = |m: &str| Mesh::parse(m).expect("a mesh");
    let model = training(llama(), ROWS, 1).model;
    assert_eq!(model.context_method(&mesh("cp=4")), ULYSSES);
    assert_eq!(model.context_method(&mesh("cp=3")), RING);
    assert_eq!(model.context_method(&mesh("tp=4,cp=4")), RING);
    let plain = training(llama(), ROWS, STEPS);
    agree("cp=3", &plain, &[("cp=3", None, false)], 1e-5);
    let usp = |exchange| {
        model
            .clone()
            .with_context_method(Some(ContextMethod::Usp { exchange }))
    };
    usp(None)
        .check(&mesh("cp=16"))
        .expect("8 exchange heads, 2 make a ring");
    let refused = usp(Some(3))
        .check(&mesh("cp=4"))
        .expect_err("refused")
        .to_string();
    for part in ["3 chips", "4 chips of cp", "2 do"] {
        assert!(refused.contains(part), "{refused}");
    }
}

#[test]
fn dropout_recomputation_and_bf16_go_with_the_ring() {
    let cases = [("cp=4", None, false), ("cp=2,tp=2", None, true)];
    let config = Config {
        dropout: 0.2,
        ..llama()
    };
    let mut plain = with(training(config, ROWS, STEPS), RING);
    agree("with dropout", &plain, &cases, 1e-5);
    plain.model = plain.model.with_recompute(true);
    agree("recomputed", &plain, &cases, 1e-5);
    plain.options.eval_every = Some(5);
    let mut narrow = with(training(llama(), ROWS, STEPS), USP);
    narrow.model = narrow.model.with_dtype(DType::Bf16);
    agree("bf16", &narrow, &[("cp=4", None, false)], 0.02);
}

#[test]
fn mixtures_and_latents_go_with_the_ring() {
    // Slots of experts are filled in the order of the text, whatever order the ring keeps.
    for (name, config) in [("mixture", mixture()), ("latent", latent())] {
        let plain = with(training(config, ROWS, STEPS), RING);
        let cases = [
            ("cp=2", None, false),
            ("cp=4", None, false),
            ("cp=2,tp=2", None, true),
        ];
        agree(name, &plain, &cases, 1e-5);
    }
}

#[test]
fn evaluation_and_checkpoints_do_not_depend_on_it() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut plain = training(llama(), ROWS, 6);
    plain.options.eval_every = Some(3);
    let validation = |training: &Training, mesh: &str| {
        let mesh = Mesh::parse(mesh).expect("a mesh");
        let run = training.run(&world(&mesh), &|_| (), &AtomicBool::new(false));
        run.unwrap_or_else(|e| panic!("on {mesh}: {e}")).outputs()[0]
            .val_loss
            .expect("a loss")
    };
    let single = validation(&plain, "single");
    let ring = validation(&with(plain.clone(), RING), "cp=4");
    assert!((ring - single).abs() <= 1e-5, "{ring} {single}");
    let want = losses(&plain, &world(&Mesh::single()));
    let mut part = with(plain, RING);
    part.options.checkpoint = Some(dir.path().into());
    part.options.steps = 3;
    let first = losses(&part, &world(&Mesh::parse("cp=2,tp=2").expect("a mesh")));
    assert_close(&first, &want[..3], 1e-5, "before");
    part = with(part, USP);
    part.options.resume = true;
    part.options.steps = 6;
    let mesh = Mesh::parse("cp=4").expect("a mesh");
    let reports = crate::tiny::reports(&part, &world(&mesh)).expect("a run that goes on");
    assert_close(&step_losses(&reports), &want[3..], 1e-5, "after");
    let ghost = World::ghost(&Mesh::parse("cp=64").expect("a mesh"));
    assert!(with(training(llama(), ROWS, 1), RING).trace(&ghost).is_ok());
}
