//! Rows that hold several documents: the losses and gradients of documents in rows of their own, on every mesh.

use super::gradients;
use super::splits::{Case, ROWS, STEPS, agree_on, split};
use crate::tiny::{
    CONTEXT, Cut, assert_close, batches, bits, gpt2, latent, llama, losses, training, transformer,
    world,
};
use supernode::mesh::Mesh;
use supernode::model::{Config, ContextMethod, Documents};
use supernode::pipeline::Schedule;
use supernode::spmd::{Chip, Threads};
use supernode::train::Training;
use supernode::train::data::IGNORED;

/// The text's words are documents, each with the blank behind it.
fn separator() -> u32 {
    let batches = batches(1, 7);
    batches.tokens().vocabulary().encode(" ").expect("a blank")[0]
}

pub(crate) fn packed(config: Config, rows: usize, steps: u64) -> Training {
    let plain = training(config, rows, steps);
    let batches = plain.batches.clone().with_separator(separator());
    Training {
        batches: batches.expect("a token of the text"),
        ..plain
    }
}

fn models() -> [(&'static str, Config); 3] {
    [("gpt2", gpt2()), ("llama", llama()), ("latent", latent())]
}

/// The first rows of a step: tokens, labels, and whether tokens end a document.
fn rows(count: usize) -> [Vec<u32>; 2] {
    let batches = batches(count, 7).with_separator(separator());
    let batches = batches.expect("a token of the text");
    let mut halves = [vec![0; count * CONTEXT], vec![0; count * CONTEXT]];
    let [tokens, labels] = &mut halves;
    batches.fill(0, 0..count, tokens, labels);
    halves
}

/// Losses of rows [n, t], of which each is one document, or several.
fn losses_of(config: &Config, rows: usize, halves: &[Vec<u32>; 2], several: bool) -> Vec<f32> {
    losses_on(&world(&Mesh::single()), config, rows, halves, several)
}

fn losses_on(
    world: &Threads,
    config: &Config,
    rows: usize,
    halves: &[Vec<u32>; 2],
    several: bool,
) -> Vec<f32> {
    let model = transformer(config.clone());
    let ends: Vec<bool> = halves[0].iter().map(|t| *t == separator()).collect();
    let documents = several.then(|| Documents::ending_at(CONTEXT, &ends));
    let model = model.with_documents(documents);
    let program = |chip: &Chip| {
        let shape = [rows, CONTEXT];
        let tokens = model.batch(chip, "tokens", shape, &halves[0]);
        let labels = model.batch(chip, "labels", shape, &halves[1]);
        let losses = model.losses(chip, &tokens, &labels).read();
        losses.expect("a real run").into_iter().collect()
    };
    let run = world.run(program).expect("a run");
    run.into_outputs().swap_remove(0)
}

#[test]
fn a_packed_rows_losses_are_those_of_its_documents_in_rows_of_their_own() {
    const PACKED: usize = 4;
    let packed = rows(PACKED);
    // A row for each document, filled up behind it.
    let (mut apart, mut places) = ([vec![], vec![]], vec![]);
    for row in 0..PACKED {
        let mut begin = row * CONTEXT;
        for at in row * CONTEXT..(row + 1) * CONTEXT {
            if packed[0][at] != separator() && at + 1 < (row + 1) * CONTEXT {
                continue;
            }
            let first = apart[0].len();
            for (whole, half) in apart.iter_mut().zip(&packed) {
                whole.extend(&half[begin..=at]);
            }
            places.extend((begin..=at).map(|i| (i, first + i - begin)));
            apart[0].resize(first + CONTEXT, 0);
            apart[1].resize(first + CONTEXT, IGNORED);
            begin = at + 1;
        }
    }
    let documents = apart[0].len() / CONTEXT;
    assert!(documents >= 2 * PACKED, "{documents} documents");
    assert_eq!(places.len(), PACKED * CONTEXT);
    for (name, config) in models() {
        let together = losses_of(&config, PACKED, &packed, true);
        let alone = losses_of(&config, documents, &apart, false);
        for (i, j) in &places {
            let (a, b) = (together[*i], alone[*j]);
            assert!((a - b).abs() <= 1e-5, "{name} token {i}: {a} and {b}");
            assert_eq!(a == 0.0, packed[0][*i] == separator(), "{name} token {i}");
        }
        let as_one = losses_of(&config, PACKED, &packed, false);
        let apart = places.iter().filter(|(i, _)| as_one[*i] != together[*i]);
        assert!(apart.count() > CONTEXT, "{name}: documents change losses");
    }
}

#[test]
fn no_document_sees_another() {
    no_document_sees_another_on(&world(&Mesh::single()));
}

fn no_document_sees_another_on(world: &Threads) {
    let before = rows(1);
    let first_end = before[0].iter().position(|t| *t == separator());
    let first_end = first_end.expect("several documents");
    let mut other = before.clone();
    other[0][..first_end].reverse();
    assert_ne!(other[0], before[0]);
    for (name, config) in models() {
        let of = |halves| losses_on(world, &config, 1, halves, true);
        let [a, b] = [&before, &other].map(of);
        assert_ne!(a[..first_end], b[..first_end], "{name}");
        let (a, b) = (&a[first_end + 1..], &b[first_end + 1..]);
        assert_eq!(a, b, "{name}: other documents do not change");
        assert!(a.iter().any(|x| *x > 0.0));
    }
}

/// On a chip of another kind the losses are the processor's, and no document sees another.
#[cfg(feature = "gpu")]
pub(crate) fn check_on(device: &supernode::spmd::Device) {
    let cpu = world(&Mesh::single());
    let other = crate::tiny::world_on(&Mesh::single(), device.clone());
    no_document_sees_another_on(&other);
    let packed = rows(4);
    for (name, config) in models() {
        let of = |world, several| losses_on(world, &config, 4, &packed, several);
        let want = of(&cpu, true);
        let got = of(&other, true);
        assert_eq!(got.len(), want.len());
        for (i, (a, b)) in got.iter().zip(&want).enumerate() {
            assert!((a - b).abs() <= 1e-5, "{name} token {i}: {a} and {b}");
        }
        let as_one = of(&other, false);
        let apart = as_one
            .iter()
            .zip(&want)
            .filter(|(a, b)| (*a - *b).abs() > 1e-4);
        assert!(apart.count() > CONTEXT, "{name}: documents change losses");
    }
}

const MESHES: [(Case, Option<ContextMethod>); 14] = [
    (("dp=2", None, false), None),
    (("dp=2", Some(2), false), None),
    (("fsdp=4", None, false), None),
    (("tp=2", None, false), None),
    (("tp=4", None, true), None),
    (("pp=2", None, false), None),
    (("cp=2", None, false), Some(ContextMethod::Ring)),
    (("cp=4", None, false), Some(ContextMethod::Ring)),
    (("cp=2", None, false), Some(ContextMethod::Ulysses)),
    (
        ("cp=4", None, false),
        Some(ContextMethod::Usp { exchange: Some(2) }),
    ),
    (("dp=2,cp=2", None, false), Some(ContextMethod::Ring)),
    (("tp=2,cp=2", None, true), Some(ContextMethod::Ulysses)),
    (("pp=2,tp=2", None, true), None),
    (("dp=2,fsdp=2,cp=2,tp=2", None, false), None),
];

fn cuts() -> impl Iterator<Item = Cut> {
    MESHES.into_iter().map(|(case, method)| -> Cut {
        Box::new(move |plain| {
            let mut training = split(plain, case);
            training.model = training.model.with_context_method(method);
            let mesh = Mesh::parse(case.0).expect("a mesh");
            (mesh, format!("{case:?} {method:?}"), training)
        })
    })
}

#[test]
fn losses_and_traces_are_those_of_one_chip_and_of_the_ghost() {
    for (name, config) in models() {
        agree_on(name, &packed(config, ROWS, STEPS), cuts(), 1e-5);
    }
}

#[test]
fn gathered_gradients_are_within_their_bound() {
    for (name, config) in [("gpt2", gpt2()), ("llama", llama())] {
        let batch = |rows, steps| packed(config.clone(), rows, steps);
        gradients::agree(name, &batch, cuts());
    }
}

#[test]
fn they_go_with_recomputation_dropout_micro_batches_and_collective_matmuls() {
    let config = Config {
        dropout: 0.2,
        ..llama()
    };
    let mut plain = packed(config, ROWS, STEPS);
    plain.model = plain.model.with_recompute(true);
    // Draws of dropout belong to a pass, of which stages have several.
    agree_on("recomputed, with dropout", &plain, cuts().take(5), 1e-5);
    let mut plain = packed(gpt2(), ROWS, STEPS);
    let single = losses(&plain, &world(&Mesh::single()));
    plain.options.micro_batch = Some(2);
    let parts = losses(&plain, &world(&Mesh::single()));
    assert_close(&parts, &single, 1e-5, "in micro-batches");
    plain.options.micro_batch = None;
    plain.options.schedule = Schedule::ZbV;
    let cut = || -> Cut {
        Box::new(|plain| {
            let mut training = split(plain, ("pp=2,tp=2", None, true));
            training.model = training.model.with_collective_matmul(true);
            let mesh = Mesh::parse("pp=2,tp=2").expect("a mesh");
            (mesh, "zb-v, collective matmul".into(), training)
        })
    };
    agree_on("gpt2", &plain, [cut()].into_iter(), 1e-5);
}

#[test]
fn the_validation_loss_counts_the_labels_that_there_are() {
    let mut plain = packed(llama(), ROWS, 2);
    plain.options.eval_every = Some(2);
    let validation = |mesh: &str| {
        let world = world(&Mesh::parse(mesh).expect("a mesh"));
        let reports = crate::tiny::reports(&plain, &world).expect("a run");
        let loss = reports.iter().find_map(|r| match r {
            supernode::train::Report::Validation { loss, .. } => Some(*loss),
            _ => None,
        });
        loss.expect("an evaluation")
    };
    let single = validation("single");
    // Two steps have learnt little: nearly as likely each. Over all tokens, labels or not, it would be a fifth less.
    assert!((single - (29f64).ln()).abs() < 0.4, "{single}");
    for mesh in ["dp=2", "cp=2,tp=2"] {
        let got = validation(mesh);
        assert!((got - single).abs() <= 1e-5, "{mesh}: {got} and {single}");
    }
}

#[test]
fn a_run_repeats_and_differs_from_one_without_documents() {
    let training = packed(llama(), ROWS, 4);
    let mesh = Mesh::parse("cp=2,tp=2").expect("a mesh");
    let first = losses(&training, &world(&mesh).with_threads(1));
    let again = losses(&training, &world(&mesh).with_threads(2));
    assert_eq!(bits(&first), bits(&again));
    let plain = crate::tiny::training(llama(), ROWS, 4);
    assert_ne!(bits(&first), bits(&losses(&plain, &world(&mesh))));
}
