//! Transfers of a graphics processor by the order of what happens: no clock is asked.

use crate::mesh::Mesh;
use crate::ops::Activation;
use crate::placement::Placement::{Replicate, Shard};
use crate::spmd::{Chip, Device, FromIndex, Init, Run, World};
use crate::trace::{ChipTrace, HostCopy, Trace};

type Notes = Vec<&'static str>;

/// Runs a program on two chips of the first adapter; none without one.
fn run_on_two_chips<T: Send>(program: impl Fn(&Chip) -> T + Sync) -> Option<Run<T>> {
    let world = match World::threads(&Mesh::new([("x", 2)]), Device::gpu(0)) {
        Ok(world) => world,
        Err(why) => {
            let required = std::env::var_os("SUPERNODE_REQUIRE_GPU").is_some();
            assert!(!required, "SUPERNODE_REQUIRE_GPU is set, but {why}");
            eprintln!("ignored: {why}");
            return None;
        }
    };
    Some(world.run(program).expect("it runs"))
}

fn on_two_chips<T: Send>(program: impl Fn(&Chip) -> T + Sync) -> Option<Vec<T>> {
    run_on_two_chips(program).map(Run::into_outputs)
}

fn notes(chip: &Chip) -> Notes {
    let on_gpu = chip.memory().gpu_chip();
    on_gpu.expect("a graphics processor").take_notes()
}

fn product(chip: &Chip) -> super::Sharded {
    let x = chip.input("x", [8, 8], [Shard(0)], &FromIndex(|i| (i % 5) as f32));
    let w = chip.parameter("w", [8, 8], [Replicate], Init::ones());
    x.matmul(&w)
}

const COPY: [&str; 3] = ["copy to the host", "submit", "map"];

#[test]
#[cfg_attr(
    no_adapter,
    ignore = "no Vulkan driver is installed; mesa-vulkan-drivers brings a software one"
)]
fn a_started_transfer_is_copied_ahead_of_what_follows_and_that_runs_while_the_program_waits() {
    let program = |chip: &Chip| {
        // The chip's clock began.
        notes(chip);
        let y = product(chip);
        let before = notes(chip);
        let moving = y.start_redistribute([Replicate]);
        let started = notes(chip);
        let z = y.activate(Activation::GeluTanh);
        let computing = notes(chip);
        let whole = moving.wait();
        let waited = notes(chip);
        // Whoever reads what was moved finds it there; nothing is copied again.
        assert_eq!(whole.read().map(|w| w.len()), Some(64));
        let read = notes(chip);
        drop(z);
        [before, started, computing, waited, read]
    };
    let Some(chips) = on_two_chips(program) else {
        return;
    };
    for [before, started, computing, waited, read] in chips {
        assert!(!before.contains(&"submit"), "{before:?}");
        // What was recorded goes to the device with the copy, which is mapped at once.
        assert_eq!(started, COPY);
        assert_eq!(computing.len(), 1, "one kernel: {computing:?}");
        assert!(!COPY.contains(&computing[0]), "{computing:?}");
        // The kernel starts when the program waits, and no other copy delays it.
        assert_eq!(waited, ["submit"]);
        assert!(read.is_empty(), "{read:?}");
    }
}

#[test]
#[cfg_attr(
    no_adapter,
    ignore = "no Vulkan driver is installed; mesa-vulkan-drivers brings a software one"
)]
fn messages_are_copied_when_they_are_sent() {
    let program = |chip: &Chip| {
        let y = product(chip);
        notes(chip);
        let sending = chip.start_send(&y, "x", 1, 0);
        let sent = notes(chip);
        let z = y.activate(Activation::GeluTanh);
        let ty = (y.shape(), y.dtype(), y.placements());
        let other = chip.receive_tagged(ty, "x", -1, 0);
        let received = notes(chip);
        sending.wait();
        drop((z, other));
        [sent, received]
    };
    let Some(chips) = on_two_chips(program) else {
        return;
    };
    for [sent, received] in chips {
        assert_eq!(sent, COPY);
        assert_eq!(
            received.len(),
            2,
            "a kernel and its submission: {received:?}"
        );
        assert_eq!(received[1], "submit");
    }
}

/// A bucket's gradients go to the host as it starts, behind the kernels that made them, all by one submission; sums come back by
/// none of their own.
#[test]
#[cfg_attr(
    no_adapter,
    ignore = "no Vulkan driver is installed; mesa-vulkan-drivers brings a software one"
)]
fn gradients_of_a_bucket_are_copied_when_it_starts() {
    let program = |chip: &Chip| {
        chip.reduce_in_buckets(1 << 20);
        let loss = chip.record(|| {
            let x = chip.input("x", [8, 8], [Shard(0)], &FromIndex(|i| (i % 5) as f32));
            let w = |name: &str| chip.parameter(name, [8, 8], [Replicate], Init::ones());
            // Behind the border the gradients of b and c are complete.
            let y = chip.border(&x.matmul(&w("a")), &["b", "c"]);
            let y = y.matmul(&w("b")).activate(Activation::GeluTanh);
            y.matmul(&w("c")).sum()
        });
        notes(chip);
        chip.last_backward(true, || loss.backward());
        let backward = notes(chip);
        assert_eq!(chip.take_gradients().len(), 3);
        backward
    };
    let Some(chips) = on_two_chips(program) else {
        return;
    };
    for backward in chips {
        let copies = backward.iter().filter(|n| **n == COPY[0]).count();
        assert_eq!(copies, 1, "one for both gradients: {backward:?}");
        assert!(backward.ends_with(&COPY), "{backward:?}");
    }
}

#[test]
#[cfg_attr(
    no_adapter,
    ignore = "no Vulkan driver is installed; mesa-vulkan-drivers brings a software one"
)]
fn what_a_collective_does_not_read_is_not_copied() {
    let program = |chip: &Chip| {
        let y = product(chip).gather().activate(Activation::GeluTanh);
        notes(chip);
        let same = chip.broadcast(&y, "x", 0);
        let copied = notes(chip).contains(&COPY[0]);
        drop(same);
        (chip.coordinate("x"), copied)
    };
    let Some(chips) = on_two_chips(program) else {
        return;
    };
    assert_eq!(chips, [(0, true), (1, false)]);
}

/// Bytes to the host and to the device of each event of a chip that copied any, by op.
fn copies(chip: &ChipTrace) -> Vec<(String, [u64; 2])> {
    let found = chip.events().filter(|e| !e.host.is_empty());
    found.map(|e| (e.op.to_string(), e.host_bytes())).collect()
}

/// Copies have times where the device has stamps between commands: in their order, within the run, and their sum is the total's.
fn times_are_told(chip: &ChipTrace, stamps: bool) {
    let all: Vec<&HostCopy> = chip.events().flat_map(|e| &e.host).collect();
    let total = chip.host.expect("a graphics processor counts");
    let sum = |to_host: bool| -> u64 {
        let these = all.iter().filter(|c| c.to_host == to_host);
        these.filter_map(|c| c.time).map(|t| t.duration_ns).sum()
    };
    assert_eq!(
        [total.to_host_ns, total.to_device_ns],
        [sum(true), sum(false)]
    );
    let numbers: Vec<u64> = all.iter().map(|c| c.number).collect();
    assert_eq!(numbers, (0..all.len() as u64).collect::<Vec<_>>());
    let begins: Vec<u64> = all
        .iter()
        .filter_map(|c| c.time)
        .map(|t| t.start_ns)
        .collect();
    assert_eq!(begins.len(), if stamps { all.len() } else { 0 });
    assert!(begins.is_sorted(), "{begins:?}");
    // What was sent came from an event that ended behind the copy. The clocks are set against each other by a wait, which on a
    // busy machine takes a while.
    const SLACK: u64 = 1_000_000_000;
    let end = chip
        .events()
        .filter_map(|e| e.time)
        .map(|t| t.start_ns + t.duration_ns);
    let end = end.max().expect("a run has times");
    assert!(begins.iter().all(|&b| b <= end + SLACK), "{begins:?} {end}");
}

/// f32 [8, 8] of which each chip has half: what a chip sends goes to the host as its transfer begins, what arrived to the device when
/// the next kernel reads it, and what only the host reads does not go back.
#[test]
#[cfg_attr(
    no_adapter,
    ignore = "no Vulkan driver is installed; mesa-vulkan-drivers brings a software one"
)]
fn copies_through_host_memory_have_the_bytes_that_shapes_say() {
    const HALF: u64 = 4 * 4 * 8;
    let program = |chip: &Chip| {
        let y = product(chip);
        let whole = y.gather();
        let z = whole.activate(Activation::GeluTanh);
        let columns = y.redistribute([Shard(1)]);
        let other = columns.activate(Activation::GeluTanh);
        let sending = chip.start_send(&other, "x", 1, 0);
        let ty = (other.shape(), other.dtype(), other.placements());
        let received = chip.receive_tagged(ty, "x", -1, 0);
        sending.wait();
        let sum = received.add(&other).sum().gather();
        assert_eq!(sum.read().map(|s| s.len()), (!chip.is_ghost()).then_some(1));
        drop(z);
        chip.memory()
            .gpu_chip()
            .is_some_and(crate::gpu::Chip::stamps_copies)
    };
    let Some(run) = run_on_two_chips(program) else {
        return;
    };
    let want = [
        ("all-gather", [HALF, 0]),
        ("gelu_tanh", [0, 2 * HALF]),
        // y is on the host already.
        ("gelu_tanh", [0, HALF]),
        ("send", [HALF, 0]),
        ("add", [0, HALF]),
        ("all-reduce", [4, 0]),
    ];
    let trace = run.trace();
    for rank in 0..2 {
        let got = copies(trace.chip(rank));
        let got: Vec<(&str, [u64; 2])> = got.iter().map(|(op, c)| (&**op, *c)).collect();
        assert_eq!(got, want, "rank {rank}");
        let total = trace.chip(rank).host.expect("it counts");
        assert_eq!([total.to_host, total.to_device], [2 * HALF + 4, 4 * HALF]);
        times_are_told(trace.chip(rank), run.outputs()[rank]);
    }
    // It is in the summary and for viewers, and a trace without it is the same.
    let summary = trace.summary();
    assert!(
        summary.contains("through host memory (chip 0): 260 B from the device")
            && summary.contains(" 512 B to it"),
        "{summary}"
    );
    assert_eq!(
        summary.matches(" in ").count(),
        if run.outputs()[0] { 2 } else { 0 },
        "{summary}"
    );
    let shown = serde_json::to_string(&trace.chrome_events()).expect("JSON");
    assert!(shown.contains("\"to_host_bytes\":128"), "{shown}");
    // Copies have a track of their own.
    let events = trace.chrome_events();
    let named = |name: &str| events.iter().filter(|e| e["name"] == name).count();
    assert_eq!((named("to host"), named("to device")), (2 * 3, 2 * 3));
    let track = |e: &&serde_json::Value| e["args"]["name"] == "copies through host memory";
    let track = events.iter().find(track).expect("a track")["tid"].clone();
    let on_it = |e: &&serde_json::Value| e["ph"] == "X" && e["tid"] == track;
    assert_eq!(events.iter().filter(on_it).count(), 2 * 6);
    let file = tempfile::NamedTempFile::new().expect("a file");
    trace.save(file.path()).expect("it is written");
    let read = Trace::load(file.path()).expect("it is read");
    assert_eq!(copies(read.chip(1)), copies(trace.chip(1)));
    let ghost = World::ghost(&Mesh::new([("x", 2)])).trace(program);
    let ghost = ghost.expect("a trace");
    assert_eq!(trace.difference(&ghost), None);
    assert!(copies(ghost.chip(0)).is_empty() && ghost.chip(0).host.is_none());
    assert!(!ghost.summary().contains("host memory"));
    // A ghost of the device counts the same bytes, and says where they are not.
    let ghost = World::ghost(&Mesh::new([("x", 2)])).with_device(Device::gpu(0));
    let ghost = ghost.trace(program).expect("a trace");
    assert_eq!(trace.difference(&ghost), None);
    assert_eq!(copies(ghost.chip(0)), copies(trace.chip(0)));
    let mut other = ghost.clone();
    other.classes[0]
        .chip
        .outside
        .iter_mut()
        .for_each(|e| e.host.clear());
    let why = trace.difference(&other).expect("bytes differ");
    assert!(why.contains("[128, 0] and [0, 0] bytes"), "{why}");
}

/// What goes over the wire by another dimension than the outermost is laid in a row on the device, ahead of its copy; the program waits
/// for none of it.
#[test]
#[cfg_attr(
    no_adapter,
    ignore = "no Vulkan driver is installed; mesa-vulkan-drivers brings a software one"
)]
fn pieces_of_an_inner_dimension_are_packed_on_the_device() {
    let program = |chip: &Chip| {
        notes(chip);
        let x = chip.input("x", [8, 8], [Shard(0)], &FromIndex(|i| (i % 5) as f32));
        let y = x.activate(Activation::GeluTanh);
        notes(chip);
        let moving = y.start_redistribute([Shard(1)]);
        let started = notes(chip);
        let moved = moving.wait();
        // What every chip has is cut where it is.
        let whole = moved.gather().activate(Activation::GeluTanh);
        notes(chip);
        let piece = whole.redistribute([Shard(1)]);
        let cut = notes(chip);
        drop(piece);
        [started, cut]
    };
    let Some(chips) = on_two_chips(program) else {
        return;
    };
    for [started, cut] in chips {
        assert_eq!(started, [&["pieces"][..], &COPY].concat());
        assert_eq!(cut, ["pieces"]);
    }
}
