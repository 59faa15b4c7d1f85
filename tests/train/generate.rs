//! Decoding over a cache gives the logits and the texts of the whole forward, on one chip and on meshes; texts do not depend
//! on the mesh, on each other, or on the one that wrote the checkpoint.

use crate::tiny::{
    self, CONTEXT, deepseek, gpt2, latent, llama, mesh_of, mixture, training, world,
};
use std::path::Path;
use std::sync::atomic::AtomicBool;
use supernode::model::{Config, ContextMethod, Part, Past, Transformer};
use supernode::pipeline::{Schedule, layers_of_parts};
use supernode::spmd::{Chip, World};
use supernode::train::data::Sampler;
use supernode::train::{Generate, Trained, Training};

/// Rows of token numbers of different lengths.
pub(crate) fn texts() -> Vec<Vec<u32>> {
    let text = |first: u32, len: u32| (0..len).map(|i| (first * 7 + i * i + 3 * i) % 29).collect();
    vec![text(1, 5), text(2, 9), text(3, 2), text(4, 9)]
}

/// Logits behind every token from a prompt's last to its text's, of the sequences in `texts`: with a cache, or by the whole
/// forward for each.
pub(crate) fn logits(model: &Transformer, chip: &Chip, cached: bool) -> Vec<Vec<Vec<f32>>> {
    let vocab = model.config().vocab;
    let texts = texts();
    let prompts: Vec<usize> = texts.iter().map(|t| t.len().min(4)).collect();
    let mut all = vec![Vec::new(); texts.len()];
    if !cached {
        for (b, text) in texts.iter().enumerate() {
            let tokens = chip.input("text", [1, text.len()], chip.replicated(), text);
            let logits = model
                .logits(chip, &tokens)
                .gather()
                .read()
                .expect("contents");
            for t in prompts[b] - 1..text.len() {
                all[b].push((0..vocab).map(|v| logits[[0, t, v]]).collect());
            }
        }
        return all;
    }
    let b = texts.len();
    let layers = layers_of_parts(model.config().layers, chip.size_of("pp")).expect("stages");
    let part = |(stage, layers)| Part { stage, layers };
    let parts: Vec<Part> = layers.into_iter().enumerate().map(part).collect();
    let mut run = |starts: Vec<usize>, rows: Vec<Vec<u32>>, last: Vec<usize>| {
        let n = rows.iter().map(Vec::len).max().expect("rows");
        let padded: Vec<u32> = rows
            .iter()
            .flat_map(|r| {
                r.iter()
                    .copied()
                    .chain(std::iter::repeat_n(28, n - r.len()))
            })
            .collect();
        let past = Past {
            starts: starts.clone().into(),
            prompts: prompts.clone().into(),
            capacity: CONTEXT,
        };
        let tokens = model.prompts(chip, [b, n], &past, &padded);
        let logits = model.next_logits(chip, &tokens, &parts, &past, &last);
        let Some(logits) = logits.gather().read() else {
            return;
        };
        for i in 0..b {
            // A text that has ended goes on with what does not matter.
            if starts[i] + last[i] < texts[i].len() {
                all[i].push((0..vocab).map(|v| logits[[i, 0, v]]).collect());
            }
        }
    };
    let heads = texts
        .iter()
        .zip(&prompts)
        .map(|(t, &n)| t[..n].to_vec())
        .collect();
    run(vec![0; b], heads, prompts.iter().map(|n| n - 1).collect());
    for step in 0..5 {
        let starts: Vec<usize> = prompts.iter().map(|n| n + step).collect();
        let next = |(t, &at): (&Vec<u32>, &usize)| vec![t.get(at).copied().unwrap_or(0)];
        let rows = texts.iter().zip(&starts).map(next).collect();
        run(starts, rows, vec![0; b]);
    }
    all
}

/// Decoding on chips of another kind has the logits of one chip of the processor, its cache those of the whole forward, and its trace
/// the bytes that a ghost counts.
#[cfg(feature = "gpu")]
pub(crate) fn check_on(device: &supernode::spmd::Device) {
    for (name, config) in [("gpt2", gpt2()), ("llama", llama()), ("latent", latent())] {
        let model = tiny::transformer(config);
        let want = world(&mesh_of("single")).run(|chip| logits(&model, chip, false));
        let want = want.expect("it runs on cpu").into_outputs().swap_remove(0);
        for at in ["single", "tp=2", "dp=2", "pp=2", "cp=2"] {
            let run = tiny::world_on(&mesh_of(at), device.clone());
            let run = run.run(|chip| logits(&model, chip, true));
            let run = run.unwrap_or_else(|e| panic!("{name} on {at}: {e}"));
            let ghost = World::ghost(&mesh_of(at)).with_device(device.clone());
            let ghost = ghost.trace(|chip| logits(&model, chip, true));
            let ghost = ghost.unwrap_or_else(|e| panic!("{name} on {at}: {e}"));
            assert_eq!(run.trace().difference(&ghost), None, "{name} on {at}");
            let got = run.into_outputs().swap_remove(0);
            assert_eq!(got.len(), want.len());
            for (got, want) in got.iter().zip(&want) {
                let (got, want) = (got.concat(), want.concat());
                assert_eq!(got.len(), want.len(), "{name} on {at}");
                for (a, b) in got.iter().zip(&want) {
                    // As between meshes: logits are of size 1, of some hundred roundings.
                    assert!((a - b).abs() <= 1e-5, "{name} on {at}: {a} {b}");
                }
            }
        }
    }
}

/// The models that decode: dense, with latents, with experts. Decoding drops no token, and makes keys of latents each time.
fn decoders() -> [(&'static str, Transformer); 5] {
    let model = |config: Config| {
        let model = tiny::transformer(config).without_capacity();
        model.with_absorbed_latents(false)
    };
    [
        ("gpt2", model(gpt2())),
        ("llama", model(llama())),
        ("latent", model(latent())),
        ("mixture", model(mixture())),
        ("deepseek", model(deepseek())),
    ]
}

pub(crate) fn on(what: &str, at: &str, model: &Transformer, cached: bool) -> Vec<Vec<Vec<f32>>> {
    let run = world(&mesh_of(at)).run(|chip| logits(model, chip, cached));
    let run = run.unwrap_or_else(|e| panic!("{what} on {at}: {e}"));
    let all = run.into_outputs();
    assert!(all.iter().all(|one| *one == all[0]), "{what} on {at}");
    all.into_iter().next().expect("a chip")
}

/// Asserts that logits agree as those of two meshes do: they are of size 1, of some hundred roundings.
pub(crate) fn assert_near(got: &[Vec<Vec<f32>>], want: &[Vec<Vec<f32>>], what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (got, want) in got.iter().flatten().zip(want.iter().flatten()) {
        assert_eq!(got.len(), want.len(), "{what}");
        for (a, b) in got.iter().zip(want) {
            assert!((a - b).abs() <= 1e-5, "{what}: {a} {b}");
        }
    }
}

#[test]
fn decoding_gives_the_logits_of_the_whole_forward() {
    let meshes = [
        "single",
        "tp=2",
        "tp=4",
        "dp=2",
        "dp=3",
        "dp=2,tp=2",
        "dp=3:1,tp=2",
        "dp=1:5",
        "ep=2",
        "dp=2,ep=4",
        "pp=2",
        "pp=4",
        "pp=2,tp=2",
        "dp=2,pp=2,ep=2",
    ];
    for (name, model) in decoders() {
        let mut single = None;
        for at in meshes {
            let (want, got) = (on(name, at, &model, false), on(name, at, &model, true));
            // Every sum of the forward runs over the same numbers in the same order, whatever the number of queries: the
            // bound between the two is 0. Meshes add in other orders.
            assert_eq!(got, want, "{name} on {at}");
            let single = single.get_or_insert(want);
            assert_near(&got, single, &format!("{name} on {at}"));
        }
    }
}

#[test]
fn a_cache_whose_tokens_chips_share_gives_the_same_logits() {
    let meshes = [
        "cp=2",
        "cp=3",
        "cp=4",
        // More chips than tokens in a prompt.
        "cp=8",
        "dp=2,cp=2",
        "cp=2,tp=2",
        "ep=2,cp=2",
        "pp=2,cp=2",
        "dp=2,pp=2,cp=2,tp=2",
    ];
    for (name, model) in decoders() {
        let want = on(name, "single", &model, false);
        for at in meshes {
            let got = on(name, at, &model, true);
            assert_near(&got, &want, &format!("{name} on {at}"));
        }
        let usp = ContextMethod::Usp { exchange: Some(2) };
        for method in [ContextMethod::Ring, ContextMethod::Ulysses, usp] {
            let model = model.clone().with_context_method(Some(method));
            let got = on(name, "cp=4", &model, true);
            assert_near(&got, &want, &format!("{name} by {method}"));
        }
    }
}

pub(crate) fn trained(dir: &Path, at: &str, plain: &Training) {
    let mut plain = plain.clone();
    plain.options.checkpoint = Some(dir.into());
    let run = plain.run(&world(&mesh_of(at)), &|_| (), &AtomicBool::new(false));
    run.unwrap_or_else(|e| panic!("on {at}: {e}"));
}

pub(crate) fn generate(
    dir: &Path,
    at: &str,
    prompts: &[Vec<u32>],
    tokens: usize,
    temperature: f64,
) -> Vec<Vec<u32>> {
    let model = Trained::open(dir).expect("a checkpoint");
    let sampler = Sampler::new(11, temperature, Some(20)).expect("a temperature");
    let how = Generate { tokens, sampler };
    let run = model.generate(&world(&mesh_of(at)), prompts, &how);
    let run = run.unwrap_or_else(|e| panic!("on {at}: {e}"));
    let ghost = model
        .trace(&World::ghost(&mesh_of(at)), prompts, &how)
        .expect("a trace");
    assert_eq!(run.trace().difference(&ghost), None, "on {at}");
    for other in run.outputs() {
        assert_eq!(
            other.texts,
            run.outputs()[0].texts,
            "all chips draw alike on {at}"
        );
    }
    run.into_outputs().swap_remove(0).texts
}

/// True unless the mesh would split experts of a model without.
fn has_axes(config: &Config, mesh: &str) -> bool {
    config.mixture.is_some() || !mesh.contains("ep=")
}

/// Logits behind each token of two sequences that begin with a token each.
fn from_one_token(model: &Transformer, chip: &Chip) -> Vec<Vec<f32>> {
    let part = Part {
        stage: 0,
        layers: 0..model.config().layers,
    };
    let forward = |start: usize| {
        let past = Past {
            starts: [start; 2].into(),
            prompts: [1; 2].into(),
            capacity: CONTEXT,
        };
        let row = [start as u32 + 3, 2 * start as u32 + 1];
        let tokens = model.prompts(chip, [2, 1], &past, &row[..]);
        let parts = std::slice::from_ref(&part);
        let logits = model.next_logits(chip, &tokens, parts, &past, &[0, 0]);
        let logits = logits.gather().read().expect("contents");
        logits.iter().copied().collect()
    };
    (0..5).map(forward).collect()
}

#[test]
fn a_prompt_of_one_token_stays_in_the_cache() {
    let (dense, latent) = (tiny::transformer(llama()), tiny::transformer(latent()));
    let keys = latent.clone().with_absorbed_latents(false);
    for (name, model) in [("llama", dense), ("latent", latent), ("keys", keys)] {
        let on = |at: &str| {
            let run = world(&mesh_of(at)).run(|chip| from_one_token(&model, chip));
            let run = run.unwrap_or_else(|e| panic!("{name} on {at}: {e}"));
            vec![run.into_outputs().swap_remove(0)]
        };
        let want = on("single");
        for at in ["cp=2", "cp=3", "cp=4"] {
            assert_near(&on(at), &want, &format!("{name} on {at}"));
        }
    }
}

#[test]
fn texts_depend_neither_on_the_mesh_nor_on_each_other() {
    let written = [
        (gpt2(), "tp=2"),
        (llama(), "fsdp=2,cp=2"),
        (mixture(), "ep=2,pp=2"),
    ];
    let meshes = [
        "tp=2",
        "dp=2",
        "dp=3",
        "dp=2,tp=2",
        "dp=3:1,tp=2",
        "dp=1:5",
        "fsdp=2,tp=2",
        "ep=4",
        "cp=2",
        "cp=3",
        "pp=2",
        "pp=4",
        "fsdp=2,cp=2",
        "ep=2,tp=2",
        "pp=2,cp=2,tp=2",
        "dp=2,ep=2,pp=2",
    ];
    for (config, wrote) in written {
        let dir = tempfile::tempdir().expect("a directory");
        trained(dir.path(), wrote, &training(config.clone(), 8, 30));
        for temperature in [0.0, 0.9] {
            let single = generate(dir.path(), "single", &texts(), 5, temperature);
            assert!(
                single
                    .iter()
                    .zip(texts())
                    .all(|(s, t)| s.len() == t.len() + 5 && s.starts_with(&t))
            );
            for at in meshes.iter().filter(|at| has_axes(&config, at)) {
                assert_eq!(
                    generate(dir.path(), at, &texts(), 5, temperature),
                    single,
                    "on {at}"
                );
            }
        }
        // Greedy texts are the same alone as in company; draws belong to a text's place.
        let greedy = generate(dir.path(), "single", &texts(), 5, 0.0);
        for (text, want) in texts().into_iter().zip(&greedy) {
            let meshes = ["tp=2", "dp=2", "cp=4", "ep=2,cp=2"];
            for at in meshes.iter().filter(|at| has_axes(&config, at)) {
                let alone = generate(dir.path(), at, std::slice::from_ref(&text), 5, 0.0);
                assert_eq!(alone[0], *want, "on {at}");
            }
        }
    }
}

#[test]
fn a_text_goes_on_beyond_the_context() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut plain = training(llama(), 8, 30);
    plain.options.sample = 2 * CONTEXT;
    plain.options.temperature = 0.0;
    let sample = |plain: &Training, at: &str| {
        let run = plain.run(&world(&mesh_of(at)), &|_| (), &AtomicBool::new(false));
        let run = run.unwrap_or_else(|e| panic!("on {at}: {e}"));
        run.into_outputs().swap_remove(0).sample
    };
    let whole = sample(&plain, "pp=2");
    assert_eq!(whole.len(), 1 + 2 * CONTEXT);
    // The first and the last part on one stage, and two parts on each.
    plain.options.schedule = Schedule::ZbV;
    assert_eq!(sample(&plain, "pp=2"), whole);
    plain.options.schedule = Schedule::default();
    plain.options.virtual_stages = Some(2);
    assert_eq!(sample(&plain, "pp=2"), whole);
    plain.options.virtual_stages = None;
    assert_eq!(sample(&plain, "cp=2"), whole);
    plain.options.checkpoint = Some(dir.path().into());
    assert_eq!(sample(&plain, "single"), whole);
    let prompts = [whole[..1].to_vec(), vec![3; CONTEXT + 4]];
    for at in ["tp=2", "cp=2,pp=2"] {
        let ours = generate(dir.path(), at, &prompts, 2 * CONTEXT, 0.0);
        assert_eq!(ours[0], whole, "on {at}");
        assert_eq!(ours[1].len(), 3 * CONTEXT + 4, "on {at}");
    }
}

#[test]
fn a_cache_is_split_as_its_heads_and_sequences_are() {
    let dir = tempfile::tempdir().expect("a directory");
    trained(dir.path(), "single", &training(llama(), 8, 1));
    let model = Trained::open(dir.path()).expect("a checkpoint");
    let how = Generate {
        tokens: 3,
        sampler: Sampler::new(1, 0.0, None).expect("a temperature"),
    };
    let bytes = |at: &str| {
        let run = model
            .generate(&world(&mesh_of(at)), &texts(), &how)
            .expect("texts");
        run.outputs()[0].cached_bytes
    };
    // Keys and values of 2 layers, 4 sequences of at most 12 tokens, 8 heads of 4, in f32.
    let whole = 2 * 2 * 4 * 12 * 8 * 4 * 4;
    assert_eq!(bytes("single"), whole);
    let split = [
        ("tp=2", 2),
        ("dp=2", 2),
        ("dp=2,tp=2", 4),
        ("tp=8", 8),
        ("pp=2", 2),
        ("pp=2,tp=2", 4),
    ];
    for (at, parts) in split {
        assert_eq!(bytes(at), whole / parts, "{at}");
    }
    // Over cp 9 tokens of the longest prompt and 3 new ones are rounded up apart: 5 + 2 of 12 on two chips, 3 + 1 on three.
    assert_eq!(bytes("cp=2"), whole / 12 * 7);
    assert_eq!(bytes("cp=3"), whole / 12 * 4);
    // Four sequences on three chips are 1, 1 and 2.
    assert_eq!(bytes("dp=3"), whole / 4);
}

#[test]
fn latent_attention_keeps_its_latents_alone() {
    let dir = tempfile::tempdir().expect("a directory");
    trained(dir.path(), "single", &training(latent(), 8, 1));
    let model = Trained::open(dir.path()).expect("a checkpoint");
    let how = Generate {
        tokens: 3,
        sampler: Sampler::new(1, 0.0, None).expect("a temperature"),
    };
    let sizes = latent().latent.expect("it has one");
    let layers = latent().layers as u64;
    for at in ["single", "tp=2"] {
        let run = model
            .generate(&world(&mesh_of(at)), &texts(), &how)
            .expect("texts");
        // 4 sequences of at most 12 tokens, in f32, the same on every chip of tp.
        let one = 4 * 12 * (sizes.kv_rank + sizes.rope_dim) as u64 * 4;
        assert_eq!(run.outputs()[0].cached_bytes, layers * one, "{at}");
    }
}

#[test]
fn what_cannot_be_continued_is_said() {
    let dir = tempfile::tempdir().expect("a directory");
    trained(dir.path(), "single", &training(gpt2(), 8, 1));
    let model = Trained::open(dir.path()).expect("a checkpoint");
    let how = Generate {
        tokens: 3,
        sampler: Sampler::new(1, 0.0, None).expect("a temperature"),
    };
    let refused = |at: &str, prompts: &[Vec<u32>]| {
        let run = model.generate(&world(&mesh_of(at)), prompts, &how);
        run.expect_err("refused").to_string()
    };
    for (at, prompts, parts) in [
        ("xp=2", vec![vec![1]], ["xp=2", "dp, fsdp, ep, cp, tp, pp"]),
        ("pp=5", vec![vec![1]], ["pp=5", "pp=4 would do"]),
        ("tp=3", vec![vec![1]], ["tp=3", "tp=2 does"]),
        ("single", vec![vec![]], ["without tokens", "at least one"]),
        ("single", vec![vec![29]], ["token 29", "vocabulary of 29"]),
    ] {
        let message = refused(at, &prompts);
        assert!(parts.iter().all(|p| message.contains(p)), "{message}");
    }
    let nothing = Trained::open(&dir.path().join("nothing"))
        .expect_err("refused")
        .to_string();
    assert!(nothing.contains("no checkpoint"), "{nothing}");
}
