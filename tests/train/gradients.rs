//! Every split gives the single chip's gradients, within a bound that is derived from what is summed, through the training loop
//! itself: AdamW's first mean without decay is the gradient, and a checkpoint holds it whole.
//!
//! Two meshes compute an element of a gradient from the same products and add them in different orders. With `u = 2^-24`, a sum
//! of n terms in any order errs by at most `gamma(n)` times the sum of the terms' magnitudes, where `gamma(n)` is about
//! `lambda sqrt(n) u` with a probability of at least `1 - 2 exp(-lambda^2 / 2)` (Higham and Mary 2019, theorem 2.4); with
//! lambda = 6 one of ten million sums may err by more. Sums that feed each other add their lengths: n is that of the longest
//! path from the tokens to a gradient ([`longest_sum`]). The magnitudes are those of the sequences' own gradients, each from
//! a run of its own. Both meshes err, so their difference is at most twice as large.

use super::{context, pipeline, splits};
use crate::tiny::{CONTEXT, Cut, VOCAB, gpt2, llama, training, weights, world};
use safetensors::SafeTensors;
use std::collections::BTreeMap;
use std::sync::atomic::AtomicBool;
use supernode::mesh::Mesh;
use supernode::model::Config;
use supernode::train::schedule::LearningRate;
use supernode::train::{AdamW, Training};

const ROWS: usize = 8;

/// Elements by parameter.
type Gradients = BTreeMap<String, Vec<f32>>;

/// The gradients of the last of `steps` steps, in which nothing is learnt.
fn gradients(plain: &Training, mesh: &Mesh, steps: u64) -> Gradients {
    let dir = tempfile::tempdir().expect("a directory");
    let mut training = plain.clone();
    training.options.steps = steps;
    training.options.checkpoint = Some(dir.path().into());
    // Too small to change a weight.
    training.options.learning_rate = LearningRate::Constant { lr: 1e-30 };
    training.options.optimizer = AdamW {
        beta1: 0.0,
        clip: None,
        ..AdamW::default()
    };
    let run = training.run(&world(mesh), &|_| (), &AtomicBool::new(false));
    run.unwrap_or_else(|e| panic!("on {mesh}: {e}"));
    let (_, file) = weights(dir.path()).pop_first().expect("a checkpoint");
    let file = SafeTensors::deserialize(&file).expect("a file of weights");
    let number = |b: &[u8]| f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
    let mut all = Gradients::new();
    for (name, view) in file.tensors() {
        if let Some(parameter) = name.strip_prefix("adamw.m/") {
            let data = view.data().chunks_exact(4).map(number).collect();
            all.insert(parameter.to_string(), data);
        }
    }
    assert!(all.len() > 10, "{:?}", all.keys());
    all
}

/// Terms on the longest path of sums from a batch to a gradient: in a layer the inner lengths of its products (c for queries,
/// keys and values, d for scores, t for their weighted sum, c for the projection, c and f for the feed-forward part) and of
/// two norms, forward and backward; the head's forward and backward; the tokens of the batch. A mixture adds its router and,
/// of experts, those of a token; latent attention its latents.
fn longest_sum(config: &Config) -> usize {
    let (c, d) = (config.hidden, config.head_dim());
    let mixed = config.mixture.as_ref().map_or(0, |m| {
        m.experts + (m.experts_per_token + m.shared_experts) * (m.expert_ffn + c)
    });
    let latent = config.latent.as_ref();
    let latent = latent.map_or(0, |l| l.q_rank.unwrap_or(0) + l.kv_rank + l.head_dim());
    let layer = 3 * c + config.ffn + d + CONTEXT + 2 * c + mixed + latent;
    2 * config.layers * layer + 2 * (c + VOCAB) + ROWS * CONTEXT
}

fn gamma(n: usize) -> f64 {
    6.0 * (n as f64).sqrt() * 2f64.powi(-24)
}

#[test]
fn gathered_gradients_are_those_of_one_chip() {
    for (name, config) in [("gpt2", gpt2()), ("llama", llama())] {
        let cuts = splits::all().chain(pipeline::all()).chain(context::all());
        let batch = |rows, steps| training(config.clone(), rows, steps);
        agree(name, &batch, cuts);
    }
}

/// Every parameter's gradient on every cut within its bound of one chip's; `of` gives the training with so many rows and steps.
pub(crate) fn agree(
    name: &str,
    of: &dyn Fn(usize, u64) -> Training,
    cuts: impl Iterator<Item = Cut>,
) {
    let single = Mesh::single();
    let plain = of(ROWS, 1);
    let want = gradients(&plain, &single, 1);
    let bounds = bounds(of, &want);
    let mut worst: f64 = 0.0;
    for (mesh, what, training) in cuts.map(|cut| cut(&plain)) {
        let got = gradients(&training, &mesh, 1);
        assert!(got.keys().eq(want.keys()), "{name} on {what}");
        for (parameter, want) in &want {
            let bound = bounds[parameter];
            // What balances a router by its bias has no gradient.
            assert!(bound > 0.0 || parameter.ends_with("router.bias"));
            assert_eq!(got[parameter].len(), want.len());
            for (a, b) in got[parameter].iter().zip(want) {
                let error = f64::from((a - b).abs());
                assert!(
                    error <= bound,
                    "{name} {parameter} on {what}: {a}, {b}, bound {bound:e}"
                );
                worst = worst.max(error / bound);
            }
        }
    }
    println!("{name}: at most {worst:.3} of the bound");
}

/// The bound of each parameter's gradient.
fn bounds(of: &dyn Fn(usize, u64) -> Training, want: &Gradients) -> BTreeMap<String, f64> {
    let terms = longest_sum(of(ROWS, 1).model.config());
    // Row r of the batch is the only row of step r in a run with one row.
    let alone: Vec<Gradients> = (1..=ROWS as u64)
        .map(|steps| gradients(&of(1, 1), &Mesh::single(), steps))
        .collect();
    let bound = |parameter: &str| {
        // Softmax does not change when all keys are shifted: the gradient of keys' biases is 0 but for rounding, and
        // the magnitude of its terms is that of the values'.
        let parameter = &parameter.replace(".bk", ".bv");
        let sum = |i: usize| -> f64 {
            let each = alone.iter().map(|g| f64::from(g[parameter][i].abs()));
            each.sum::<f64>() / ROWS as f64
        };
        let most = (0..want[parameter].len()).map(sum).fold(0.0, f64::max);
        2.0 * gamma(terms) * most
    };
    want.keys().map(|p| (p.clone(), bound(p))).collect()
}
