//! Gradients in buckets: the bits and bytes of those that are summed each by itself, in fewer calls, which start while the
//! backward goes on.

use super::meshes::everything;
use super::overlap::flops_beside;
use super::splits::{ROWS, STEPS, agree_on, split};
use crate::tiny::{Cut, gpt2, llama, mesh_of, training};
use supernode::World;
use supernode::model::Config;
use supernode::spmd::{BUCKET_BYTES, Zero};
use supernode::trace::{EventKind, Stream, Trace};
use supernode::train::{Options, Training};

/// Each by itself, two or three together, a block's, everything.
const SIZES: [u64; 4] = [0, 3_000, 40_000, BUCKET_BYTES];

fn models() -> [(&'static str, Config); 2] {
    [("gpt2", gpt2()), ("llama", llama())]
}

fn in_buckets(plain: &Training, bytes: u64) -> Training {
    let mut training = plain.clone();
    training.options.bucket_bytes = bytes;
    training
}

fn traced(training: &Training, mesh: &str) -> Trace {
    let ghost = World::ghost(&mesh_of(mesh));
    training.trace(&ghost).unwrap_or_else(|e| panic!("{e}"))
}

fn zero_1(plain: &Training) -> Training {
    let options = Options {
        zero: Some(Zero::State),
        ..plain.options.clone()
    };
    Training {
        options,
        ..plain.clone()
    }
}

/// Calls of all-reduces over dp, or of reduce-scatters, their bytes, and how many of the bytes go beside computation.
fn summed(trace: &Trace, op: &str) -> (u64, u64, u64) {
    let mut all = trace.collectives().iter();
    let found = all.find(|c| &*c.op == op && c.axis == "dp");
    let c = found.expect("gradients are summed");
    (c.calls, c.bytes, c.overlapped_bytes)
}

#[test]
fn bits_do_not_depend_on_buckets() {
    for (mesh, sequence) in [
        ("dp=2", false),
        ("dp=3", false),
        ("dp=4", false),
        ("dp=2,tp=2", true),
        ("dp=2,cp=2", false),
        ("dp=2,fsdp=2", false),
        ("pp=2,dp=2", false),
    ] {
        for (name, config) in models() {
            let plain = split(&training(config, 12, 3), ("", None, sequence));
            for (plain, what) in [(plain.clone(), ""), (zero_1(&plain), "ZeRO-1")] {
                let of = |bytes| everything(&in_buckets(&plain, bytes), &mesh_of(mesh), 1);
                let alone = of(0);
                for bytes in &SIZES[1..] {
                    let (got, what) = (of(*bytes), format!("{name} {what} on {mesh}, {bytes}"));
                    assert_eq!(got.0, alone.0, "losses of {what}");
                    assert!(got.1 == alone.1, "parameters of {what}");
                }
            }
        }
    }
}

#[test]
fn bytes_are_the_same_in_fewer_calls() {
    for mesh in ["dp=2", "dp=4", "dp=2,tp=2", "dp=2,cp=1"] {
        for (name, config) in models() {
            let plain = training(config, ROWS, 1);
            for (plain, op) in [
                (plain.clone(), "all-reduce"),
                (zero_1(&plain), "reduce-scatter"),
            ] {
                let of = |bytes| summed(&traced(&in_buckets(&plain, bytes), mesh), op);
                let alone = of(0);
                let mut before = alone;
                for bytes in &SIZES[1..] {
                    let got = of(*bytes);
                    let what = format!("{op} of {name} on {mesh} in buckets of {bytes}");
                    assert_eq!((got.1, got.2), (before.1, before.2), "{what}");
                    assert!(
                        got.0 < alone.0 && got.0 <= before.0,
                        "{what}: {got:?} after {before:?} and {alone:?}"
                    );
                    before = got;
                }
            }
        }
    }
}

#[test]
fn a_bucket_is_as_full_as_it_was_asked_to_be() {
    let plain = training(llama(), ROWS, 1);
    for bytes in [10_000, 40_000] {
        let trace = traced(&in_buckets(&plain, bytes), "dp=2");
        let step = trace.chip(0).events();
        let sizes: Vec<u64> = step
            .filter(|e| e.stream == Stream::Communication && e.kind == EventKind::Collective)
            .map(|e| e.inputs[0].ty.bytes())
            .collect();
        let (last, full) = sizes.split_last().expect("there are buckets");
        assert!(full.iter().all(|size| *size >= bytes), "{sizes:?}");
        // What fills a bucket up is smaller than a bucket, and what is not goes by itself.
        let shared = full.iter().filter(|size| **size < 2 * bytes).count();
        assert!(shared > 1 && *last < 2 * bytes, "{sizes:?}");
    }
}

#[test]
fn full_buckets_travel_while_the_backward_goes_on() {
    let config = Config {
        layers: 4,
        ..llama()
    };
    let trace = traced(&in_buckets(&training(config, ROWS, 1), 40_000), "dp=2");
    let beside = flops_beside(trace.chip(0));
    let busy = beside.values().filter(|flops| **flops > 0).count();
    assert!(2 * busy > beside.len(), "{beside:?}");
}

#[test]
fn losses_and_traces_are_those_of_one_chip_and_of_the_ghost() {
    let cuts = |bytes: u64| {
        let meshes = ["dp=2", "dp=4", "dp=2,tp=2", "pp=2,dp=2", "dp=2,fsdp=2"];
        meshes.into_iter().map(move |mesh| -> Cut {
            let what = format!("{mesh} in buckets of {bytes}");
            Box::new(move |plain| (mesh_of(mesh), what.clone(), in_buckets(plain, bytes)))
        })
    };
    for (name, config) in models() {
        for bytes in [3_000, 40_000] {
            let plain = training(config.clone(), ROWS, STEPS);
            agree_on(name, &plain, cuts(bytes), 1e-5);
            let scattered = move |mesh: &'static str| -> Cut {
                let what = format!("{mesh} with ZeRO-1 in buckets of {bytes}");
                Box::new(move |plain| {
                    let split = in_buckets(&zero_1(plain), bytes);
                    (mesh_of(mesh), what.clone(), split)
                })
            };
            let meshes = ["dp=2", "dp=4", "dp=2,tp=2"].into_iter().map(scattered);
            agree_on(name, &plain, meshes, 1e-5);
        }
        let mut plain = training(config, ROWS, STEPS);
        plain.options.micro_batch = Some(1);
        agree_on(name, &plain, cuts(40_000).take(2), 1e-5);
    }
}

#[test]
fn what_is_scattered_as_it_appears_is_not_in_buckets() {
    let mut plain = training(gpt2(), ROWS, 1);
    plain.options.zero = Some(Zero::Gradients);
    let of = |bytes| traced(&in_buckets(&plain, bytes), "dp=2");
    assert_eq!(of(0).difference(&of(BUCKET_BYTES)), None);
}
