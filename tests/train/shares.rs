//! Uneven shares of the batch: losses are one chip's, traces the ghost's, checkpoints know them, and what cannot be uneven is
//! refused with the reason.

use crate::tiny::{
    self, assert_close, batches, bits, losses, mesh_of, mixture, models, reports, step_losses,
    training, world,
};
use supernode::mesh::Mesh;
use supernode::model::{Config, ContextMethod};
use supernode::spmd::{Device, World, Zero};
use supernode::train::{Training, with_shares};
use supernode::{ErrorKind, Result};

const STEPS: u64 = 12;

fn agree(what: &str, plain: &Training, split: &Training, meshes: &[&str]) {
    let want = losses(plain, &world(&Mesh::single()));
    for on in meshes {
        let got = losses(split, &world(&mesh_of(on)));
        assert_close(&got, &want, 1e-5, &format!("{what} on {on}"));
    }
}

#[test]
fn uneven_shares_give_one_chips_losses() {
    for (name, config) in models() {
        let dropping = Config {
            dropout: 0.1,
            ..config.clone()
        };
        let plain = training(dropping, 8, STEPS);
        let meshes = ["dp=3:1", "dp=2:1:1", "dp=1:3,tp=2", "tp=2,dp=2:1:1"];
        agree(name, &plain, &plain, &meshes);
        let plain = training(config, 8, STEPS);
        let mut cut = plain.clone();
        cut.options.micro_batch = Some(1);
        agree(name, &plain, &cut, &["dp=3:1", "dp=3:1,pp=2"]);
        cut.options.bucket_bytes = 0;
        agree(name, &plain, &cut, &["dp=2:1:1"]);
    }
}

#[test]
fn uneven_shares_go_with_every_other_axis() {
    let plain = training(tiny::llama(), 8, STEPS);
    agree(
        "llama",
        &plain,
        &plain,
        &["dp=3:1,fsdp=2", "fsdp=2,dp=3:1", "dp=2:1:1,pp=2"],
    );
    let mut cut = plain.clone();
    for method in [ContextMethod::Ring, ContextMethod::Ulysses] {
        cut.model = cut.model.with_context_method(Some(method));
        agree(&format!("by {method}"), &plain, &cut, &["dp=3:1,cp=2"]);
    }
    let mut cut = plain.clone();
    cut.model = cut.model.with_sequence_parallel(true);
    agree("sequence parallel", &plain, &cut, &["dp=3:1,tp=2"]);
    let packed = crate::train::documents::packed(tiny::llama(), 8, STEPS);
    agree("packed", &packed, &packed, &["dp=3:1", "dp=3:1,tp=2"]);
    // The seed is one at which no choice of an expert is close.
    let experts = Training {
        batches: batches(16, 22),
        ..training(mixture(), 16, 4)
    };
    agree("mixture", &experts, &experts, &["dp=3:1", "dp=3:1,ep=2"]);
}

#[test]
fn a_trace_is_the_ghosts_and_names_the_shares() {
    let mut plain = training(tiny::gpt2(), 8, 1);
    for on in ["dp=3:1", "dp=2:1:1,tp=2", "dp=1:3,pp=2", "dp=3:1,fsdp=2"] {
        let on = mesh_of(on);
        plain.options.micro_batch = Some(1);
        let ghost = plain.trace(&World::ghost(&on)).expect("a trace");
        let run = plain.run(&world(&on), &|_| (), &Default::default());
        let run = run.expect("it runs");
        assert_eq!(run.trace().difference(&ghost), None, "{on}");
        assert_eq!(run.trace().peak_bytes(), ghost.peak_bytes(), "{on}");
        assert!(
            ghost.summary().to_string().contains(&on.to_string()),
            "{on}"
        );
        let file = tempfile::NamedTempFile::new().expect("a file");
        ghost.save(file.path()).expect("it is written");
        let read = supernode::trace::Trace::load(file.path()).expect("it is read");
        assert_eq!(read.mesh, on);
    }
    // Three quarters of the batch take more memory than one.
    let ghost = plain
        .trace(&World::ghost(&mesh_of("dp=3:1")))
        .expect("a trace");
    let peaks = ghost.peak_bytes();
    assert!(peaks[0] > peaks[1], "{peaks:?}");
}

/// Only the classes that differ are traced: chips along tp do the same.
#[test]
fn chips_of_one_share_are_one_class() {
    let plain = training(tiny::gpt2(), 8, 1);
    let ghost = plain
        .trace(&World::ghost(&mesh_of("dp=3:1,tp=8")))
        .expect("a trace");
    assert!(ghost.classes.len() <= 4, "{}", ghost.classes.len());
}

#[test]
fn a_resumed_run_takes_the_shares_that_its_checkpoint_names() {
    let plain = training(tiny::gpt2(), 8, 8);
    let dir = tempfile::tempdir().expect("a directory");
    let mut half = plain.clone();
    half.options.checkpoint = Some(dir.path().into());
    half.options.steps = 4;
    assert_eq!(half.recorded_shares().expect("nothing yet"), None);
    let on = mesh_of("dp=2:1:1");
    let want = losses(&plain, &world(&on));
    losses(&half, &world(&on));
    let shares = half.recorded_shares().expect("a checkpoint");
    assert_eq!(shares, Some(vec![2, 1, 1]));
    half.options.resume = true;
    half.options.steps = 8;
    let again = with_shares(&mesh_of("dp=3"), &shares.expect("some")).expect("shares");
    assert_eq!(again, on);
    let told = reports(&half, &world(&again)).expect("it goes on");
    assert_eq!(bits(&step_losses(&told)), bits(&want[4..]));
    // A checkpoint belongs to no mesh, and one of equal shares says so too.
    half.options.steps = 10;
    let one = reports(&half, &world(&mesh_of("dp=2"))).expect("it goes on");
    assert_eq!(step_losses(&one).len(), 2);
    assert_eq!(
        half.recorded_shares().expect("a checkpoint"),
        Some(vec![1, 1])
    );
    half.options.steps = 11;
    reports(&half, &world(&Mesh::single())).expect("it goes on");
    assert_eq!(half.recorded_shares().expect("a checkpoint"), None);
}

#[test]
fn measured_shares_can_carry_the_batch() {
    let mut plain = training(tiny::gpt2(), 8, 2);
    let want = losses(&plain, &world(&Mesh::single()));
    for (on, micro) in [
        ("dp=2", None),
        ("dp=3,tp=2", None),
        ("dp=2,pp=2", None),
        ("fsdp=2,dp=2", Some(1)),
    ] {
        plain.options.micro_batch = micro;
        let world_of = |on: &Mesh| {
            World::threads(on, Device::cpu())
                .expect("threads")
                .with_seed(7)
        };
        let speeds = plain
            .measure_shares(&world_of(&mesh_of(on)))
            .expect("speeds");
        assert_eq!(
            (speeds.seconds.len(), speeds.shares.len()),
            (mesh_of(on).size_of("dp"), mesh_of(on).size_of("dp"))
        );
        assert!(speeds.seconds.iter().all(|s| *s > 0.0), "{speeds:?}");
        let on = with_shares(&mesh_of(on), &speeds.shares).expect("shares");
        let got = losses(&plain, &world(&on));
        assert_close(&got, &want, 1e-5, &format!("measured {on}"));
    }
}

fn refused<T>(result: Result<T>, says: &[&str]) {
    let Err(error) = result else {
        panic!("not refused; it should say {says:?}")
    };
    assert!(
        matches!(error.kind(), ErrorKind::Mesh | ErrorKind::Input),
        "{error}"
    );
    for part in says {
        assert!(error.to_string().contains(part), "no '{part}' in: {error}");
    }
}

#[test]
fn what_cannot_be_uneven_is_refused_with_the_reason() {
    let plain = training(tiny::gpt2(), 8, 1);
    for (on, reason) in [
        ("tp=3:1", "heads, columns"),
        ("cp=3:1", "as much work"),
        ("pp=3:1", "whole layers"),
        ("ep=3:1", "whole experts"),
        ("fsdp=3:1", "no more memory"),
    ] {
        refused(
            plain.check(&mesh_of(on)),
            &[on, "uneven shares", reason, "=2 would do"],
        );
    }
    let mut zero = plain.clone();
    zero.options.zero = Some(Zero::State);
    refused(
        zero.check(&mesh_of("dp=3:1")),
        &[
            "dp=3:1",
            "the optimizer's state is",
            "no more memory",
            "dp=2 would do",
        ],
    );
    refused(
        zero.measure_shares(&world(&mesh_of("dp=2"))),
        &["dp", "the optimizer's state is", "leave out ZeRO"],
    );
    // 8 sequences over 5 shares, and 10 do divide.
    refused(
        plain.check(&mesh_of("dp=3:2")),
        &[
            "8 sequences",
            "5 shares of mesh axis dp=3:2",
            "a batch of 10 does",
        ],
    );
    refused(
        plain.check(&mesh_of("dp=3:1,fsdp=4")),
        &["fsdp=4", "8 sequences"],
    );
    refused(
        plain.check(&mesh_of("dp=5:6")),
        &["8 sequences", "11 shares", "a batch of 11 does"],
    );
    let mut cut = plain.clone();
    cut.options.micro_batch = Some(4);
    refused(
        cut.check(&mesh_of("dp=3:1")),
        &[
            "micro-batch of 4",
            "share of 2",
            "for each of the shares dp=3:1",
        ],
    );
    refused(
        plain.measure_shares(&world(&Mesh::single())),
        &["single", "dp=2 has"],
    );
    refused(
        plain.measure_shares(&world(&mesh_of("dp=9"))),
        &["batch of 8", "9 chips", "a batch of 9 can"],
    );
    refused(
        with_shares(&mesh_of("dp=2"), &[1, 2, 3]),
        &["3 shares", "2 chips"],
    );
    refused(with_shares(&mesh_of("tp=2"), &[1, 2]), &["tp=2 has not"]);
    refused(with_shares(&mesh_of("dp=2"), &[1, 0]), &["is 0"]);
}

/// Parts of the library that cut into pieces of one length say so too.
#[test]
fn programs_that_need_equal_pieces_panic_with_the_reason() {
    let run = world(&mesh_of("dp=3:1")).run(|chip| chip.split_parameters(Zero::Parameters, "dp"));
    let why = run.expect_err("refused").to_string();
    assert!(
        why.contains("dp=3:1") && why.contains("equal pieces"),
        "{why}"
    );
}
