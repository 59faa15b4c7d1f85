//! Whole models against PyTorch: logits, loss, every parameter's gradient, and ten steps of AdamW.
//!
//! The fixtures were computed by PyTorch in f64 (tests/fixtures/README.md says how), so the distances here are this crate's
//! own errors in f32.

use safetensors::SafeTensors;
use serde_json::Value;
use std::collections::BTreeMap;
use std::sync::Arc;
use supernode::mesh::Mesh;
use supernode::model::{Config, FeedForward, Norm, Positions, Transformer};
use supernode::ops::{CountLabels, Ratio, RotaryScaling};
use supernode::spmd::{Chip, Device, Sharded, World};
use supernode::train::{AdamW, Optimizer};

struct Fixture {
    config: Value,
    tensors: BTreeMap<String, (Vec<usize>, Vec<f64>)>,
}

impl Fixture {
    fn load(name: &str) -> Arc<Self> {
        let path = format!(
            "{}/tests/fixtures/{name}.safetensors",
            env!("CARGO_MANIFEST_DIR")
        );
        let bytes = std::fs::read(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
        let (_, metadata) = SafeTensors::read_metadata(&bytes).expect("a safetensors file");
        let text = &metadata.metadata().as_ref().expect("metadata")["config"];
        let file = SafeTensors::deserialize(&bytes).expect("a safetensors file");
        let read = |(name, view): (String, safetensors::tensor::TensorView)| {
            let data = view.data();
            let numbers = match view.dtype() {
                safetensors::Dtype::F64 => data
                    .chunks_exact(8)
                    .map(|b| f64::from_le_bytes(b.try_into().unwrap()))
                    .collect(),
                safetensors::Dtype::F32 => data
                    .chunks_exact(4)
                    .map(|b| f32::from_le_bytes(b.try_into().unwrap()) as f64)
                    .collect(),
                safetensors::Dtype::U32 => data
                    .chunks_exact(4)
                    .map(|b| u32::from_le_bytes(b.try_into().unwrap()) as f64)
                    .collect(),
                other => panic!("{name} is {other:?}"),
            };
            (name, (view.shape().to_vec(), numbers))
        };
        let tensors = file.tensors().into_iter().map(read).collect();
        Arc::new(Fixture {
            config: serde_json::from_str(text).expect("JSON"),
            tensors,
        })
    }

    fn numbers(&self, name: &str) -> &[f64] {
        &self
            .tensors
            .get(name)
            .unwrap_or_else(|| panic!("no tensor '{name}' in the fixture"))
            .1
    }

    fn model(&self, mesh: &Mesh) -> Transformer {
        let c = &self.config;
        let number = |key: &str| c[key].as_u64().unwrap_or_else(|| panic!("{key} in {c}")) as usize;
        let rotary = c["positions"].as_str() == Some("rotary");
        let config = Config {
            layers: number("layers"),
            hidden: number("hidden"),
            heads: number("heads"),
            kv_heads: number("kv_heads"),
            ffn: number("ffn"),
            vocab: number("vocabulary"),
            context: number("context"),
            positions: match rotary {
                true => Positions::Rotary {
                    theta: c["theta"].as_f64().unwrap(),
                    scaling: RotaryScaling::None,
                },
                false => Positions::Learned,
            },
            norm: if rotary {
                Norm::RmsNorm
            } else {
                Norm::LayerNorm
            },
            eps: c["eps"].as_f64().unwrap() as f32,
            feed_forward: match c["mlp"].as_str().unwrap() {
                "swiglu" => FeedForward::SwiGlu,
                "gelu-erf" => FeedForward::GeluErf,
                "gelu-tanh" => FeedForward::GeluTanh,
                other => panic!("feed-forward '{other}'"),
            },
            bias: c["bias"].as_bool().unwrap(),
            tied: c["tied"].as_bool().unwrap(),
            qk_norm: false,
            dropout: 0.0,
            latent: None,
            mixture: None,
        };
        Transformer::new(config, mesh).expect("the fixture's model fits the mesh")
    }

    fn restore(self: &Arc<Self>, chip: &Chip) {
        let fixture = self.clone();
        chip.restore_from(move |name, _| {
            let tensor = fixture.tensors.get(&format!("weight/{name}"));
            Ok(tensor.map(|(_, numbers)| numbers.iter().map(|&x| x as f32).collect()))
        });
    }

    /// Rows `step` of step_tokens and step_labels, or the fixture's own batch.
    fn batch(&self, chip: &Chip, step: Option<usize>) -> (Sharded, Sharded) {
        let input = |what: &str| {
            let name = step.map_or(what.to_string(), |_| format!("step_{what}"));
            let (shape, all) = &self.tensors[&name];
            let shape = &shape[shape.len() - 2..];
            let n = shape[0] * shape[1];
            let from = step.unwrap_or(0) * n;
            let part: Vec<u32> = all[from..from + n].iter().map(|&x| x as u32).collect();
            chip.input(what, shape, Transformer::batch_placement(chip), &part)
        };
        (input("tokens"), input("labels"))
    }
}

/// Mean loss over labels that count, as one number on the tape.
fn mean_loss(chip: &Chip, model: &Transformer, tokens: &Sharded, labels: &Sharded) -> Sharded {
    let sum = model.losses(chip, tokens, labels).sum().gather();
    let count = chip
        .apply_one(CountLabels { ignored: u32::MAX }, &[labels])
        .gather();
    chip.apply_one(Ratio, &[&sum, &count])
}

fn largest(values: impl IntoIterator<Item = f64>) -> f64 {
    values.into_iter().fold(0.0, |m, x| {
        if x.abs() > m || x.is_nan() {
            x.abs()
        } else {
            m
        }
    })
}

struct Results {
    logits: Vec<f64>,
    loss: f64,
    gradients: BTreeMap<String, Vec<f64>>,
    losses: Vec<f64>,
}

fn run(fixture: &Arc<Fixture>, mesh: &Mesh, device: Device) -> Results {
    let model = fixture.model(mesh);
    let vocab = model.config().vocab;
    let program = |chip: &Chip| {
        fixture.restore(chip);
        let (tokens, labels) = fixture.batch(chip, None);
        let logits = model
            .logits(chip, &tokens)
            .gather()
            .read()
            .expect("real chips");
        let logits = logits
            .rows()
            .into_iter()
            .flat_map(|r| r.to_vec().into_iter().take(vocab))
            .map(f64::from);
        let logits: Vec<f64> = logits.collect();
        let loss = chip.record(|| mean_loss(chip, &model, &tokens, &labels));
        loss.backward();
        let gradients = chip.take_gradients();
        let gradients = gradients.into_iter().map(|(i, g)| {
            let (name, shape) = (
                chip.parameters()[i].name.to_string(),
                chip.parameters()[i].shape.clone(),
            );
            let whole = g.gather().read().expect("real chips");
            let whole = whole
                .slice_each_axis(|a| (0..shape[a.axis.index()] as isize).into())
                .to_owned();
            (
                name,
                whole.iter().map(|&x| f64::from(x)).collect::<Vec<_>>(),
            )
        });
        let gradients: BTreeMap<_, _> = gradients.collect();
        let o = &fixture.config["optimizer"];
        let number = |key: &str| o[key].as_f64().unwrap() as f32;
        let options = AdamW {
            beta1: o["betas"][0].as_f64().unwrap() as f32,
            beta2: o["betas"][1].as_f64().unwrap() as f32,
            eps: number("eps"),
            weight_decay: number("weight_decay"),
            clip: Some(number("clip")),
        };
        let mut optimizer = Optimizer::new(options, 0);
        let losses = (0..10).map(|step| {
            let (tokens, labels) = fixture.batch(chip, Some(step));
            let loss = chip.record(|| mean_loss(chip, &model, &tokens, &labels));
            loss.backward();
            optimizer.step(chip, o["lr"].as_f64().unwrap());
            f64::from(loss.read().expect("real chips")[0])
        });
        let losses = losses.collect();
        (
            logits,
            f64::from(loss.read().unwrap()[0]),
            gradients,
            losses,
        )
    };
    let world = World::threads(mesh, device)
        .expect("a small mesh")
        .with_threads(1);
    // Adam state is no weight of the fixture: it starts at zero, as the source knows no such name.
    let mut outputs = world.run(program).expect("the run succeeds").into_outputs();
    let (logits, loss, gradients, losses) = outputs.swap_remove(0);
    Results {
        logits,
        loss,
        gradients,
        losses,
    }
}

fn check(name: &str, mesh: &Mesh) {
    check_on(name, mesh, Device::cpu());
}

/// Logits, loss, gradients and ten steps of a fixture on a mesh of chips of this kind.
pub(crate) fn check_on(name: &str, mesh: &Mesh, device: Device) {
    let fixture = Fixture::load(name);
    let got = run(&fixture, mesh, device);
    let want = fixture.numbers("logits");
    assert_eq!(got.logits.len(), want.len());
    let error =
        largest(got.logits.iter().zip(want).map(|(a, b)| a - b)) / largest(want.iter().copied());
    assert!(
        error <= 1e-4,
        "{name} on {mesh}: logits off by {error:e} of the largest"
    );
    let want = fixture.numbers("loss")[0];
    assert!(
        (got.loss - want).abs() <= 1e-5,
        "{name} on {mesh}: loss {} against {want}",
        got.loss
    );
    let names: Vec<&String> = fixture
        .tensors
        .keys()
        .filter(|k| k.starts_with("grad/"))
        .collect();
    assert_eq!(
        names.len(),
        got.gradients.len(),
        "every parameter has a gradient"
    );
    let scale = largest(
        names
            .iter()
            .flat_map(|n| fixture.numbers(n).iter().copied()),
    );
    for full in names {
        let want = fixture.numbers(full);
        let gradient = &got.gradients[full.trim_start_matches("grad/")];
        assert_eq!(gradient.len(), want.len(), "{full}");
        let error = largest(gradient.iter().zip(want).map(|(a, b)| a - b)) / scale;
        assert!(
            error <= 1e-4,
            "{name} on {mesh}: {full} off by {error:e} of the largest gradient"
        );
    }
    for (step, (a, b)) in got
        .losses
        .iter()
        .zip(fixture.numbers("step_losses"))
        .enumerate()
    {
        assert!(
            (a - b).abs() <= 1e-5,
            "{name} on {mesh}: loss of step {step} is {a}, PyTorch's {b}"
        );
    }
}

#[test]
fn gpt2_agrees_with_pytorch() {
    check("gpt2", &Mesh::single());
}

#[test]
fn llama_agrees_with_pytorch() {
    check("llama", &Mesh::single());
}

#[test]
fn nanogpt_agrees_with_pytorch() {
    check("nanogpt", &Mesh::single());
}

#[test]
fn the_models_agree_with_pytorch_over_data_and_tensor_parallel_chips() {
    for name in ["gpt2", "llama", "nanogpt"] {
        check(name, &Mesh::new([("tp", 2)]));
        check(name, &Mesh::new([("dp", 3), ("tp", 2)]));
    }
}
