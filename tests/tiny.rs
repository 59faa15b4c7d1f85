//! Models and a text so small that every mesh can be tried: eight heads, two layers, 29 characters (a prime, so that no
//! mesh divides the vocabulary).

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use supernode::mesh::Mesh;
use supernode::model::{Balance, Config, Latent, Mixture, Score, Transformer};
use supernode::spmd::{Device, Threads, World};
use supernode::train::data::{Alphabet, Batches, Split, Tokens};
use supernode::train::schedule::LearningRate;
use supernode::train::{Options, Report, Training};

/// Characters of the text.
pub(crate) const VOCAB: usize = 29;
/// Tokens per row.
pub(crate) const CONTEXT: usize = 16;

/// The mesh that is written so.
pub(crate) fn mesh_of(text: &str) -> Mesh {
    Mesh::parse(text).expect("a mesh")
}

/// Sentences of a few words, the same every time, with all letters of the alphabet.
pub(crate) fn text() -> String {
    let words = "the quick brown fox jumps over a lazy dog while six big wizards vex my jovial knight and quack";
    let words: Vec<&str> = words.split(' ').collect();
    let mut state = 1u64;
    let mut draw = |n: usize| {
        state = state
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (state >> 33) as usize % n
    };
    let mut text = words.join(" ") + ".\n";
    while text.len() < 6000 {
        let sentence: Vec<&str> = (0..3 + draw(5)).map(|_| words[draw(words.len())]).collect();
        text += &(sentence.join(" ") + ".\n");
    }
    text
}

/// The text by characters; the first nine tenths train.
pub(crate) fn batches(rows: usize, seed: u64) -> Batches {
    let tokens =
        Tokens::from_text(text().as_bytes(), Alphabet::Characters, "tiny text").expect("a text");
    assert_eq!(tokens.vocabulary().len(), VOCAB);
    let split = Split::new(tokens.len(), 0.9).expect("a share");
    Batches::new(Arc::new(tokens), split, CONTEXT, rows, seed)
        .expect("a text longer than a context")
}

/// GPT-2's architecture, for tp up to 8.
pub(crate) fn gpt2() -> Config {
    Config {
        ffn: 64,
        ..Config::gpt2(2, 32, 8, VOCAB, CONTEXT)
    }
}

/// nanoGPT's, for tp up to 8.
pub(crate) fn nanogpt() -> Config {
    Config {
        ffn: 64,
        ..Config::nanogpt(2, 32, 8, VOCAB, CONTEXT)
    }
}

/// Llama's with two query heads for each key head, for tp up to 8.
pub(crate) fn llama() -> Config {
    Config {
        ffn: 96,
        ..Config::llama(2, 64, 16, 8, VOCAB, CONTEXT)
    }
}

/// A mixture as Mixtral's: four experts in every block, two for each token, an auxiliary loss. Its router begins sharp, so
/// that its choices have margins.
pub(crate) fn mixture() -> Config {
    let mixture = Mixture {
        router_init: 0.25,
        ..Mixture::new(4, 2, 32)
    };
    Config {
        mixture: Some(mixture),
        ..Config::llama(2, 32, 8, 8, VOCAB, CONTEXT)
    }
}

/// A mixture as DeepSeek-V3's: latent attention, a dense block, then one of eight experts with sigmoid scores, a shared expert
/// and a bias that balances.
pub(crate) fn deepseek() -> Config {
    let mixture = Mixture {
        shared_experts: 1,
        dense_layers: 1,
        score: Score::Sigmoid,
        scale: 1.5,
        balance: Balance::Bias { rate: 0.01 },
        router_init: 0.5,
        ..mixture().mixture.expect("it has one")
    };
    Config {
        mixture: Some(Mixture {
            experts: 8,
            ..mixture
        }),
        ..latent()
    }
}

/// Llama's with latent attention.
pub(crate) fn latent() -> Config {
    let latent = Latent {
        q_rank: Some(12),
        kv_rank: 16,
        rope_dim: 2,
        nope_dim: 4,
        v_dim: 4,
    };
    Config {
        latent: Some(latent),
        ffn: 64,
        ..Config::llama(2, 32, 8, 8, VOCAB, CONTEXT)
    }
}

/// The three, by name, with heads that 2, 4 and 8 divide.
pub(crate) fn models() -> [(&'static str, Config); 3] {
    [("gpt2", gpt2()), ("nanogpt", nanogpt()), ("llama", llama())]
}

/// The three, by name, with heads that 3 divides.
pub(crate) fn models_of_three() -> [(&'static str, Config); 3] {
    [
        (
            "gpt2",
            Config {
                ffn: 48,
                ..Config::gpt2(2, 24, 6, VOCAB, CONTEXT)
            },
        ),
        (
            "nanogpt",
            Config {
                ffn: 48,
                ..Config::nanogpt(2, 24, 6, VOCAB, CONTEXT)
            },
        ),
        (
            "llama",
            Config {
                ffn: 48,
                ..Config::llama(2, 48, 12, 6, VOCAB, CONTEXT)
            },
        ),
    ]
}

/// A model that computes on any mesh of dp and tp.
pub(crate) fn transformer(config: Config) -> Transformer {
    Transformer::new(config, &Mesh::single()).expect("a tiny model")
}

/// Training of `config` for `steps` steps of `rows` sequences at a learning rate that warms up.
pub(crate) fn training(config: Config, rows: usize, steps: u64) -> Training {
    let learning_rate = LearningRate::Cosine {
        lr: 3e-3,
        min_lr: 3e-4,
        warmup: 4,
        decay: 40,
    };
    Training {
        model: transformer(config),
        batches: batches(rows, 7),
        options: Options {
            steps,
            learning_rate,
            ..Options::default()
        },
    }
}

/// Splits a training: gives the mesh, a name for the case, and the training with its options.
pub(crate) type Cut = Box<dyn Fn(&Training) -> (Mesh, String, Training)>;

/// A world of threads with one thread per chip and the seed of [`training`].
pub(crate) fn world(mesh: &Mesh) -> Threads {
    world_on(mesh, Device::cpu())
}

/// The same on another device.
pub(crate) fn world_on(mesh: &Mesh, device: Device) -> Threads {
    World::threads(mesh, device)
        .expect("a small mesh")
        .with_threads(1)
        .with_seed(7)
}

/// What a run of a training reports.
pub(crate) fn reports(
    training: &Training,
    world: &Threads,
) -> Result<Vec<Report>, supernode::Error> {
    let told = Mutex::new(Vec::new());
    let observe = |report: &Report| {
        told.lock()
            .expect("nobody panics while it is held")
            .push(report.clone())
    };
    training.run(world, &observe, &AtomicBool::new(false))?;
    Ok(told.into_inner().expect("nobody panics while it is held"))
}

/// The loss of each step among reports.
pub(crate) fn step_losses(reports: &[Report]) -> Vec<f64> {
    let loss = |r: &Report| match r {
        Report::Step { loss, .. } => Some(*loss),
        _ => None,
    };
    reports.iter().filter_map(loss).collect()
}

/// The loss of each step of a training that succeeds.
pub(crate) fn losses(training: &Training, world: &Threads) -> Vec<f64> {
    let reports = reports(training, world).unwrap_or_else(|e| panic!("on {}: {e}", world.mesh()));
    let losses = step_losses(&reports);
    assert_eq!(losses.len() as u64, training.options.steps);
    losses
}

/// Asserts that both lists of losses agree to `bound`, step by step.
pub(crate) fn assert_close(got: &[f64], want: &[f64], bound: f64, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (step, (a, b)) in got.iter().zip(want).enumerate() {
        assert!(
            (a - b).abs() <= bound,
            "{what}: loss {a} against {b} in step {}",
            step + 1
        );
    }
}

/// The bits of losses, for comparisons that allow no difference.
pub(crate) fn bits(losses: &[f64]) -> Vec<u64> {
    losses.iter().map(|x| x.to_bits()).collect()
}

/// Every file of weights in a checkpoint's directory, by name.
pub(crate) fn weights(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(dir)
        .expect("a checkpoint")
        .map(|e| e.expect("an entry").path());
    let files = entries.filter(|p| p.extension().is_some_and(|e| e == "safetensors"));
    let read = |p: std::path::PathBuf| {
        let name = p
            .file_name()
            .expect("a name")
            .to_string_lossy()
            .into_owned();
        (name, std::fs::read(&p).expect("a file"))
    };
    files.map(read).collect()
}
