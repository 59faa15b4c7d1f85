//! New tokens attend over the latents of a cache as they are: the logits and texts are those with keys and values, for the
//! operations that their formula says.

use super::generate::{assert_near, generate, logits, on, texts, trained};
use crate::tiny::{self, CONTEXT, VOCAB, deepseek, latent, mesh_of, training, world};
use supernode::DType;
use supernode::model::{Config, Latent, Part, Past, Transformer};
use supernode::pipeline::layers_of_parts;
use supernode::spmd::{Chip, World};
use supernode::trace::Trace;

const MESHES: [&str; 15] = [
    "single",
    "tp=2",
    "tp=4",
    "dp=2",
    "dp=3",
    "dp=2,tp=2",
    "pp=2,tp=2",
    "ep=2,tp=2",
    "fsdp=2",
    "cp=2",
    "cp=3",
    // More chips than tokens in a prompt.
    "cp=8",
    "cp=2,tp=2",
    "dp=2,cp=2",
    "pp=2,cp=2",
];

/// DeepSeek-V3's sizes of a head and a latent, on four heads: 576 elements a head of latents, where kernels have 256 at most.
fn wide() -> Config {
    let sizes = Latent {
        q_rank: Some(24),
        kv_rank: 512,
        rope_dim: 64,
        nope_dim: 128,
        v_dim: 128,
    };
    Config {
        latent: Some(sizes),
        ffn: 64,
        ..Config::llama(1, 32, 4, 4, VOCAB, CONTEXT)
    }
}

fn models() -> [(&'static str, Config); 4] {
    let straight = Latent {
        q_rank: None,
        v_dim: 6,
        ..latent().latent.expect("it has one")
    };
    let straight = Config {
        latent: Some(straight),
        ..latent()
    };
    [
        ("latent", latent()),
        ("without a query latent", straight),
        ("deepseek", deepseek()),
        ("wide", wide()),
    ]
}

fn model(config: &Config, absorbed: bool) -> Transformer {
    let model = tiny::transformer(config.clone()).without_capacity();
    model.with_absorbed_latents(absorbed)
}

#[test]
fn logits_are_those_with_keys_and_values() {
    for (name, config) in models() {
        let want = on(name, "single", &model(&config, false), true);
        let meshes = MESHES.into_iter();
        let fits = |at: &&str| {
            let stages = !at.contains("pp=") || config.layers > 1;
            stages && (config.mixture.is_some() || !at.contains("ep="))
        };
        for at in meshes.filter(fits) {
            let got = on(name, at, &model(&config, true), true);
            assert_near(&got, &want, &format!("{name} on {at}"));
            assert_ne!(got, want, "{name} on {at}: sums run in other orders");
        }
    }
}

#[test]
fn in_bf16_they_agree_within_its_rounding() {
    for (name, config) in models() {
        let of = |absorbed| model(&config, absorbed).with_dtype(DType::Bf16);
        let want = on(name, "single", &of(false), true);
        for at in ["single", "tp=2", "cp=2"] {
            let got = on(name, at, &of(true), true);
            for (a, b) in got.iter().flatten().zip(want.iter().flatten()) {
                for (a, b) in a.iter().zip(b) {
                    // 8 bits of numbers of size 1, rounded at every product.
                    assert!((a - b).abs() <= 0.02, "{name} on {at}: {a} {b}");
                }
            }
        }
    }
}

/// On chips of another kind the logits are those of the processor with keys and values, from the products of latents.
#[cfg(feature = "gpu")]
pub(crate) fn check_on(device: &supernode::spmd::Device) {
    for (name, config) in models() {
        let keys = world(&mesh_of("single")).run(|chip| logits(&model(&config, false), chip, true));
        let want = &keys.expect("it runs on cpu").into_outputs()[0];
        for at in ["single", "tp=2", "dp=2", "cp=2"] {
            let absorbed = model(&config, true);
            let run = |device| {
                let world = tiny::world_on(&mesh_of(at), device);
                let run = world.run(|chip| logits(&absorbed, chip, true));
                run.unwrap_or_else(|e| panic!("{name} on {at}: {e}"))
            };
            let (got, same) = (run(device.clone()), run(supernode::spmd::Device::cpu()));
            assert_near(&got.outputs()[0], want, &format!("{name} on {at}"));
            assert_eq!(got.trace().difference(same.trace()), None, "{name} on {at}");
        }
    }
}

/// Operations of a chip's products.
fn products(trace: &Trace) -> u128 {
    let mut ops = trace.chip(0).ops.iter();
    ops.find(|o| &*o.op == "matmul").expect("products").flops
}

#[test]
fn a_token_costs_what_the_formula_says() {
    let config = latent();
    let l = config.latent.expect("it has one");
    for (at, tp) in [("single", 1), ("tp=2", 2)] {
        let of = |absorbed| {
            let model = model(&config, absorbed);
            let run = world(&mesh_of(at)).run(|chip| logits(&model, chip, true));
            products(run.expect("a run").trace())
        };
        let (b, h, s) = (texts().len(), config.heads / tp, CONTEXT);
        // With r + 1 elements of turned parts: one says whether a key is there.
        let with = s * (2 * l.kv_rank + l.rope_dim + 1) + l.kv_rank * (l.nope_dim + l.v_dim);
        let without = s * l.kv_rank * (l.nope_dim + l.v_dim);
        // Five steps of one token behind the prompts.
        let saved = 2 * 5 * config.layers * b * h * (without - with);
        assert_eq!(of(false) - of(true), saved as u128, "{at}");
    }
}

/// Logits behind the last of `chunk` tokens at once of four sequences, twice, after prompts of four tokens. None in a
/// ghost.
fn in_chunks(model: &Transformer, chip: &Chip, chunk: usize) -> Vec<Option<Vec<f32>>> {
    let (b, vocab) = (4, model.config().vocab);
    let layers = layers_of_parts(model.config().layers, chip.size_of("pp")).expect("stages");
    let part = |(stage, layers)| Part { stage, layers };
    let parts: Vec<Part> = layers.into_iter().enumerate().map(part).collect();
    let forward = |(start, n): (usize, usize)| {
        let past = Past {
            starts: vec![start; b].into(),
            prompts: vec![4; b].into(),
            capacity: CONTEXT,
        };
        let token = |b: usize, t: usize| ((t * t + 3 * t + 7 * b) % 29) as u32;
        let rows = (0..b).flat_map(|b| (start..start + n).map(move |t| token(b, t)));
        let rows: Vec<u32> = rows.collect();
        let tokens = model.prompts(chip, [b, n], &past, &rows);
        let logits = model.next_logits(chip, &tokens, &parts, &past, &vec![n - 1; b]);
        let logits = logits.gather().read()?;
        let row = |b: usize| (0..vocab).map(|v| logits[[b, 0, v]]).collect::<Vec<_>>();
        Some((0..b).flat_map(row).collect())
    };
    let steps = [(0, 4), (4, chunk), (4 + chunk, chunk)];
    steps.into_iter().map(forward).collect()
}

#[test]
fn several_new_tokens_at_once_attend_over_latents() {
    let (wide, config) = (wide(), latent());
    for (name, config, chunk) in [
        ("wide", wide.clone(), 2),
        ("wide", wide, 5),
        ("latent", config, 2),
    ] {
        let run = |at: &str, absorbed| {
            let model = model(&config, absorbed);
            let run = world(&mesh_of(at)).run(|chip| in_chunks(&model, chip, chunk));
            let run = run.unwrap_or_else(|e| panic!("{name} on {at}: {e}"));
            let ghost = World::ghost(&mesh_of(at)).trace(|chip| in_chunks(&model, chip, chunk));
            let ghost = ghost.expect("a trace");
            assert_eq!(run.trace().difference(&ghost), None, "{name} on {at}");
            run.into_outputs().swap_remove(0)
        };
        let want = run("single", false);
        for at in ["single", "tp=2", "dp=2", "dp=2,tp=2"] {
            let got = run(at, true);
            for (got, want) in got.iter().flatten().zip(want.iter().flatten()) {
                for (a, b) in got.iter().zip(want) {
                    // As between meshes: logits are of size 1, of some hundred roundings.
                    assert!(
                        (a - b).abs() <= 1e-5,
                        "{name} on {at}, {chunk} at once: {a} {b}"
                    );
                }
            }
            if name == "wide" {
                assert_ne!(got, want, "{name} on {at}: sums run in other orders");
            }
        }
    }
}

#[test]
fn what_makes_keys_and_values_is_turned_once_in_a_text() {
    let model = model(&latent(), true);
    let layers = model.config().layers as u64;
    let count = |trace: &Trace| {
        let shape = |e: &&supernode::trace::Event| {
            let l = latent().latent.expect("it has one");
            &*e.op == "transpose" && e.inputs[0].ty.shape[0] == l.kv_rank
        };
        trace.chip(0).events().filter(shape).count() as u64
    };
    let run = world(&mesh_of("single")).run(|chip| drop(logits(&model, chip, true)));
    // Keys' and values' matrix of each block, for five tokens.
    assert_eq!(count(run.expect("a run").trace()), 2 * layers);
}

#[test]
fn greedy_texts_are_the_same() {
    for config in [latent(), deepseek()] {
        let dir = tempfile::tempdir().expect("a directory");
        trained(dir.path(), "single", &training(config, 8, 30));
        let want = generate(dir.path(), "single", &texts(), 5, 0.0);
        for at in ["tp=2", "dp=2", "dp=2,tp=2", "cp=2", "cp=3", "cp=2,tp=2"] {
            assert_eq!(generate(dir.path(), at, &texts(), 5, 0.0), want, "{at}");
        }
    }
}
