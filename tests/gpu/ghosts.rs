//! Traces of graphics processors and of their ghosts: events, memory, and what goes through host memory.

use super::gpu;
use crate::tiny::{llama, transformer, world_on};
use std::sync::atomic::AtomicBool;
use supernode::DType;
use supernode::mesh::Mesh;
use supernode::placement::Placement::{Replicate, Shard};
use supernode::spmd::{Chip, Device, FromIndex, Init, Sharded, World, Zero};
use supernode::trace::Trace;
use supernode::train::Training;

/// A step on these devices has the events, bytes and memory of its ghost, what goes through host memory among them.
pub(super) fn step_is_the_ghosts(what: &str, training: &Training, mesh: &Mesh, device: &Device) {
    let mut once = training.clone();
    once.options.steps = 1;
    let run = once.run(
        &world_on(mesh, device.clone()),
        &|_| (),
        &AtomicBool::new(false),
    );
    let run = run.unwrap_or_else(|e| panic!("{what}: {e}"));
    let ghost = World::ghost(mesh).with_device(device.clone());
    let ghost = once.trace(&ghost).unwrap_or_else(|e| panic!("{what}: {e}"));
    assert_eq!(run.trace().difference(&ghost), None, "{what}");
    for rank in 0..mesh.chips() {
        let bytes = |trace: &Trace| trace.chip(rank).host.map(|h| [h.to_host, h.to_device]);
        assert_eq!(bytes(run.trace()), bytes(&ghost), "{what}, rank {rank}");
    }
}

/// A product whose result is gathered.
fn program(chip: &Chip) -> Option<ndarray::ArrayD<f32>> {
    let x = chip.input(
        "x",
        [6, 8],
        [Shard(0), Replicate],
        &FromIndex(|i| (i % 5) as f32),
    );
    let w = chip.parameter("w", [8, 4], [Replicate, Shard(1)], Init::ones());
    x.matmul(&w).gather().read()
}

#[test]
#[cfg_attr(
    no_adapter,
    ignore = "no Vulkan driver is installed; mesa-vulkan-drivers brings a software one"
)]
fn a_trace_is_the_ghosts() {
    let Some(gpu) = gpu() else { return };
    let mesh = Mesh::new([("dp", 2), ("tp", 2)]);
    let run = World::threads(&mesh, gpu)
        .expect("it was opened before")
        .run(program)
        .expect("the run succeeds");
    let want = World::threads(&mesh, Device::cpu())
        .expect("a small mesh")
        .run(program)
        .expect("the run succeeds");
    assert_eq!(
        run.outputs(),
        want.outputs(),
        "small whole numbers are exact"
    );
    let ghost = World::ghost(&mesh).trace(program).expect("a trace");
    assert_eq!(run.trace().difference(&ghost), None);
}

/// Moves of a tensor of this type between cuts of its three dimensions, sums among them: what each move gave.
fn moves(chip: &Chip, dtype: DType, shape: [usize; 3]) -> Vec<Option<ndarray::ArrayD<f32>>> {
    let whole = chip.input("x", shape, [Replicate], &FromIndex(|i| (i % 7) as f32));
    // A kernel's result, so that it is on the device alone.
    let whole = whole.cast(dtype).scale(2.0);
    let mut seen = Vec::new();
    let mut see = |x: &Sharded| seen.push(x.scale(0.5).gather().read());
    let cuts = [0, 1, 2].map(|dim| whole.redistribute([Shard(dim)]));
    for cut in &cuts {
        for dim in 0..3 {
            see(&cut.redistribute([Shard(dim)]));
            // Again from the device, beside the program.
            let again = cut.scale(1.0);
            if cut.placements()[0] != Shard(dim) {
                see(&again.start_redistribute([Shard(dim)]).wait());
            }
        }
        see(cut);
    }
    // A product over a cut dimension is a sum to be made.
    let width = shape[2];
    let w = chip.input(
        "w",
        [width, width],
        [Shard(0)],
        &FromIndex(|i| (i % 3) as f32),
    );
    let sum = cuts[2].matmul(&w.cast(dtype));
    for dim in 0..3 {
        see(&sum.redistribute([Shard(dim)]));
    }
    see(&sum);
    seen
}

#[test]
#[cfg_attr(
    no_adapter,
    ignore = "no Vulkan driver is installed; mesa-vulkan-drivers brings a software one"
)]
fn pieces_of_every_dimension_arrive_as_on_the_processor() {
    let Some(gpu) = gpu() else { return };
    for (mesh, shape) in [("x=2", [2, 4, 6]), ("x=3", [3, 6, 9]), ("x=3", [4, 5, 7])] {
        let mesh = Mesh::parse(mesh).expect("a mesh");
        for dtype in [DType::F32, DType::Bf16, DType::F16] {
            let what = format!("{dtype} {shape:?} on {mesh}");
            let program = |chip: &Chip| moves(chip, dtype, shape);
            let on = |device: Device| {
                let world = World::threads(&mesh, device).expect("a small mesh");
                world.run(program).unwrap_or_else(|e| panic!("{what}: {e}"))
            };
            let (got, want) = (on(gpu.clone()), on(Device::cpu()));
            assert_eq!(
                got.outputs(),
                want.outputs(),
                "{what}: whole numbers are exact"
            );
            let ghost = World::ghost(&mesh).with_device(gpu.clone());
            let ghost = ghost.trace(program).expect("a trace");
            assert_eq!(got.trace().difference(&ghost), None, "{what}");
        }
    }
}

/// Steps beyond the first, whose parameters are on the device alone.
#[test]
#[cfg_attr(
    no_adapter,
    ignore = "no Vulkan driver is installed; mesa-vulkan-drivers brings a software one"
)]
fn later_steps_are_the_ghosts_too() {
    let Some(gpu) = gpu() else { return };
    let model = transformer(llama());
    for (mesh, zero) in [
        ("dp=2,tp=2", None),
        ("fsdp=2", None),
        ("dp=2", Some(Zero::State)),
    ] {
        let mesh = Mesh::parse(mesh).expect("a mesh");
        let program = |chip: &Chip| {
            if let Some(zero) = zero {
                chip.split_parameters(zero, "dp");
            }
            crate::spmd::ghost::steps(chip, &model, 4, 3);
        };
        let world = World::threads(&mesh, gpu.clone()).expect("it was opened before");
        let run = world.run(program).unwrap_or_else(|e| panic!("{mesh}: {e}"));
        let ghost = World::ghost(&mesh).with_device(gpu.clone());
        let ghost = ghost.trace(program).expect("a trace");
        assert_eq!(run.trace().difference(&ghost), None, "{mesh}");
    }
}

/// The command's ghost of devices, which need not be here: bytes in the summary and as JSON, the kinds of a mixed mesh apart.
#[cfg(feature = "cli")]
#[test]
fn the_commands_ghost_counts_what_a_device_would_copy() {
    let bench = crate::command::Bench::new();
    let of = |device: &str| {
        let ghost = ["--ghost", "--mesh", "dp=2", "--device", device];
        bench.json(&ghost).pop().expect("a line")
    };
    let copied =
        |object: &serde_json::Value, way: &str| object["through_host_memory"][way].as_u64();
    let gpu = of("gpu");
    let sent = copied(&gpu, "to_host").expect("bytes");
    // What a chip sends over dp is copied to the host, and what it gets back again.
    let reduced = gpu["collectives"].as_array().expect("a list");
    let reduced: u64 = reduced.iter().filter_map(|c| c["bytes"].as_u64()).sum();
    assert!(sent > 0 && sent >= reduced / 2, "{gpu}");
    assert!(copied(&gpu, "to_device") > Some(0), "{gpu}");
    assert_eq!(of("cpu")["through_host_memory"], serde_json::Value::Null);
    let mixed = of("gpu,cpu");
    assert_eq!(
        mixed["classes"].as_array().map(Vec::len),
        Some(2),
        "{mixed}"
    );
    assert!(copied(&mixed, "to_host") > Some(0), "{mixed}");
    let text = bench.run(&[
        "--text", "text", "--ghost", "--mesh", "dp=2", "--device", "gpu",
    ]);
    let text = String::from_utf8_lossy(&text.stdout).into_owned();
    assert!(text.contains("through host memory (chip 0): "), "{text}");
}
