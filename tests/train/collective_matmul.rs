//! Products beside the transfers of sequence parallelism: the single chip's losses and gradients, the bytes of the run without,
//! all of them beside a product.

use super::gradients;
use super::overlap::flops_beside;
use super::splits::{ROWS, STEPS, agree_on, split};
use crate::tiny::{CONTEXT, Cut, bits, gpt2, llama, losses, mesh_of, training, world};
use std::collections::BTreeSet;
use std::sync::atomic::AtomicBool;
use supernode::World;
use supernode::model::Config;
use supernode::pipeline::Schedule;
use supernode::trace::Trace;
use supernode::train::Training;

const MESHES: [&str; 9] = [
    "tp=2",
    "tp=4",
    "dp=2,tp=2",
    "tp=2,dp=2",
    "pp=2,tp=2",
    "fsdp=2,tp=2",
    "tp=2,fsdp=2",
    "dp=2,fsdp=2,tp=2",
    "pp=2,dp=2,tp=2",
];

fn models() -> [(&'static str, Config); 2] {
    [("gpt2", gpt2()), ("llama", llama())]
}

/// Sequence parallelism with products beside its transfers.
pub(crate) fn beside(plain: &Training) -> Training {
    let mut training = split(plain, ("", None, true));
    training.model = training.model.with_collective_matmul(true);
    training
}

fn on(meshes: impl Iterator<Item = &'static str>) -> impl Iterator<Item = Cut> {
    meshes.map(|mesh| -> Cut { Box::new(move |plain| (mesh_of(mesh), mesh.into(), beside(plain))) })
}

fn cuts() -> impl Iterator<Item = Cut> {
    on(MESHES.into_iter())
}

/// Where a chip runs all layers at once.
fn one_pass() -> impl Iterator<Item = Cut> {
    on(MESHES.into_iter().filter(|mesh| !mesh.contains("pp=")))
}

#[test]
fn losses_and_traces_are_those_of_one_chip_and_of_the_ghost() {
    for (name, config) in models() {
        agree_on(name, &training(config, ROWS, STEPS), cuts(), 1e-5);
    }
}

#[test]
fn gathered_gradients_are_within_their_bound() {
    for (name, config) in models() {
        let batch = |rows, steps| training(config.clone(), rows, steps);
        gradients::agree(name, &batch, cuts());
    }
}

#[test]
fn it_goes_with_recomputation_dropout_micro_batches_and_zero_bubbles() {
    let mut plain = training(llama(), ROWS, STEPS);
    plain.options.micro_batch = Some(2);
    agree_on("in micro-batches", &plain, one_pass(), 1e-5);
    let mut plain = training(
        Config {
            dropout: 0.2,
            ..llama()
        },
        ROWS,
        STEPS,
    );
    plain.model = plain.model.with_recompute(true);
    // Draws of dropout belong to a pass, of which stages have several.
    agree_on("recomputed, with dropout", &plain, one_pass(), 1e-5);
    for schedule in [Schedule::ZbH1, Schedule::ZbV] {
        let mut plain = training(llama(), ROWS, STEPS);
        plain.options.schedule = schedule;
        let meshes = ["pp=2,tp=2", "pp=2,fsdp=2,tp=2"].into_iter();
        agree_on(&schedule.to_string(), &plain, on(meshes), 1e-5);
    }
}

#[test]
fn two_runs_are_equal_bit_for_bit() {
    let training = beside(&training(gpt2(), ROWS, 4));
    for mesh in ["tp=2", "tp=4", "fsdp=2,tp=2"] {
        let first = losses(&training, &world(&mesh_of(mesh)).with_threads(1));
        let again = losses(&training, &world(&mesh_of(mesh)).with_threads(2));
        assert_eq!(bits(&first), bits(&again), "{mesh}");
    }
}

fn traced(training: &Training, mesh: &str) -> Trace {
    let ghost = World::ghost(&mesh_of(mesh));
    training.trace(&ghost).unwrap_or_else(|e| panic!("{e}"))
}

/// Bytes sent over an axis, and how many of them beside computation.
fn sent(trace: &Trace, axis: &str) -> (u64, u64) {
    let over = trace.collectives().iter().filter(|c| c.axis == axis);
    over.fold((0, 0), |sum, c| {
        (sum.0 + c.bytes, sum.1 + c.overlapped_bytes)
    })
}

/// Floating-point operations of products.
fn products(trace: &Trace) -> u128 {
    let mut ops = trace.chip(0).ops.iter();
    ops.find(|o| &*o.op == "matmul").expect("products").flops
}

#[test]
fn bytes_are_those_without_and_a_blocks_are_all_beside() {
    for (name, config) in models() {
        let (layers, width) = (config.layers, config.hidden);
        let plain = training(config, ROWS, 1);
        for mesh in ["tp=2", "tp=4", "dp=2,tp=2", "fsdp=2,tp=2"] {
            let what = format!("{name} on {mesh}");
            let without = traced(&split(&plain, ("", None, true)), mesh);
            let with = traced(&beside(&plain), mesh);
            let (p, parts) = (mesh_of(mesh).size_of("tp"), mesh_of(mesh).chips());
            let rows = ROWS * p / parts;
            // Beside either: gradients of what tp does not split, summed over its tokens.
            let (all, early) = sent(&without, "tp");
            // Two gathers and two scatters a layer, as many backward, in f32: (P - 1) / P of b t c each.
            let stream = 4 * rows * CONTEXT * width;
            let each = (8 * layers * stream * (p - 1) / p) as u64;
            assert_eq!(sent(&with, "tp"), (all, early + each), "{what}");
            for axis in ["dp", "fsdp"] {
                assert_eq!(sent(&with, axis), sent(&without, axis), "{what}");
            }
            assert_eq!(products(&with), products(&without), "{what}");
        }
    }
}

#[test]
fn a_product_runs_beside_every_chunk() {
    for (name, config) in models() {
        for mesh in ["tp=2", "tp=4"] {
            let trace = traced(&beside(&training(config.clone(), ROWS, 1)), mesh);
            let chip = trace.chip(0);
            let moves = chip.events().filter(|e| &*e.op == "shift");
            let moves: BTreeSet<u64> = moves.filter_map(|e| e.ticket).collect();
            let mut beside = flops_beside(chip);
            beside.retain(|ticket, _| moves.contains(ticket));
            let chunks = 8 * config.layers * (mesh_of(mesh).size_of("tp") - 1);
            assert_eq!(beside.len(), chunks, "{name} on {mesh}");
            let least = 2 * ROWS * CONTEXT * config.hidden * config.hidden;
            let least = (least / mesh_of(mesh).chips().pow(2)) as u64;
            for (ticket, flops) in beside {
                assert!(flops >= least, "{name} on {mesh}: {ticket} has {flops}");
            }
        }
    }
}

#[test]
fn a_real_runs_table_shows_it() {
    let training = beside(&training(llama(), ROWS, 1));
    let run = training.run(&world(&mesh_of("tp=2")), &|_| (), &AtomicBool::new(false));
    let table = run.expect("a run").trace().summary();
    let row = table.lines().find(|l| l.starts_with("shift"));
    let row = row.unwrap_or_else(|| panic!("no chunk moves in\n{table}"));
    assert!(row.contains(" tp ") && row.ends_with("100 %"), "{row}");
}

#[test]
fn what_stands_in_the_way_is_said() {
    let refused = |training: &Training, mesh: &str| {
        let refused = training.check(&mesh_of(mesh));
        refused.expect_err("refused").to_string()
    };
    let plain = training(llama(), ROWS, 1);
    let mut alone = plain.clone();
    alone.model = alone.model.with_collective_matmul(true);
    let mut of_three = beside(&training(crate::tiny::models_of_three()[2].1.clone(), 6, 1));
    of_three.options.steps = 1;
    let cases: [(&Training, &str, &str); 3] = [
        (&alone, "tp=2", "give --sequence-parallel too"),
        (
            &beside(&plain),
            "cp=2,tp=2",
            "mesh axis cp=2 cuts them too; leave one of the two out",
        ),
        (
            &of_three,
            "tp=3",
            "mesh axis tp=3 does not divide the 16 tokens of a sequence, as a collective matmul has to; tp=2 does",
        ),
    ];
    for (training, mesh, part) in cases {
        let message = refused(training, mesh);
        assert!(message.contains(part), "'{part}' is missing in: {message}");
        assert!(!message.contains("  "), "blanks in: {message}");
    }
}
