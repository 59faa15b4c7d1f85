//! Ring attention that is asked for wrongly, or that a rank leaves.

use super::ring::{Case, case, causal};
use crate::watchdog::watched;
use std::time::{Duration, Instant};
use supernode::mesh::Mesh;
use supernode::ops::Attention;
use supernode::placement::Placement::Shard;
use supernode::placement::TokenOrder;
use supernode::spmd::{Chip, Device, Ring, World};

#[test]
fn what_does_not_fit_is_said() {
    let cases: [(Case, &[&str]); 4] = [
        (
            Case {
                exchange: 3,
                ..case("cp=4", 1)
            },
            &["3 chips", "4 chips", "cp"],
        ),
        (
            Case {
                g: 1,
                zigzag: false,
                ..case("cp=4", 2)
            },
            &["2 chips", "1 heads of a chip"],
        ),
        (
            Case {
                op: Attention {
                    window: Some(2),
                    ..Default::default()
                },
                ..case("cp=2", 1)
            },
            &["two-sided window"],
        ),
        (
            Case {
                op: Attention {
                    offset: 4,
                    ..causal()
                },
                ..case("cp=2", 1)
            },
            &["offset"],
        ),
    ];
    for (case, parts) in cases {
        let mesh = Mesh::parse(case.mesh).expect("a mesh");
        let order = TokenOrder::Ascending;
        let program = |chip: &Chip| {
            let placed = chip.placed(&[("cp", Shard(1))]);
            let [q, k] = [case.h, case.g]
                .map(|h| chip.input("x", case.shape(h), &placed, &case.numbers("x", h)));
            let ring = Ring {
                axis: "cp",
                exchange: case.exchange,
                order,
            };
            drop(chip.ring_attention(&case.op, &[&q, &k, &k], &ring));
        };
        let error = World::ghost(&mesh)
            .trace(program)
            .expect_err("refused")
            .to_string();
        for part in parts {
            assert!(error.contains(part), "'{part}' is missing in: {error}");
        }
    }
}

/// What rank 2 of four does wrong.
#[derive(Clone, Copy, Debug)]
enum Fault {
    LeavesBefore,
    Panics,
    LeavesBackward,
    BringsOtherHeads,
}

#[test]
fn a_rank_that_leaves_the_ring_is_named_within_a_second() {
    for fault in [
        Fault::LeavesBefore,
        Fault::Panics,
        Fault::LeavesBackward,
        Fault::BringsOtherHeads,
    ] {
        let (error, took) = watched(move || {
            let mesh = Mesh::new([("cp", 4)]);
            let world = World::threads(&mesh, Device::cpu())
                .expect("a small mesh")
                .with_threads(1);
            let began = Instant::now();
            let run = world.run(|chip| faulty(chip, fault));
            (
                run.expect_err("the program is wrong").to_string(),
                began.elapsed(),
            )
        });
        let mut parts = vec!["rank 2 (cp=2)"];
        parts.push(match fault {
            Fault::Panics => "seeded fault",
            _ => "shift over cp",
        });
        for part in parts {
            assert!(error.contains(part), "{fault:?}: no '{part}' in: {error}");
        }
        assert!(
            took <= Duration::from_secs(1),
            "{fault:?} took {took:?}: {error}"
        );
    }
}

fn faulty(chip: &Chip, fault: Fault) {
    let mine = chip.coordinate("cp") == 2;
    let case = case("cp=4", 1);
    let heads = if mine && matches!(fault, Fault::BringsOtherHeads) {
        4
    } else {
        2
    };
    let placed = chip.placed(&[("cp", Shard(1))]);
    let input = |name: &str, h: usize| {
        chip.input(name, case.shape(h), &placed, &case.numbers(name, h))
            .variable()
    };
    let (q, k) = (input("q", 4), input("k", heads));
    let ring = Ring {
        axis: "cp",
        exchange: 1,
        order: case.order(),
    };
    match fault {
        Fault::LeavesBefore if mine => return,
        Fault::Panics if mine => panic!("seeded fault"),
        _ => {}
    }
    let loss = chip.record(|| chip.ring_attention(&causal(), &[&q, &k, &k], &ring).sum());
    if mine && matches!(fault, Fault::LeavesBackward) {
        return;
    }
    loss.backward();
}
