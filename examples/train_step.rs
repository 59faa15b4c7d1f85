//! Trains a small transformer on this repository's own source text: on four chips (two ways data parallel, two ways tensor
//! parallel), then on one chip, and compares the losses. Needs no file and no network.
//!
//! `cargo run --release --example train_step` prints, within a minute on two cores (numbers change with the text):
//!
//! ```text
//! ```

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use std::time::Instant;
use supernode::Result;
use supernode::mesh::Mesh;
use supernode::model::{Config, Transformer};
use supernode::spmd::{Device, Run, World};
use supernode::train::data::{Alphabet, Batches, Split, Tokens};
use supernode::train::schedule::LearningRate;
use supernode::train::{Finished, Options, Report, Training};

/// The text: some files of this crate.
const TEXT: &str = concat!(
    include_str!("../src/mesh.rs"),
    include_str!("../src/placement.rs"),
    include_str!("../src/tensor.rs"),
    include_str!("../src/ops/mod.rs"),
    include_str!("../src/ops/matmul.rs"),
    include_str!("../src/spmd/chip.rs"),
    include_str!("../src/spmd/apply.rs"),
    include_str!("../src/spmd/sharded.rs"),
    include_str!("../src/spmd/redistribute.rs"),
    include_str!("../src/model/mod.rs"),
);

/// A Llama of 0.8 million parameters that reads characters, for a mesh.
pub fn training(mesh: &Mesh, steps: u64, sample: usize) -> Result<Training> {
    let tokens = Arc::new(Tokens::from_text(
        TEXT.as_bytes(),
        Alphabet::Characters,
        "this crate's source",
    )?);
    let (layers, hidden, heads, kv_heads, context) = (4, 128, 4, 2, 64);
    let config = Config::llama(
        layers,
        hidden,
        heads,
        kv_heads,
        tokens.vocabulary().len(),
        context,
    );
    let split = Split::new(tokens.len(), 0.9)?;
    Ok(Training {
        model: Transformer::new(config, mesh)?,
        batches: Batches::new(tokens, split, context, 16, 0)?,
        options: Options {
            steps,
            learning_rate: LearningRate::Cosine {
                lr: 3e-3,
                min_lr: 3e-4,
                warmup: 10,
                decay: steps,
            },
            sample,
            temperature: 0.7,
            ..Default::default()
        },
    })
}

/// Trains, and returns every step's loss beside what the run left.
pub fn train(mesh: &Mesh, training: &Training, show: bool) -> Result<(Vec<f64>, Run<Finished>)> {
    let losses = Mutex::new(Vec::new());
    let observe = |report: &Report| {
        if let Report::Step { step, loss, ms, .. } = report {
            if show && (*step == 1 || step % 20 == 0) {
                println!("step {step:>4}  loss {loss:.4}  {ms:.0} ms");
            }
            losses.lock().expect("no observer panics").push(*loss);
        }
    };
    let world = World::threads(mesh, Device::cpu())?;
    let run = training.run(&world, &observe, &AtomicBool::new(false))?;
    Ok((losses.into_inner().expect("no observer panics"), run))
}

/// The largest difference between two runs' losses.
pub fn difference(a: &[f64], b: &[f64]) -> f64 {
    a.iter()
        .zip(b)
        .fold(0.0, |m, (x, y)| f64::max(m, (x - y).abs()))
}

fn main() -> Result<()> {
    let steps = 200;
    let (mesh, single) = (Mesh::new([("dp", 2), ("tp", 2)]), Mesh::single());
    let on_four = training(&mesh, steps, 0)?;
    let tokens = (on_four.batches.rows() * on_four.batches.context()) as f64 * steps as f64;
    let (parameters, characters) = (
        on_four.model.config().parameters(),
        on_four.batches.tokens().len(),
    );
    println!(
        "{parameters} parameters, {characters} characters of source, {} chips ({mesh})",
        mesh.chips()
    );

    let began = Instant::now();
    let (four, run) = train(&mesh, &on_four, true)?;
    println!(
        "{:.0} tokens per second",
        tokens / began.elapsed().as_secs_f64()
    );
    for c in run.trace().collectives() {
        let bytes = c.bytes as f64 / steps as f64 / 1e6;
        println!(
            "{} over {}: {} calls, {bytes:.3} MB a step sent by each chip",
            c.op, c.axis, c.calls
        );
    }
    println!(
        "peak memory per chip in bytes: {:?}",
        run.trace().peak_bytes()
    );

    let began = Instant::now();
    let on_one = training(&single, steps, 300)?;
    let (one, run) = train(&single, &on_one, false)?;
    let (last, first) = (one[one.len() - 1], difference(&four[..20], &one[..20]));
    println!(
        "one chip ends at loss {last:.4}, after {:.0} s, and peaks at {} bytes",
        began.elapsed().as_secs_f64(),
        run.trace().peak_bytes()[0]
    );
    println!(
        "largest difference of a loss: {first:.1e} in the first 20 steps, {:.1e} in all",
        difference(&four, &one)
    );
    let vocabulary = on_one.batches.tokens().vocabulary();
    println!(
        "it writes:\n{}",
        vocabulary.decode(&run.outputs()[0].sample)
    );
    Ok(())
}
