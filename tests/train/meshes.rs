//! Training does not depend on the mesh: every mesh of dp and tp gives the single chip's losses, two runs of one mesh give
//! the same bits, and dropout and element types keep that so.

use crate::tiny::{
    assert_close, bits, losses, models, models_of_three, training, transformer, weights, world,
};
use supernode::DType;
use supernode::mesh::Mesh;
use supernode::model::Config;
use supernode::train::Training;

const STEPS: u64 = 20;

/// Every mesh of the sizes {1, 2, 4, 8} with at most 8 chips, the single chip aside.
fn meshes() -> Vec<Mesh> {
    let sizes = [1, 2, 4, 8];
    let pairs = sizes
        .iter()
        .flat_map(|dp| sizes.iter().map(move |tp| (*dp, *tp)));
    let fitting = pairs.filter(|(dp, tp)| (2..=8).contains(&(dp * tp)));
    fitting
        .map(|(dp, tp)| Mesh::new([("dp", dp), ("tp", tp)]))
        .collect()
}

/// Losses on one chip, which must fall, for comparison with those of meshes.
fn on_one_chip(name: &str, training: &Training) -> Vec<f64> {
    let single = losses(training, &world(&Mesh::single()));
    let (first, last) = (single[0], single[single.len() - 1]);
    assert!(
        (first - (29f64).ln()).abs() < 0.1,
        "{name} begins as if every character were as likely: {first}"
    );
    assert!(last < first - 0.2, "{name} learns: {first} to {last}");
    single
}

fn agree_with_one_chip(name: &str, training: &Training, meshes: &[Mesh], bound: f64) {
    let single = on_one_chip(name, training);
    for mesh in meshes {
        let got = losses(training, &world(mesh));
        assert_close(&got, &single, bound, &format!("{name} on {mesh}"));
    }
}

#[test]
fn every_mesh_gives_gpt2s_losses() {
    let (name, config) = models()[0].clone();
    agree_with_one_chip(name, &training(config, 8, STEPS), &meshes(), 1e-5);
}

#[test]
fn every_mesh_gives_nanogpts_losses() {
    let (name, config) = models()[1].clone();
    agree_with_one_chip(name, &training(config, 8, STEPS), &meshes(), 1e-5);
}

#[test]
fn every_mesh_gives_llamas_losses() {
    let (name, config) = models()[2].clone();
    agree_with_one_chip(name, &training(config, 8, STEPS), &meshes(), 1e-5);
}

#[test]
fn meshes_of_three_and_of_other_shapes() {
    let meshes = [
        "dp=3",
        "tp=3",
        "dp=2,tp=3",
        "tp=3,dp=2",
        "tp=2,dp=2",
        "dp=2",
        "tp=2",
        "pp=1,dp=2",
    ];
    let meshes: Vec<Mesh> = meshes
        .iter()
        .map(|m| Mesh::parse(m).expect("a mesh"))
        .collect();
    for (name, config) in models_of_three() {
        agree_with_one_chip(name, &training(config, 6, STEPS), &meshes, 1e-5);
    }
}

/// Losses and the checkpoint's bytes: parameters and all state.
pub(crate) fn everything(training: &Training, mesh: &Mesh, threads: usize) -> (Vec<u64>, Vec<u8>) {
    let dir = tempfile::tempdir().expect("a directory");
    let mut training = training.clone();
    training.options.checkpoint = Some(dir.path().into());
    let losses = losses(&training, &world(mesh).with_threads(threads));
    let mut files = weights(dir.path());
    assert_eq!(
        files.len(),
        1,
        "the last checkpoint is the only one: {:?}",
        files.keys()
    );
    (bits(&losses), files.pop_first().expect("one").1)
}

#[test]
fn two_runs_of_one_mesh_are_equal_bit_for_bit_with_one_and_two_threads() {
    for mesh in ["single", "dp=2", "tp=2", "dp=2,tp=2", "dp=4,tp=2"] {
        let mesh = Mesh::parse(mesh).expect("a mesh");
        for (name, config) in models() {
            let training = training(config, 8, 8);
            let first = everything(&training, &mesh, 1);
            for threads in [1, 2] {
                let again = everything(&training, &mesh, threads);
                assert_eq!(
                    first.0, again.0,
                    "losses of {name} on {mesh} with {threads} threads per chip"
                );
                assert!(
                    first.1 == again.1,
                    "parameters of {name} on {mesh} with {threads} threads per chip"
                );
            }
        }
    }
}

#[test]
fn another_seed_is_another_run() {
    let training = training(models()[1].1.clone(), 8, 2);
    let mesh = Mesh::single();
    let with = |seed| losses(&training, &world(&mesh).with_seed(seed));
    assert_eq!(bits(&with(3)), bits(&with(3)));
    assert_ne!(bits(&with(3)), bits(&with(4)));
}

#[test]
fn micro_batches_give_the_whole_batchs_losses() {
    for (name, config) in models() {
        let mut training = training(config, 8, STEPS);
        let single = on_one_chip(name, &training);
        for (mesh, micro) in [("single", 1), ("single", 4), ("dp=2", 2), ("dp=2,tp=2", 1)] {
            let mesh = Mesh::parse(mesh).expect("a mesh");
            training.options.micro_batch = Some(micro);
            let got = losses(&training, &world(&mesh));
            assert_close(
                &got,
                &single,
                1e-5,
                &format!("{name} on {mesh} in micro-batches of {micro}"),
            );
        }
    }
}

#[test]
fn dropout_is_the_same_on_every_mesh() {
    for (name, config) in models() {
        let without = losses(&training(config.clone(), 8, STEPS), &world(&Mesh::single()));
        let config = Config {
            dropout: 0.2,
            ..config
        };
        let mut training = training(config, 8, STEPS);
        let single = on_one_chip(name, &training);
        let apart = without
            .iter()
            .zip(&single)
            .map(|(a, b)| (a - b).abs())
            .fold(0.0, f64::max);
        assert!(
            apart > 1e-3,
            "{name}: dropout changes losses, here by {apart}"
        );
        for mesh in ["dp=2", "tp=2", "dp=2,tp=4", "dp=8"] {
            let mesh = Mesh::parse(mesh).expect("a mesh");
            let got = losses(&training, &world(&mesh));
            assert_close(
                &got,
                &single,
                1e-5,
                &format!("{name} with dropout on {mesh}"),
            );
        }
        // Micro-batches and pipelines cut the batch, not what is left out.
        for (mesh, micro_batch) in [("single", 1), ("single", 4), ("pp=2", 2), ("dp=2,pp=2", 1)] {
            let mut cut = training.clone();
            cut.options.micro_batch = Some(micro_batch);
            let what = format!("{name} with dropout on {mesh}, {micro_batch} at a time");
            let mesh = Mesh::parse(mesh).expect("a mesh");
            assert_close(&losses(&cut, &world(&mesh)), &single, 1e-5, &what);
        }
        // A block that is computed again drops the same elements again.
        training.model = training.model.with_recompute(true);
        let again = losses(&training, &world(&Mesh::single()));
        assert_eq!(
            bits(&again),
            bits(&single),
            "{name} with dropout, recomputed"
        );
    }
}

/// bf16 keeps 8 bits: activations round by up to 2^-9 of themselves, and another order of partial sums rounds otherwise.
/// Losses near 3 over 20 steps stay within this.
const BF16_BOUND: f64 = 0.02;

#[test]
fn bf16_learns_and_agrees_between_meshes() {
    for (name, config) in models() {
        let mut training = training(config, 8, STEPS);
        let f32 = on_one_chip(name, &training);
        training.model = training.model.with_dtype(DType::Bf16);
        let single = on_one_chip(name, &training);
        assert_ne!(bits(&single), bits(&f32));
        assert_close(
            &single,
            &f32,
            BF16_BOUND,
            &format!("{name} in bf16 against f32"),
        );
        let mut worst: f64 = 0.0;
        for mesh in ["dp=2", "tp=2", "tp=8", "dp=2,tp=2", "dp=4,tp=2"] {
            let mesh = Mesh::parse(mesh).expect("a mesh");
            let got = losses(&training, &world(&mesh));
            assert_close(
                &got,
                &single,
                BF16_BOUND,
                &format!("{name} in bf16 on {mesh}"),
            );
            worst = got
                .iter()
                .zip(&single)
                .map(|(a, b)| (a - b).abs())
                .fold(worst, f64::max);
        }
        println!("{name} in bf16: meshes differ from one chip by up to {worst:.1e}");
    }
}

#[test]
fn a_model_in_f16_runs_on_meshes_too() {
    let mut training = training(models()[2].1.clone(), 8, 5);
    training.model = transformer(training.model.config().clone()).with_dtype(DType::F16);
    let single = losses(&training, &world(&Mesh::single()));
    let mesh = Mesh::parse("dp=2,tp=2").expect("a mesh");
    assert_close(
        &losses(&training, &world(&mesh)),
        &single,
        BF16_BOUND,
        "llama in f16",
    );
}
