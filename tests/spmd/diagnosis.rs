//! What goes wrong between chips: each mistake ends the run at once, with one error that says who, where, and what.
//!
//! Every case runs under a watchdog, since what it must not do is hang.

use crate::watchdog::watched;
use std::time::{Duration, Instant};
use supernode::dtype::TensorType;
use supernode::mesh::Mesh;
use supernode::placement::Placement::{Partial, Replicate, Shard};
use supernode::spmd::{Chip, Device, FromIndex, Sharded, Threads, World};
use supernode::{DType, ErrorKind};

/// A run that fails may take this long.
const AT_ONCE: Duration = Duration::from_secs(2);

fn world(mesh: &str) -> Threads {
    World::threads(&Mesh::parse(mesh).expect("a mesh"), Device::cpu())
        .expect("a small mesh")
        .with_threads(1)
}

/// Runs a program that must fail, within [`AT_ONCE`], with an error of `kind` whose sentence holds all `parts`.
fn fails(
    world: Threads,
    kind: ErrorKind,
    parts: &[&str],
    program: impl Fn(&Chip) + Send + Sync + 'static,
) -> String {
    let (error, took) = watched(move || {
        let began = Instant::now();
        let error = world.run(program).expect_err("the program is wrong");
        (error, began.elapsed())
    });
    assert_eq!(error.kind(), kind, "{error}");
    let sentence = error.to_string();
    for part in parts {
        assert!(
            sentence.contains(part),
            "'{part}' is missing in: {sentence}"
        );
    }
    assert!(took <= AT_ONCE, "it took {took:?} to say: {sentence}");
    sentence
}

fn values(chip: &Chip, shape: &[usize]) -> Sharded {
    chip.input(
        "x",
        shape,
        chip.placed(&[("tp", Partial)]),
        &FromIndex(|i| i as f32),
    )
}

#[test]
fn another_collective_than_the_others() {
    let parts = [
        "rank 0 (tp=0)",
        "rank 1 (tp=1)",
        "all-reduce over tp of f32",
        "reduce-scatter over tp of f32",
        "in layer7.attention",
        "diagnosis.rs:",
        "the same calls in the same order",
    ];
    fails(world("tp=2"), ErrorKind::Chip, &parts, |chip| {
        chip.scope("layer7", || {
            chip.scope("attention", || {
                let to = if chip.coordinate("tp") == 0 {
                    Replicate
                } else {
                    Shard(0)
                };
                values(chip, &[4, 4]).redistribute([to]);
            });
        });
    });
}

#[test]
fn another_shape_than_the_others() {
    let parts = [
        "rank 0 (dp=0,tp=0)",
        "rank 1 (dp=0,tp=1)",
        "Len(16)",
        "Len(20)",
        "all-reduce over tp",
        "diagnosis.rs:",
    ];
    fails(world("dp=1,tp=2"), ErrorKind::Chip, &parts, |chip| {
        values(chip, &[4, 4 + chip.coordinate("tp")]).gather();
    });
}

#[test]
fn another_element_type_than_the_others() {
    let parts = ["rank 0 (tp=0)", "rank 1 (tp=1)", "of f32", "of bf16"];
    fails(world("tp=2"), ErrorKind::Chip, &parts, |chip| {
        let x = values(chip, &[4, 4]);
        let x = if chip.coordinate("tp") == 0 {
            x
        } else {
            x.cast(DType::Bf16)
        };
        x.gather();
    });
}

#[test]
fn another_order_than_the_others() {
    let parts = [
        "rank ",
        "tp=",
        "Len(16)",
        "Len(9)",
        "the same calls in the same order",
    ];
    fails(world("tp=2"), ErrorKind::Chip, &parts, |chip| {
        let (a, b) = (values(chip, &[4, 4]), values(chip, &[3, 3]));
        let (first, second) = if chip.coordinate("tp") == 0 {
            (a, b)
        } else {
            (b, a)
        };
        first.gather();
        second.gather();
    });
}

#[test]
fn collectives_over_other_axes_than_the_others() {
    let parts = [
        "every chip waits for another one",
        "rank 0 (dp=0,tp=0) waits in",
        "over dp",
        "over tp",
        "diagnosis.rs:",
    ];
    fails(world("dp=2,tp=2"), ErrorKind::Deadlock, &parts, |chip| {
        let rank = 2 * chip.coordinate("dp") + chip.coordinate("tp");
        chip.barrier(["dp", "tp", "tp", "dp"][rank]);
    });
}

#[test]
fn a_chip_that_returns_early() {
    let parts = [
        "rank 2 (tp=2)",
        "waits in all-reduce over tp",
        "in loss",
        "diagnosis.rs:",
        "whose program has returned without taking part",
    ];
    let sentence = fails(world("tp=3"), ErrorKind::Chip, &parts[1..], |chip| {
        if chip.coordinate("tp") != 2 {
            chip.scope("loss", || values(chip, &[4]).gather());
        }
    });
    assert!(sentence.contains(parts[0]), "{sentence}");
}

#[test]
fn a_chip_that_panics() {
    let parts = [
        "rank 3 (dp=1,tp=1)",
        "at or after matmul in layer1",
        "diagnosis.rs:",
        "panicked: the weather is bad",
    ];
    fails(world("dp=2,tp=2"), ErrorKind::Chip, &parts, |chip| {
        let x = chip.input("x", [4, 4], chip.replicated(), &FromIndex(|i| i as f32));
        chip.scope("layer1", || x.matmul(&x));
        if chip.coordinate("dp") + chip.coordinate("tp") == 2 {
            panic!("the weather is {}", "bad");
        }
        chip.barrier("dp");
        chip.barrier("tp");
    });
}

#[test]
fn a_panic_while_others_compute_or_wait_stops_them_all() {
    let sentence = fails(
        world("dp=8"),
        ErrorKind::Chip,
        &["rank 5 (dp=5)", "no luck"],
        |chip| {
            let x = chip.input("x", [8, 8], chip.replicated(), &FromIndex(|i| i as f32));
            for round in 0..u64::MAX {
                assert!(round < 10 || chip.coordinate("dp") != 5, "no luck");
                x.matmul(&x);
            }
        },
    );
    assert!(!sentence.contains("Stopped"), "{sentence}");
}

#[test]
fn a_receive_that_nobody_sends() {
    let ty = || TensorType::new([4], DType::F32);
    let parts = [
        "rank 0 (tp=0)",
        "waits in message over tp of f32[4]",
        "rank 1 (tp=1)",
        "returned",
        "diagnosis.rs:",
    ];
    fails(world("tp=2"), ErrorKind::Chip, &parts, move |chip| {
        if chip.coordinate("tp") == 0 {
            chip.receive(&ty(), "tp", 1);
        }
    });
    let parts = [
        "every chip waits",
        "rank 0 (tp=0) waits in message",
        "for a message from rank 1",
        "for a message from rank 0",
    ];
    fails(world("tp=2"), ErrorKind::Deadlock, &parts, move |chip| {
        drop(chip.receive(&ty(), "tp", 1))
    });
}

#[test]
fn a_send_that_nobody_receives() {
    let parts = [
        "rank 1 (tp=1)",
        "waits in message over tp of f32[3]",
        "rank 0 (tp=0)",
        "returned",
    ];
    fails(world("tp=2"), ErrorKind::Chip, &parts, |chip| {
        if chip.coordinate("tp") == 1 {
            chip.send(&chip.input("x", [3], [Replicate], &vec![1f32; 3]), "tp", -1);
        }
    });
}

#[test]
fn two_sends_that_face_each_other() {
    let parts = [
        "every chip waits for another one",
        "rank 0 (tp=0) waits in message over tp",
        "for rank 1 (tp=1) to receive",
        "for rank 0 (tp=0) to receive",
        "in pipeline",
        "diagnosis.rs:",
    ];
    fails(world("tp=2"), ErrorKind::Deadlock, &parts, |chip| {
        chip.scope("pipeline", || {
            let x = chip.input("x", [3], [Replicate], &vec![1f32; 3]);
            chip.send(&x, "tp", 1);
            chip.receive(x.tensor().ty(), "tp", 1);
        });
    });
}

#[test]
fn messages_of_another_shape() {
    let parts = ["rank 0 (tp=0)", "rank 1 (tp=1)", "f32[3]", "f32[4]"];
    fails(world("tp=2"), ErrorKind::Chip, &parts, |chip| {
        if chip.coordinate("tp") == 0 {
            chip.send(&chip.input("x", [3], [Replicate], &vec![1f32; 3]), "tp", 1);
        } else {
            chip.receive(&TensorType::new([4], DType::F32), "tp", -1);
        }
    });
}

#[test]
fn sends_and_receives_that_meet_succeed() {
    let run = watched(|| {
        world("tp=3").run(|chip| {
            let at = chip.coordinate("tp");
            let x = chip.input("x", [2], [Replicate], &vec![at as f32; 2]);
            let from_before = |chip: &Chip| {
                chip.receive(x.tensor().ty(), "tp", -1)
                    .read()
                    .expect("real chips")[0]
            };
            // The first receives last, as in any ring of blocking calls.
            if at == 0 {
                chip.send(&x, "tp", 1);
                from_before(chip)
            } else {
                let got = from_before(chip);
                chip.send(&x, "tp", 1);
                got
            }
        })
    });
    assert_eq!(run.expect("a ring that turns").outputs(), [2.0, 0.0, 1.0]);
}

#[test]
fn a_deadline_names_the_chip_that_computes() {
    let parts = [
        "rank 0 (tp=0) has waited in barrier over tp",
        "deadline of 0.2 s",
        "rank 1 (tp=1) computes at or after add",
        "in slow part",
        "diagnosis.rs:",
        "raise the deadline",
    ];
    fails(
        world("tp=2").with_deadline(Duration::from_millis(200)),
        ErrorKind::Deadline,
        &parts,
        |chip| {
            if chip.coordinate("tp") == 1 {
                let x = chip.input("x", [3], [Replicate], &vec![1f32; 3]);
                chip.scope("slow part", || x.add(&x));
                std::thread::sleep(Duration::from_millis(700));
            }
            chip.barrier("tp");
        },
    );
}

#[test]
fn an_exceeded_memory_budget() {
    fn program(chip: &Chip) {
        let x = chip.input("x", [64, 64], chip.replicated(), &FromIndex(|i| i as f32));
        chip.scope("layer0", || x.matmul(&x).matmul(&x));
        chip.barrier("tp");
    }
    // 16 KiB each: two fit, three do not.
    let parts = [
        "rank ",
        "tp=",
        "f32[64, 64] needs 16384 bytes",
        "32768 bytes of tensors are live",
        "budget is 40000 bytes",
    ];
    fails(
        world("tp=2").with_memory_budget(40_000),
        ErrorKind::Memory,
        &parts,
        program,
    );
    let mesh = Mesh::parse("tp=2").expect("a mesh");
    let error = World::ghost(&mesh)
        .with_memory_budget(40_000)
        .trace(program)
        .expect_err("too little memory");
    assert_eq!(error.kind(), ErrorKind::Memory);
    assert!(
        parts.iter().all(|p| error.to_string().contains(p)),
        "{error}"
    );
    let enough = 3 * 16384;
    World::ghost(&mesh)
        .with_memory_budget(enough)
        .trace(program)
        .expect("just enough memory");
    watched(move || world("tp=2").with_memory_budget(enough).run(program))
        .expect("just enough memory");
}

#[test]
fn a_started_transfer_that_nobody_waits_for() {
    fn program(chip: &Chip) {
        drop(values(chip, &[4, 4]).start_redistribute([Replicate]));
    }
    let parts = [
        "rank ",
        "tp=",
        "1 started transfer(s) that nobody waited for",
        "Pending::wait",
    ];
    fails(world("tp=2"), ErrorKind::Chip, &parts, program);
    let ghost = World::ghost(&Mesh::parse("tp=2").expect("a mesh"))
        .trace(program)
        .expect_err("nobody waits");
    assert!(ghost.to_string().contains("nobody waited for"), "{ghost}");
}

#[test]
fn a_transfer_that_only_one_chip_starts() {
    let parts = [
        "rank 0 (tp=0)",
        "waits in all-reduce over tp",
        "rank 1 (tp=1)",
        "returned without taking part",
    ];
    fails(world("tp=2"), ErrorKind::Chip, &parts, |chip| {
        if chip.coordinate("tp") == 0 {
            values(chip, &[4, 4]).start_redistribute([Replicate]).wait();
        }
    });
}

#[test]
fn transfers_in_another_order_than_the_others() {
    let parts = ["rank ", "tp=", "all-reduce over tp", "Len(16)", "Len(9)"];
    fails(world("tp=2"), ErrorKind::Chip, &parts, |chip| {
        let (a, b) = (values(chip, &[4, 4]), values(chip, &[3, 3]));
        let (first, second) = if chip.coordinate("tp") == 0 {
            (a, b)
        } else {
            (b, a)
        };
        let (first, second) = (
            first.start_redistribute([Replicate]),
            second.start_redistribute([Replicate]),
        );
        first.wait();
        second.wait();
    });
}

#[test]
fn an_error_of_the_program_keeps_its_kind() {
    // A file is gone for the whole run, whichever chip says so.
    let parts = ["the file is gone"];
    fails(world("tp=2"), ErrorKind::Io, &parts, |chip| {
        if chip.coordinate("tp") == 1 {
            chip.fail(supernode::Error::new(ErrorKind::Io, "the file is gone"));
        }
        chip.barrier("tp");
    });
}

#[test]
fn a_barrier_over_no_axis_is_refused() {
    let parts = [
        "barrier over 'nope'",
        "no axis of the mesh tp=2",
        "diagnosis.rs",
    ];
    fails(world("tp=2"), ErrorKind::Chip, &parts, |chip| {
        chip.barrier("nope");
    });
}

#[test]
fn the_first_failure_is_the_one_that_is_told() {
    let sentence = fails(
        world("tp=4"),
        ErrorKind::Chip,
        &["panicked: chip"],
        |chip| {
            let at = chip.coordinate("tp");
            std::thread::sleep(Duration::from_millis(100 * (4 - at as u64)));
            panic!("chip {at} gives up");
        },
    );
    assert!(
        sentence.starts_with("rank 3 (tp=3)") && sentence.contains("chip 3 gives up"),
        "{sentence}"
    );
}
