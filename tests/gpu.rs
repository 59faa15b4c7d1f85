//! Whole programs on the first graphics processor, a software one in the checks of this repository.
//!
//! A machine without one leaves these cases out and says so; where `SUPERNODE_REQUIRE_GPU` is set, that is a failure.

mod ghosts;
mod tiles;

use crate::parity::models::check_on;
use crate::tiny::{
    assert_close, batches, bits, deepseek, gpt2, latent, llama, losses, mixture, models,
    models_of_three, training, world, world_on,
};
use ghosts::step_is_the_ghosts;
use supernode::mesh::Mesh;
use supernode::model::{Config, ContextMethod};
use supernode::ops::Activation;
use supernode::pipeline::Schedule;
use supernode::placement::Placement::{Replicate, Shard};
use supernode::spmd::{Device, FromIndex, Init, World, Zero};
use supernode::train::{Training, with_shares};

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
#[cfg_attr(
    no_adapter,
    ignore = "no Vulkan driver is installed; mesa-vulkan-drivers brings a software one"
)]
fn models_agree_with_pytorch() {
    let Some(gpu) = gpu() else { return };
    for name in ["gpt2", "llama", "nanogpt"] {
        check_on(name, &Mesh::single(), gpu.clone());
    }
}

#[test]
#[cfg_attr(
    no_adapter,
    ignore = "no Vulkan driver is installed; mesa-vulkan-drivers brings a software one"
)]
fn models_agree_with_pytorch_over_chips_that_share_an_adapter() {
    let Some(gpu) = gpu() else { return };
    check_on("llama", &Mesh::new([("dp", 2), ("tp", 2)]), gpu);
}

#[test]
#[cfg_attr(
    no_adapter,
    ignore = "no Vulkan driver is installed; mesa-vulkan-drivers brings a software one"
)]
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
#[cfg_attr(
    no_adapter,
    ignore = "no Vulkan driver is installed; mesa-vulkan-drivers brings a software one"
)]
fn a_mesh_of_four_chips_trains_as_one_does() {
    let Some(gpu) = gpu() else { return };
    let (name, config) = models()[2].clone();
    let training = training(config, 4, 8);
    let want = losses(&training, &world(&Mesh::single()));
    let mesh = Mesh::new([("dp", 2), ("tp", 2)]);
    let got = losses(&training, &world_on(&mesh, gpu));
    assert_close(&got, &want, 1e-4, name);
}

/// A training on `mesh` of chips that share the adapter has the losses of one chip on the processor, and the ghost's trace.
fn split_agrees(what: &str, plain: &Training, mesh: &str, change: impl FnOnce(&mut Training)) {
    let Some(gpu) = gpu() else { return };
    let want = losses(plain, &world(&Mesh::single()));
    let mut training = plain.clone();
    change(&mut training);
    let mesh = Mesh::parse(mesh).expect("a mesh");
    let got = losses(&training, &world_on(&mesh, gpu.clone()));
    let what = format!("{what} on {mesh}");
    assert_close(&got, &want, 1e-4, &what);
    step_is_the_ghosts(&what, &training, &mesh, &gpu);
}

fn with_zero(stage: usize) -> impl FnOnce(&mut Training) {
    move |t| t.options.zero = Some(Zero::stage(stage).expect("a stage"))
}

#[test]
#[cfg_attr(
    no_adapter,
    ignore = "no Vulkan driver is installed; mesa-vulkan-drivers brings a software one"
)]
fn sharded_parameters_gradients_and_states_train_as_one_chip_does() {
    let plain = training(llama(), 4, 6);
    split_agrees("llama", &plain, "fsdp=2", |_| ());
    for stage in 1..=3 {
        split_agrees(&format!("ZeRO-{stage}"), &plain, "dp=2", with_zero(stage));
    }
    split_agrees("ZeRO-2", &plain, "dp=2,tp=2", with_zero(2));
}

#[test]
#[cfg_attr(
    no_adapter,
    ignore = "no Vulkan driver is installed; mesa-vulkan-drivers brings a software one"
)]
fn gradients_in_buckets_train_as_one_chip_does() {
    let plain = training(gpt2(), 4, 6);
    for bytes in [3_000, 40_000] {
        for (mesh, stage) in [("dp=2", 0), ("dp=4", 0), ("dp=2,tp=2", 0), ("dp=2", 1)] {
            let what = format!("ZeRO-{stage} in buckets of {bytes}");
            split_agrees(&what, &plain, mesh, |t| {
                t.options.bucket_bytes = bytes;
                with_zero(stage)(t);
            });
        }
    }
}

#[test]
#[cfg_attr(
    no_adapter,
    ignore = "no Vulkan driver is installed; mesa-vulkan-drivers brings a software one"
)]
fn split_tokens_train_as_one_chip_does() {
    let plain = training(llama(), 4, 6);
    split_agrees("sequence parallel", &plain, "tp=2", |t| {
        t.model = t.model.clone().with_sequence_parallel(true);
    });
    split_agrees("Ulysses", &plain, "cp=2", |t| {
        t.model = t
            .model
            .clone()
            .with_context_method(Some(ContextMethod::Ulysses));
    });
}

#[test]
#[cfg_attr(
    no_adapter,
    ignore = "no Vulkan driver is installed; mesa-vulkan-drivers brings a software one"
)]
fn rings_train_as_one_chip_does() {
    let ring = |method: ContextMethod| {
        move |t: &mut Training| t.model = t.model.clone().with_context_method(Some(method))
    };
    let plain = training(llama(), 4, 6);
    split_agrees("ring", &plain, "cp=2", ring(ContextMethod::Ring));
    split_agrees("ring", &plain, "cp=4", ring(ContextMethod::Ring));
    let usp = ContextMethod::Usp { exchange: Some(2) };
    split_agrees("usp", &plain, "cp=4", ring(usp));
    // 16 tokens over three chips: shares and halves of unlike lengths.
    let (name, config) = models_of_three()[2].clone();
    let plain = training(config, 3, 6);
    split_agrees(name, &plain, "cp=3", ring(ContextMethod::Ring));
}

#[test]
#[cfg_attr(
    no_adapter,
    ignore = "no Vulkan driver is installed; mesa-vulkan-drivers brings a software one"
)]
fn rings_agree_with_the_textbook() {
    let Some(gpu) = gpu() else { return };
    crate::spmd::ring::check_on(&gpu);
}

#[test]
#[cfg_attr(
    no_adapter,
    ignore = "no Vulkan driver is installed; mesa-vulkan-drivers brings a software one"
)]
fn decoding_over_a_cache_has_the_processors_logits() {
    let Some(gpu) = gpu() else { return };
    crate::train::generate::check_on(&gpu);
}

#[test]
#[cfg_attr(
    no_adapter,
    ignore = "no Vulkan driver is installed; mesa-vulkan-drivers brings a software one"
)]
fn decoding_over_latents_has_the_processors_logits_with_keys_and_values() {
    let Some(gpu) = gpu() else { return };
    crate::train::absorbed::check_on(&gpu);
}

#[test]
#[cfg_attr(
    no_adapter,
    ignore = "no Vulkan driver is installed; mesa-vulkan-drivers brings a software one"
)]
fn packed_documents_have_the_processors_losses_and_see_no_other() {
    let Some(gpu) = gpu() else { return };
    crate::train::documents::check_on(&gpu);
}

#[test]
#[cfg_attr(
    no_adapter,
    ignore = "no Vulkan driver is installed; mesa-vulkan-drivers brings a software one"
)]
fn packed_documents_train_as_one_chip_does() {
    let cut =
        |method| move |t: &mut Training| t.model = t.model.clone().with_context_method(method);
    for (name, config) in [("llama", llama()), ("latent", latent())] {
        let plain = crate::train::documents::packed(config, 4, 6);
        for mesh in ["single", "dp=2", "tp=2"] {
            split_agrees(&format!("packed {name}"), &plain, mesh, cut(None));
        }
        for method in [ContextMethod::Ring, ContextMethod::Ulysses] {
            let what = format!("packed {name} by {method}");
            split_agrees(&what, &plain, "cp=2", cut(Some(method)));
        }
    }
}

#[test]
#[cfg_attr(
    no_adapter,
    ignore = "no Vulkan driver is installed; mesa-vulkan-drivers brings a software one"
)]
fn collective_matmuls_train_as_one_chip_does() {
    let Some(gpu) = gpu() else { return };
    let beside = crate::train::collective_matmul::beside;
    for (name, config) in [("gpt2", gpt2()), ("llama", llama())] {
        let plain = training(config, 4, 6);
        for mesh in ["tp=2", "dp=2,tp=2"] {
            let what = format!("collective matmul, {name}");
            split_agrees(&what, &plain, mesh, |t| *t = beside(t));
        }
        let mesh = Mesh::new([("tp", 2)]);
        let run = || losses(&beside(&plain), &world_on(&mesh, gpu.clone()));
        assert_eq!(bits(&run()), bits(&run()), "two runs of {name}");
    }
}

#[test]
#[cfg_attr(
    no_adapter,
    ignore = "no Vulkan driver is installed; mesa-vulkan-drivers brings a software one"
)]
fn pipelines_train_as_one_chip_does() {
    let plain = training(gpt2(), 4, 6);
    for (mesh, schedule, parts) in [
        ("pp=2", Schedule::GPipe, None),
        ("pp=2", Schedule::OneForwardOneBackward, Some(2)),
        ("pp=2", Schedule::ZbH1, None),
        ("pp=2", Schedule::ZbV, None),
        ("dp=2,pp=2", Schedule::OneForwardOneBackward, None),
    ] {
        split_agrees(&format!("{schedule:?}"), &plain, mesh, |t| {
            (t.options.schedule, t.options.virtual_stages) = (schedule, parts);
        });
    }
}

/// The seeds are those of the processor's tests, where no choice of an expert is close.
#[test]
#[cfg_attr(
    no_adapter,
    ignore = "no Vulkan driver is installed; mesa-vulkan-drivers brings a software one"
)]
fn mixtures_train_as_one_chip_does() {
    let of = |config: Config, seed| Training {
        batches: batches(16, seed),
        ..training(config, 16, 4)
    };
    let models = [
        ("mixture", of(mixture(), 22)),
        ("deepseek", of(deepseek(), 85)),
    ];
    for (name, plain) in models {
        for mesh in ["single", "ep=2", "ep=2,tp=2"] {
            split_agrees(name, &plain, mesh, |_| ());
        }
    }
}

/// Chips in turn on the processor and on the adapter; parameters that both kinds hold stay the same to the bit.
#[test]
#[cfg_attr(
    no_adapter,
    ignore = "no Vulkan driver is installed; mesa-vulkan-drivers brings a software one"
)]
fn a_mesh_of_both_kinds_trains_as_one_chip_does() {
    let Some(_) = gpu() else { return };
    let mixed = Device::parse("cpu,gpu:0").expect("both are known");
    let (name, config) = models()[1].clone();
    let training = training(config, 4, 8);
    let want = losses(&training, &world(&Mesh::single()));
    // By rank the kinds are cpu, gpu, cpu, gpu: `tp` has both, or `dp`.
    for axes in [[("dp", 2), ("tp", 2)], [("tp", 2), ("dp", 2)]] {
        let got = losses(&training, &world_on(&Mesh::new(axes), mixed.clone()));
        assert_close(&got, &want, 1e-4, name);
        let again = losses(&training, &world_on(&Mesh::new(axes), mixed.clone()));
        assert_eq!(bits(&got), bits(&again), "two runs of {name}");
        let what = format!("{name} on both kinds");
        step_is_the_ghosts(&what, &training, &Mesh::new(axes), &mixed);
    }
}

/// Chips of both kinds with shares of the batch by name, and by what a short run measures.
#[test]
#[cfg_attr(
    no_adapter,
    ignore = "no Vulkan driver is installed; mesa-vulkan-drivers brings a software one"
)]
fn a_mesh_of_both_kinds_trains_with_uneven_shares() {
    let Some(_) = gpu() else { return };
    let mixed = Device::parse("cpu,gpu:0").expect("both are known");
    let (name, config) = models()[1].clone();
    let plain = training(config, 8, 8);
    let want = losses(&plain, &world(&Mesh::single()));
    for mesh in ["dp=3:1", "dp=1:3", "dp=3:1,tp=2"] {
        let mesh = Mesh::parse(mesh).expect("a mesh");
        let got = losses(&plain, &world_on(&mesh, mixed.clone()));
        assert_close(&got, &want, 1e-4, &format!("{name} on {mesh}"));
        let again = losses(&plain, &world_on(&mesh, mixed.clone()));
        assert_eq!(bits(&got), bits(&again), "two runs of {name} on {mesh}");
    }
    let even = Mesh::new([("dp", 2)]);
    let speeds = plain.measure_shares(&world_on(&even, mixed.clone()));
    let speeds = speeds.expect("both compute");
    println!(
        "a sequence takes {:?} s, shares {:?}",
        speeds.seconds, speeds.shares
    );
    assert!(speeds.seconds.iter().all(|s| *s > 0.0), "{speeds:?}");
    // The shares follow what was measured, whichever was the faster.
    let [a, b] = [0, 1].map(|i| (speeds.seconds[i], speeds.shares[i]));
    assert!(
        (a.0 < b.0 && a.1 >= b.1) || (a.0 >= b.0 && a.1 <= b.1),
        "{speeds:?}"
    );
    let mesh = with_shares(&even, &speeds.shares).expect("shares");
    let got = losses(&plain, &world_on(&mesh, mixed));
    assert_close(&got, &want, 1e-4, &format!("{name} on measured {mesh}"));
}

/// What both kinds hold is the same after an update, and the trace shows what travelled for it.
#[test]
#[cfg_attr(
    no_adapter,
    ignore = "no Vulkan driver is installed; mesa-vulkan-drivers brings a software one"
)]
fn parameters_of_both_kinds_stay_the_same() {
    let Some(_) = gpu() else { return };
    let mixed = Device::parse("cpu,gpu:0").expect("both are known");
    let world = World::threads(&Mesh::new([("dp", 2)]), mixed).expect("it was opened before");
    let run = world.run(|chip| {
        let mut optimizer = supernode::train::Optimizer::new(Default::default(), 0);
        for step in 0..3 {
            chip.step(step, || {
                let loss = chip.record(|| {
                    let rows = FromIndex(|i| (i as f32 + 1.3 * step as f32).sin());
                    let x = chip.input("x", [6, 8], [Shard(0)], &rows);
                    let w = chip.parameter("w", [8, 5], [Replicate], Init::normal(0.3));
                    x.matmul(&w).activate(Activation::GeluTanh).sum()
                });
                loss.backward();
                optimizer.step(chip, 0.01);
            });
        }
        let all = chip.parameters();
        [&all[0].value, &all[0].state[0], &all[0].state[1]].map(|t| t.bytes().to_vec())
    });
    let run = run.expect("the run succeeds");
    assert_eq!(run.outputs()[0], run.outputs()[1]);
    let summary = run.trace().summary().to_string();
    assert!(summary.contains("broadcast"), "{summary}");
}

#[test]
#[cfg_attr(
    no_adapter,
    ignore = "no Vulkan driver is installed; mesa-vulkan-drivers brings a software one"
)]
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
#[cfg_attr(
    no_adapter,
    ignore = "no Vulkan driver is installed; mesa-vulkan-drivers brings a software one"
)]
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

/// The script for a card runs to its end on any adapter.
#[cfg(feature = "cli")]
#[test]
#[cfg_attr(
    no_adapter,
    ignore = "no Vulkan driver is installed; mesa-vulkan-drivers brings a software one"
)]
fn the_script_for_a_card_runs_at_toy_size() {
    let Some(_) = gpu() else { return };
    let root = env!("CARGO_MANIFEST_DIR");
    let folder = tempfile::tempdir().expect("a folder");
    let run = std::process::Command::new("python3")
        .arg(format!("{root}/benches/real_gpu.py"))
        .args(["--toy", "--out"])
        .arg(folder.path())
        .args(["--binary", env!("CARGO_BIN_EXE_supernode")])
        .env("XDG_RUNTIME_DIR", std::env::temp_dir())
        .output();
    let Ok(run) = run else {
        eprintln!("ignored: no python3 here");
        return;
    };
    let (out, error) = (
        String::from_utf8_lossy(&run.stdout),
        String::from_utf8_lossy(&run.stderr),
    );
    // 2: all is right, and slower than PyTorch on a card where there is one.
    assert!(matches!(run.status.code(), Some(0 | 2)), "{out}{error}");
    assert_eq!(out.matches("passed").count(), 3, "{out}");
    let written = std::fs::read_dir(folder.path()).expect("a folder").count();
    assert_eq!(written, 1, "{out}");
}
