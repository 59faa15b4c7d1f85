//! One gradient by several ways: a batch at once or in pieces, inputs and weights together or apart, kept or computed
//! again. On one chip they give the same bits; and a loop of steps stops asking the system for memory.

use crate::tiny::{self, CONTEXT, VOCAB};
use std::collections::BTreeMap;
use supernode::DType;
use supernode::mesh::Mesh;
use supernode::model::Transformer;
use supernode::placement::Placement::{Replicate, Shard};
use supernode::spmd::{Chip, FromIndex, Init, Sharded};
use supernode::train::{AdamW, Optimizer};

const ROWS: usize = 12;

/// Rows from `first` on of a batch of [`ROWS`] sequences.
fn batch(chip: &Chip, first: usize, rows: usize) -> (Sharded, Sharded) {
    let input = |name: &str, shift: u64| {
        let number = move |i: u64| {
            (((i + (first * CONTEXT) as u64) * 31 + shift * 7) % 97 % VOCAB as u64) as u32
        };
        chip.input(
            name,
            [rows, CONTEXT],
            Transformer::batch_placement(chip),
            &FromIndex(number),
        )
    };
    (input("tokens", 0), input("labels", 1))
}

fn loss(chip: &Chip, model: &Transformer, first: usize, rows: usize) -> Sharded {
    let (tokens, labels) = batch(chip, first, rows);
    chip.record(|| {
        model
            .losses(chip, &tokens, &labels)
            .sum()
            .scale(1.0 / (ROWS * CONTEXT) as f32)
    })
}

/// Every parameter's gradient as bits, by name, on the chip of rank 0.
type Bits = BTreeMap<String, Vec<u32>>;

fn gradients(chip: &Chip) -> Bits {
    let all = chip.take_gradients().into_iter();
    all.map(|(i, gradient)| {
        let whole = gradient.gather().read().expect("real chips");
        (
            chip.parameters()[i].name.to_string(),
            whole.iter().map(|x| x.to_bits()).collect(),
        )
    })
    .collect()
}

fn on(mesh: &str, program: impl Fn(&Chip) -> Bits + Sync) -> Bits {
    let mesh = Mesh::parse(mesh).expect("a mesh");
    let run = tiny::world(&mesh)
        .run(program)
        .unwrap_or_else(|e| panic!("on {mesh}: {e}"));
    run.into_outputs().swap_remove(0)
}

fn assert_equal(got: &Bits, want: &Bits, what: &str) {
    assert_eq!(
        got.keys().collect::<Vec<_>>(),
        want.keys().collect::<Vec<_>>(),
        "{what}"
    );
    assert!(!want.is_empty());
    let differ = |name: &&String| got[*name] != want[*name];
    let names: Vec<_> = want.keys().filter(differ).collect();
    assert!(
        names.is_empty(),
        "{what}: the gradients of {names:?} have other bits"
    );
    let zero = |bits: &Vec<u32>| bits.iter().all(|b| f32::from_bits(*b) == 0.0);
    let finite = |bits: &Vec<u32>| bits.iter().all(|b| f32::from_bits(*b).is_finite());
    assert!(
        want.values().all(finite) && want.values().filter(|b| zero(b)).count() <= 4,
        "{what}"
    );
}

fn joint(chip: &Chip, model: &Transformer) -> Bits {
    loss(chip, model, 0, ROWS).backward();
    gradients(chip)
}

/// All but a tied embedding's, which has two uses that add up in turns. The pieces are multiples of 32 tokens: the parameters of
/// norms add sums of so many.
#[test]
fn micro_batches_give_the_whole_batchs_gradients_bit_for_bit() {
    for (name, config) in tiny::models() {
        let model = tiny::transformer(config);
        let whole = on("single", |chip| joint(chip, &model));
        for rows in [2, 4, 6] {
            let pieces = on("single", |chip| {
                (0..ROWS)
                    .step_by(rows)
                    .for_each(|first| loss(chip, &model, first, rows).backward());
                gradients(chip)
            });
            let what = format!("{name} in micro-batches of {rows}");
            let (mut pieces, mut whole) = (pieces, whole.clone());
            if model.config().tied {
                // Head and embedding add to one gradient in turns: another order of the same summands.
                let (a, b) = (
                    pieces.remove("wte").expect("an embedding"),
                    whole.remove("wte").expect("an embedding"),
                );
                let [a, b] =
                    [a, b].map(|bits| bits.into_iter().map(f32::from_bits).collect::<Vec<f32>>());
                let largest = b.iter().fold(0f32, |m, x| m.max(x.abs()));
                let error =
                    a.iter().zip(&b).fold(
                        0f32,
                        |m, (x, y)| if (x - y).abs() <= m { m } else { (x - y).abs() },
                    );
                assert!(
                    error <= 1e-6 * largest,
                    "{what}: the tied embedding's gradient is off by {error:e} of {largest:e}"
                );
            }
            assert_equal(&pieces, &whole, &what);
        }
    }
}

const MESHES: [&str; 4] = ["single", "dp=2", "tp=2", "dp=2,tp=4"];

#[test]
fn gradients_of_inputs_and_weights_apart_are_the_joint_ones() {
    for (name, config) in tiny::models() {
        for recompute in [false, true] {
            let model = tiny::transformer(config.clone()).with_recompute(recompute);
            for mesh in MESHES {
                let together = on(mesh, |chip| joint(chip, &model));
                let apart = on(mesh, |chip| {
                    let loss = loss(chip, &model, 0, ROWS);
                    chip.backward_inputs(&loss);
                    chip.backward_weights();
                    gradients(chip)
                });
                assert_equal(
                    &apart,
                    &together,
                    &format!("{name} on {mesh}, recompute {recompute}"),
                );
            }
        }
    }
}

#[test]
fn gradients_of_inputs_come_before_any_of_weights() {
    let mesh = Mesh::new([("tp", 2)]);
    let run = tiny::world(&mesh).run(|chip| {
        let contents = FromIndex(|i| (i % 5) as f32 - 2.0);
        let x = chip.input("x", [4, 6], [Replicate], &contents).variable();
        let w1 = chip.parameter("w1", [6, 8], [Shard(1)], Init::normal(0.5));
        let w2 = chip.parameter("w2", [8, 6], [Shard(0)], Init::normal(0.5));
        let loss = || chip.record(|| x.matmul(&w1).matmul(&w2).gather().sum());
        let read = |t: Sharded| t.gather().read().expect("real chips");
        let ours = |chip: &Chip| {
            chip.take_gradients()
                .into_iter()
                .map(|(_, g)| read(g))
                .collect::<Vec<_>>()
        };
        loss().backward();
        let dx = read(chip.take_gradient(&x).expect("a gradient"));
        let dw = ours(chip);
        let loss = loss();
        chip.backward_inputs(&loss);
        let early = read(
            chip.take_gradient(&x)
                .expect("its gradient is there before those of weights"),
        );
        assert!(
            chip.parameters().iter().all(|p| p.gradient.is_empty()),
            "no weight has a gradient yet"
        );
        chip.backward_weights();
        assert_eq!((early, ours(chip)), (dx, dw));
        chip.backward_weights();
        assert!(ours(chip).is_empty(), "nothing is left");
    });
    run.unwrap_or_else(|e| panic!("{e}"));
}

#[test]
fn a_block_that_is_computed_again_gives_the_same_bits() {
    for (name, config) in tiny::models() {
        for dtype in [DType::F32, DType::Bf16] {
            let kept = tiny::transformer(config.clone()).with_dtype(dtype);
            let again = kept.clone().with_recompute(true);
            for mesh in MESHES {
                let want = on(mesh, |chip| joint(chip, &kept));
                let got = on(mesh, |chip| joint(chip, &again));
                assert_equal(&got, &want, &format!("{name} in {dtype} on {mesh}"));
            }
        }
    }
}

#[test]
fn recomputing_lowers_the_peak() {
    let config = supernode::model::Config {
        layers: 8,
        ..tiny::gpt2()
    };
    let peak = |recompute: bool| {
        let mut training = tiny::training(config.clone(), 8, 1);
        training.model = training.model.with_recompute(recompute);
        training
            .trace(&supernode::spmd::World::ghost(&Mesh::single()))
            .expect("a ghost")
            .peak_bytes()[0]
    };
    // Parameters and AdamW's two moments are there all the time.
    let state = 3 * 4 * config.parameters();
    let (kept, again) = (peak(false) - state, peak(true) - state);
    assert!(
        again < kept / 2,
        "{again} bytes recomputed, {kept} bytes kept"
    );
}

#[test]
fn a_training_loop_stops_allocating_after_its_first_steps() {
    for (mesh, dtype, recompute) in [
        ("single", DType::F32, false),
        ("dp=2,tp=2", DType::F32, true),
        ("tp=2", DType::Bf16, false),
    ] {
        let model = tiny::transformer(tiny::llama())
            .with_dtype(dtype)
            .with_recompute(recompute);
        let mesh = Mesh::parse(mesh).expect("a mesh");
        let run = tiny::world(&mesh).run(|chip| {
            let mut optimizer = Optimizer::new(AdamW::default(), 0);
            let step = |number: u64| {
                chip.step(number, || {
                    for first in [0, ROWS / 2] {
                        loss(
                            chip,
                            &model,
                            first,
                            ROWS / 2 / chip.size_of("dp") * chip.size_of("dp"),
                        )
                        .backward();
                    }
                    optimizer.step(chip, 1e-3);
                });
                chip.memory().fresh_allocations().expect("a real chip")
            };
            (0..10).map(step).collect::<Vec<u64>>()
        });
        for (rank, fresh) in run
            .unwrap_or_else(|e| panic!("on {mesh}: {e}"))
            .outputs()
            .iter()
            .enumerate()
        {
            assert!(fresh[0] > 0);
            let settled = fresh[1..].iter().all(|n| *n == fresh[1]);
            assert!(
                settled,
                "blocks asked of the system after each step, rank {rank} of {mesh} in {dtype}: {fresh:?}"
            );
        }
    }
}
