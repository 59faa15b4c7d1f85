//! Whole programs on the first graphics processor, a software one in the checks of this repository.
//!
//! A machine without one leaves these cases out and says so; where `SUPERNODE_REQUIRE_GPU` is set, that is a failure.

use crate::parity::models::check_on;
use crate::tiny::{assert_close, bits, losses, models, training, world, world_on};
use supernode::mesh::Mesh;
use supernode::placement::Placement::{Replicate, Shard};
use supernode::spmd::{Chip, Device, FromIndex, Init, World};

/// The first graphics processor, if there is one.
fn gpu() -> Option<Device> {
    match World::threads(&Mesh::single(), Device::gpu(0)) {
        Ok(_) => Some(Device::gpu(0)),
        Err(why) => {
            let required = std::env::var_os("SUPERNODE_REQUIRE_GPU").is_some();
            assert!(!required, "SUPERNODE_REQUIRE_GPU is set, but {why}");
            eprintln!("ignored: {why}");
            None
        }
    }
}

#[test]
fn models_agree_with_pytorch() {
    let Some(gpu) = gpu() else { return };
    for name in ["gpt2", "llama", "nanogpt"] {
        check_on(name, &Mesh::single(), gpu.clone());
    }
}

#[test]
fn models_agree_with_pytorch_over_chips_that_share_an_adapter() {
    let Some(gpu) = gpu() else { return };
    check_on("llama", &Mesh::new([("dp", 2), ("tp", 2)]), gpu);
}

#[test]
fn fifty_steps_have_the_processors_losses_and_repeat_bit_for_bit() {
    let Some(gpu) = gpu() else { return };
    let (name, config) = models()[1].clone();
    let training = training(config, 4, 50);
    let want = losses(&training, &world(&Mesh::single()));
    let got = losses(&training, &world_on(&Mesh::single(), gpu.clone()));
    assert_close(&got, &want, 1e-3, name);
    let again = losses(&training, &world_on(&Mesh::single(), gpu));
    assert_eq!(bits(&got), bits(&again), "two runs on one adapter");
}

#[test]
fn a_mesh_of_four_chips_trains_as_one_does() {
    let Some(gpu) = gpu() else { return };
    let (name, config) = models()[2].clone();
    let training = training(config, 4, 8);
    let want = losses(&training, &world(&Mesh::single()));
    let mesh = Mesh::new([("dp", 2), ("tp", 2)]);
    let got = losses(&training, &world_on(&mesh, gpu));
    assert_close(&got, &want, 1e-4, name);
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

#[test]
fn an_op_without_a_kernel_there_says_so() {
    let Some(gpu) = gpu() else { return };
    let world = World::threads(&Mesh::single(), gpu).expect("it was opened before");
    let run = world.run(|chip| {
        let x = chip.input("x", [2], chip.replicated(), &[1.0f32, 2.0][..]);
        chip.apply_one(Nothing, &[&x]).read()
    });
    let why = run.expect_err("no kernel").to_string();
    assert!(
        why.contains("'nothing'") && why.contains("forward_gpu"),
        "{why}"
    );
}

/// A user's op that knows the processor only.
#[derive(Debug)]
struct Nothing;

impl supernode::ops::Op for Nothing {
    fn name(&self) -> &'static str {
        "nothing"
    }
    fn infer(
        &self,
        inputs: &[supernode::tensor::TensorType],
    ) -> Result<Vec<supernode::tensor::TensorType>, String> {
        Ok(inputs.to_vec())
    }
    fn axes(&self, inputs: &[supernode::tensor::TensorType]) -> supernode::ops::Axes {
        supernode::ops::Axes::elementwise(1, &inputs[0])
    }
    fn cost(
        &self,
        inputs: &[supernode::tensor::TensorType],
        outputs: &[supernode::tensor::TensorType],
    ) -> supernode::ops::Cost {
        supernode::ops::Cost::elementwise(inputs, outputs, 0)
    }
    fn forward(
        &self,
        _: &supernode::ops::Site,
        inputs: &[&supernode::tensor::Tensor],
        outputs: &mut [supernode::tensor::Tensor],
    ) {
        outputs[0].bytes_mut().copy_from_slice(inputs[0].bytes());
    }
}

#[test]
fn a_budget_is_kept_and_its_error_names_both_numbers() {
    let Some(gpu) = gpu() else { return };
    let world = World::threads(&Mesh::single(), gpu)
        .expect("it was opened before")
        .with_memory_budget(1000);
    let run = world.run(|chip| {
        let w = chip.parameter("w", [300], chip.replicated(), Init::ones());
        w.read().map(|w| w.len())
    });
    let why = run.expect_err("too large").to_string();
    assert!(why.contains("1216") && why.contains("1000"), "{why}");
}
