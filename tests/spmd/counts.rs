//! What programs send, counted: no collective more than placements ask for, and a sentence where they fit no op.

use crate::watchdog::watched;
use supernode::mesh::Mesh;
use supernode::ops;
use supernode::placement::Placement::{self, Partial, Replicate, Shard};
use supernode::placement::Placements;
use supernode::spmd::{Chip, Device, FromIndex, Init, Sharded, World};
use supernode::trace::{EventKind, Trace};

/// The collectives of the program's events, in order: `all-gather x`.
fn collectives(trace: &Trace) -> Vec<String> {
    let events = trace
        .chip(0)
        .events()
        .filter(|e| e.kind == EventKind::Collective);
    events
        .map(|e| {
            format!(
                "{} {}",
                e.op,
                e.traffic
                    .as_ref()
                    .expect("a collective moves something")
                    .axis
            )
        })
        .collect()
}

fn traced(mesh: &Mesh, program: impl Fn(&Chip) + Sync) -> Vec<String> {
    let run = World::threads(mesh, Device::cpu())
        .unwrap()
        .with_threads(1)
        .run(&program)
        .expect("a program that runs");
    let ghost = World::ghost(mesh)
        .trace(&program)
        .expect("a program that runs");
    assert_eq!(run.trace().difference(&ghost), None);
    collectives(run.trace())
}

fn ones(chip: &Chip, name: &str, shape: &[usize], placements: impl Into<Placements>) -> Sharded {
    chip.input(
        name,
        shape,
        placements,
        &FromIndex(|i| (i % 3) as f32 - 1.0),
    )
}

#[test]
fn each_transition_is_one_collective_and_a_slice_is_none() {
    let mesh = Mesh::new([("x", 2)]);
    let cases: [(Placement, Placement, &[&str]); 7] = [
        (Partial, Replicate, &["all-reduce x"]),
        (Partial, Shard(1), &["reduce-scatter x"]),
        (Shard(0), Replicate, &["all-gather x"]),
        (Shard(0), Shard(1), &["all-to-all x"]),
        (Replicate, Shard(1), &[]),
        (Replicate, Replicate, &[]),
        (Shard(1), Shard(1), &[]),
    ];
    for (from, to, want) in cases {
        let moved = traced(&mesh, |chip| {
            drop(ones(chip, "x", &[4, 6], [from]).redistribute([to]))
        });
        assert_eq!(moved, want, "{from} to {to}");
    }
    let gathered = traced(&mesh, |chip| {
        drop(ones(chip, "x", &[4, 6], [Shard(0)]).gather())
    });
    assert_eq!(gathered, ["all-gather x"], "gather sends one all-gather");
}

#[test]
fn an_op_on_placements_that_need_no_traffic_sends_nothing() {
    let mesh = Mesh::new([("dp", 2), ("tp", 2)]);
    let moved = traced(&mesh, |chip| {
        let x = ones(chip, "x", &[4, 6], [Shard(0), Replicate]);
        let w = chip.parameter("w", [6, 8], [Replicate, Shard(1)], Init::normal(0.02));
        let bias = chip.parameter("b", [8], [Replicate, Shard(0)], Init::zeros());
        let v = chip.parameter("v", [8, 6], [Replicate, Shard(0)], Init::normal(0.02));
        let loss = chip.record(|| {
            let h = x.linear(&w, Some(&bias), Some(ops::Activation::GeluTanh));
            assert_eq!(**h.placements(), [Shard(0), Shard(1)]);
            let y = h.matmul(&v);
            assert_eq!(**y.placements(), [Shard(0), Partial]);
            y.sum()
        });
        assert_eq!(**loss.placements(), [Partial, Partial]);
        loss.backward();
    });
    assert_eq!(moved, [""; 0]);
}

#[test]
fn a_column_and_a_row_matmul_cost_one_all_reduce_each_way() {
    let mesh = Mesh::new([("tp", 2)]);
    let moved = traced(&mesh, |chip| {
        let x = ones(chip, "x", &[4, 6], [Replicate]).variable();
        let w1 = chip.parameter("w1", [6, 8], [Shard(1)], Init::normal(0.02));
        let w2 = chip.parameter("w2", [8, 6], [Shard(0)], Init::normal(0.02));
        let weight = ones(chip, "c", &[4, 6], [Replicate]);
        let loss = chip.record(|| x.matmul(&w1).matmul(&w2).gather().multiply(&weight).sum());
        loss.backward();
        chip.take_gradient(&x).expect("a gradient");
        assert_eq!(chip.take_gradients().len(), 2);
    });
    assert_eq!(
        moved,
        ["all-reduce tp", "all-reduce tp"],
        "one forward, one backward"
    );
}

#[test]
fn queries_keys_and_values_cost_one_reduction() {
    let mesh = Mesh::new([("tp", 2)]);
    let moved = traced(&mesh, |chip| {
        let x = ones(chip, "x", &[4, 6], [Replicate]).variable();
        let loss = chip.record(|| {
            let x = x.scale(2.0);
            let project = |name: &str| {
                x.matmul(&chip.parameter(name, [6, 8], [Shard(1)], Init::normal(0.02)))
            };
            project("q").add(&project("k")).add(&project("v")).sum()
        });
        loss.backward();
        chip.take_gradient(&x).expect("a gradient");
    });
    assert_eq!(moved, ["all-reduce tp"]);
}

#[test]
fn a_parameter_that_is_used_twice_is_reduced_once() {
    let mesh = Mesh::new([("dp", 2)]);
    let moved = traced(&mesh, |chip| {
        let x = ones(chip, "x", &[4, 6], [Shard(0)]);
        for _ in 0..3 {
            let w = chip.parameter("w", [6, 6], [Replicate], Init::normal(0.02));
            let loss = chip.record(|| x.matmul(&w).matmul(&w).sum());
            loss.backward();
        }
        assert_eq!(chip.take_gradients().len(), 1);
    });
    assert_eq!(
        moved,
        ["all-reduce dp"],
        "three micro-batches, two uses, one reduction"
    );
}

/// The message with which a program is refused, on threads and as a ghost.
fn refused(mesh: &'static str, program: impl Fn(&Chip) + Send + Sync + Copy + 'static) -> String {
    let mesh = Mesh::parse(mesh).expect("a mesh");
    let ghost = World::ghost(&mesh)
        .trace(program)
        .expect_err("a mistake is found without contents");
    let error = watched(move || {
        let world = World::threads(&mesh, Device::cpu())
            .unwrap()
            .with_threads(1);
        world.run(program).expect_err("a mistake is found")
    });
    assert_eq!(
        (error.kind(), ghost.kind()),
        (supernode::ErrorKind::Chip, supernode::ErrorKind::Chip)
    );
    let (error, ghost) = (error.to_string(), ghost.to_string());
    let told = |text: &str| {
        text.split_once("the program panicked: ")
            .expect("a panic's text")
            .1
            .to_string()
    };
    assert_eq!(told(&error), told(&ghost));
    assert!(error.contains("rank ") && error.contains("tp="), "{error}");
    told(&error)
}

fn assert_says(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "'{part}' is missing in: {message}");
    }
}

#[test]
fn forbidden_combinations_say_which_placement_would_do() {
    let matmul = refused("dp=2,tp=2", |chip| {
        ones(chip, "x", &[4, 6], [Replicate, Shard(1)]).matmul(&ones(
            chip,
            "w",
            &[6, 8],
            chip.replicated(),
        ));
    });
    assert_says(
        &matmul,
        &[
            "matmul:",
            "mesh axis 'tp'",
            "Shard(1), Replicate",
            "operand 1 would have to be Shard(0)",
            "counts.rs:",
        ],
    );
    let partial = refused("tp=2", |chip| {
        ones(chip, "x", &[4, 6], [Partial]).activate(ops::Activation::GeluErf);
    });
    assert_says(
        &partial,
        &[
            "gelu",
            "mesh axis 'tp'",
            "placed Partial",
            "Replicate by an all-reduce",
            "reduce-scatter",
        ],
    );
    let mixed = refused("tp=2", |chip| {
        ones(chip, "x", &[4, 6], [Partial]).add(&ones(chip, "y", &[4, 6], [Replicate]));
    });
    assert_says(
        &mixed,
        &[
            "add:",
            "mesh axis 'tp'",
            "Partial, Replicate",
            "redistribute",
        ],
    );
    let whole = refused("tp=2", |chip| {
        let w = chip.parameter("w", [6], [Replicate], Init::ones());
        chip.apply(
            ops::RmsNorm {
                eps: 1e-5,
                weight: true,
            },
            &[&ones(chip, "x", &[4, 6], [Shard(1)]), &w],
        );
    });
    assert_says(
        &whole,
        &[
            "rms_norm:",
            "mesh axis 'tp'",
            "Shard(1), Replicate",
            "whole",
            "redistribute it to Replicate",
        ],
    );
    let bias = refused("tp=2", |chip| {
        let bias = ones(chip, "b", &[8], [Replicate]);
        ones(chip, "x", &[4, 6], [Shard(1)]).linear(
            &ones(chip, "w", &[6, 8], [Shard(0)]),
            Some(&bias),
            None,
        );
    });
    assert_says(
        &bias,
        &[
            "matmul:",
            "mesh axis 'tp'",
            "Shard(1), Shard(0), Replicate",
            "'K'",
        ],
    );
    let back = refused("tp=2", |chip| {
        ones(chip, "x", &[4, 6], [Replicate]).redistribute([Partial]);
    });
    assert_says(
        &back,
        &[
            "redistribute",
            "axis 'tp'",
            "Replicate cannot become Partial",
            "would do",
            "counts.rs:",
        ],
    );
}

#[test]
fn wrong_shapes_and_names_panic_with_both_sides() {
    let shapes = refused("tp=2", |chip| {
        ones(chip, "x", &[4, 6], [Replicate]).matmul(&ones(chip, "w", &[5, 8], [Replicate]));
    });
    assert_says(&shapes, &["matmul", "f32[4, 6]", "f32[5, 8]", "the same k"]);
    let count = refused("tp=2", |chip| {
        drop(ones(chip, "x", &[4, 6], [Replicate, Shard(0)]))
    });
    assert_says(&count, &["2 placements", "1 axes"]);
    let dim = refused("tp=2", |chip| drop(ones(chip, "x", &[4, 6], [Shard(2)])));
    assert_says(&dim, &["dimension 2", "'tp'", "[4, 6]"]);
    let name = refused("tp=2", |chip| {
        chip.send(&ones(chip, "x", &[4], [Replicate]), "pp", 1)
    });
    assert_says(&name, &["pp", "tp"]);
    let indices = refused("tp=2", |chip| {
        chip.input("x", [4], [Partial], &vec![1u32; 4]).gather();
    });
    assert_says(&indices, &["all-reduce", "u32", "indices cannot be added"]);
    let parameter = refused("tp=2", |chip| {
        chip.parameter("w", [4, 4], [Replicate], Init::zeros());
        chip.parameter("w", [4, 5], [Replicate], Init::zeros());
    });
    assert_says(&parameter, &["'w'", "[4, 4]", "[4, 5]", "counts.rs:"]);
}
