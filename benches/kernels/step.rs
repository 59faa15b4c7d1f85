//! A training step: forward, backward, clipping and AdamW of nanoGPT's recipe for a CPU, on random tokens.

use criterion::{BenchmarkId, Criterion, Throughput};
use std::time::{Duration, Instant};
use supernode::model::{Config, Transformer};
use supernode::random::Stream;
use supernode::spmd::Chip;
use supernode::train::{AdamW, Optimizer};
use supernode::{Device, Mesh, World};

const BATCH: usize = 12;
const TOKENS: usize = 64;
const VOCABULARY: usize = 65;

/// Four layers of 128, four heads, no biases.
fn config() -> Config {
    Config {
        bias: false,
        ..Config::gpt2(4, 128, 4, VOCABULARY, TOKENS)
    }
}

/// How long `steps` steps take, after one that is not timed. The loss must fall: each step sees the same batch.
fn steps(chip: &Chip, steps: u64) -> Duration {
    let model = Transformer::new(config(), chip.mesh()).unwrap_or_else(|e| chip.fail(e));
    let mut optimizer = Optimizer::new(AdamW::default(), 0);
    let numbers = |name| -> Vec<u32> {
        let stream = Stream::new(0, name);
        let number = |i| stream.below(i, VOCABULARY as u64) as u32;
        (0..(BATCH * TOKENS) as u64).map(number).collect()
    };
    let (tokens, labels) = (numbers("tokens"), numbers("labels"));
    let mut step = |number: u64| {
        chip.step(number, || {
            let loss = chip.record(|| {
                let place = Transformer::batch_placement(chip);
                let tokens = chip.input("tokens", [BATCH, TOKENS], place.clone(), &tokens);
                let labels = chip.input("labels", [BATCH, TOKENS], place, &labels);
                let losses = model.losses(chip, &tokens, &labels);
                losses.sum().scale(1.0 / (BATCH * TOKENS) as f32)
            });
            loss.backward();
            optimizer.step(chip, 1e-3);
            let loss = loss.detach().read().expect("a real chip has contents");
            *loss.first().expect("a scalar has one element")
        })
    };
    let first = step(1);
    let began = Instant::now();
    let last = (2..steps + 2).map(&mut step).last().unwrap_or(first);
    let elapsed = began.elapsed();
    let even = (VOCABULARY as f32).ln();
    assert!(
        (first - even).abs() < 0.5,
        "the first loss is {first}; new weights give about {even:.2}"
    );
    assert!(last < first, "the loss went from {first} to {last}");
    elapsed
}

pub(crate) fn bench(c: &mut Criterion, threads: usize) {
    let mut group = c.benchmark_group(format!("train_step f32, {threads} thread(s)"));
    group.throughput(Throughput::Elements((BATCH * TOKENS) as u64));
    group.bench_function(BenchmarkId::from_parameter("nanogpt-cpu"), |bench| {
        bench.iter_custom(|iterations| {
            let world = World::threads(&Mesh::single(), Device::cpu()).expect("this machine");
            let run = world
                .with_threads(threads)
                .run(|chip| steps(chip, iterations));
            run.unwrap_or_else(|e| panic!("{e}")).into_outputs()[0]
        });
    });
    group.finish();
}
