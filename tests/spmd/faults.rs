//! Fifty seeded faults: one rank panics, returns early, swaps two collectives or brings another shape, somewhere in a
//! program of eight collectives over two axes. Each ends within a second, in one error that names the rank and the op.

use crate::watchdog::watched;
use std::time::{Duration, Instant};
use supernode::mesh::Mesh;
use supernode::placement::Placement::{Partial, Replicate, Shard};
use supernode::random::Stream;
use supernode::spmd::{Chip, Device, FromIndex, World};

const CALLS: usize = 8;
const FAULTS: u64 = 50;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    Panics,
    ReturnsEarly,
    Swaps,
    BringsAnotherShape,
}

/// What goes wrong, on which rank, at which call.
#[derive(Clone, Copy, Debug)]
struct Case {
    fault: Fault,
    rank: usize,
    at: usize,
}

fn case(seed: u64) -> Case {
    use Fault::{BringsAnotherShape, Panics, ReturnsEarly, Swaps};
    let numbers = Stream::new(seed, "fault");
    let draw = |i: u64, n: usize| ((numbers.normal(i).abs() * 1e4) as usize) % n;
    let fault = [Panics, ReturnsEarly, Swaps, BringsAnotherShape][(seed % 4) as usize];
    let at = draw(1, CALLS - 1);
    Case {
        fault,
        rank: draw(0, 4),
        // Two calls over one axis: over two axes either order may end well, since their groups do not wait for each other.
        at: if fault == Swaps { at / 2 * 2 } else { at },
    }
}

/// Call `number` of the program: an all-reduce or a reduce-scatter over tp or dp, of a shape of its own.
fn call(chip: &Chip, number: usize, extra: usize) {
    let axis = ["tp", "dp"][number / 2 % 2];
    let to = [Replicate, Shard(0)][number % 2];
    let shape = [4, 4 + number + extra];
    let values = FromIndex(|i| i as f32);
    chip.scope(&format!("layer{number}"), || {
        let x = chip.input("x", shape, chip.placed(&[(axis, Partial)]), &values);
        drop(x.redistribute(chip.placed(&[(axis, to)])));
    });
}

fn program(chip: &Chip, case: Case) {
    let mine = 2 * chip.coordinate("dp") + chip.coordinate("tp") == case.rank;
    let mut order: Vec<usize> = (0..CALLS).collect();
    if mine && case.fault == Fault::Swaps {
        order.swap(case.at, case.at + 1);
    }
    for (i, number) in order.into_iter().enumerate() {
        let here = mine && i == case.at;
        match case.fault {
            Fault::Panics if here => panic!("seeded fault"),
            Fault::ReturnsEarly if here => return,
            Fault::BringsAnotherShape if here => call(chip, number, 100),
            _ => call(chip, number, 0),
        }
    }
}

#[test]
fn fifty_seeded_faults_end_at_once_and_name_the_rank_and_the_op() {
    let mesh = Mesh::new([("dp", 2), ("tp", 2)]);
    for seed in 0..FAULTS {
        let (case, mesh) = (case(seed), mesh.clone());
        let (error, took) = watched(move || {
            let world = World::threads(&mesh, Device::cpu()).expect("a small mesh");
            let world = world.with_threads(1);
            let began = Instant::now();
            let error = world.run(|chip| program(chip, case));
            (error.expect_err("the program is wrong"), began.elapsed())
        });
        let text = error.to_string();
        let (dp, tp) = (case.rank / 2, case.rank % 2);
        let mut parts = vec![format!("rank {} (dp={dp},tp={tp})", case.rank)];
        match case.fault {
            Fault::Panics => parts.push("seeded fault".into()),
            _ => parts.push("faults.rs:".into()),
        }
        for part in parts {
            assert!(
                text.contains(&part),
                "seed {seed}, {case:?}: no '{part}' in: {text}"
            );
        }
        let op = ["all-reduce", "reduce-scatter", "redistribute"]
            .iter()
            .any(|op| text.contains(op));
        // Who panics at the first call has not been in any op.
        assert!(
            op || (case.fault, case.at) == (Fault::Panics, 0),
            "{case:?}: {text}"
        );
        assert!(
            took <= Duration::from_secs(1),
            "{case:?} took {took:?} to say: {text}"
        );
    }
}

#[test]
fn without_a_fault_the_program_ends_well() {
    let mesh = Mesh::new([("dp", 2), ("tp", 2)]);
    let nobody = Case {
        fault: Fault::Panics,
        rank: 4,
        at: 0,
    };
    let world = World::threads(&mesh, Device::cpu()).expect("a small mesh");
    let run = world.with_threads(1).run(|chip| program(chip, nobody));
    let run = run.expect("a program that runs");
    let calls: u64 = run
        .trace()
        .chip(0)
        .collectives
        .iter()
        .map(|c| c.calls)
        .sum();
    assert_eq!(calls, CALLS as u64);
}
