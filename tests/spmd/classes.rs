//! Chips that do the same are one class, so the ghost carries meshes and models that no machine here could.

use super::ghost::{input, steps};
use crate::tiny;
use std::time::Instant;
use supernode::mesh::Mesh;
use supernode::model::{Config, Transformer};
use supernode::placement::Placement::Shard;
use supernode::spmd::{Chip, World};
use supernode::train::data::{Alphabet, Batches, Split, Tokens};
use supernode::train::{Options, Training};

#[test]
fn chips_that_do_the_same_are_one_class() {
    let mesh = Mesh::new([("dp", 8), ("tp", 8)]);
    let training = tiny::training(tiny::llama(), 16, 1);
    let trace = training
        .trace(&World::ghost(&mesh))
        .expect("a model that fits");
    assert_eq!(trace.classes.len(), 1);
    assert_eq!(trace.classes[0].pattern, [None, None]);
    let classes = |program: fn(&Chip)| {
        World::ghost(&mesh)
            .trace(program)
            .expect("a program that fits")
            .classes
    };
    let read = classes(|chip| {
        let x = input(chip, "x", &[8, 8], &[]);
        (0..chip.coordinate("tp")).for_each(|_| drop(x.add(&x)));
    });
    assert_eq!(
        read.len(),
        8,
        "a class for each coordinate on tp, whatever dp"
    );
    for class in &read {
        assert_eq!(class.pattern[0], None);
        assert_eq!(
            class.chip.events().count(),
            class.pattern[1].expect("a coordinate")
        );
    }
    assert_eq!(
        classes(|chip| {
            let _ = chip.coordinate("dp") + chip.coordinate("tp");
        })
        .len(),
        64
    );
    assert_eq!(
        classes(|chip| drop(input(chip, "x", &[9, 8], &[("dp", Shard(0))]))).len(),
        8
    );
    assert_eq!(
        classes(|chip| drop(input(
            chip,
            "x",
            &[16, 8],
            &[("dp", Shard(0)), ("tp", Shard(1))]
        )))
        .len(),
        1
    );
    assert_eq!(
        classes(|chip| assert_eq!(chip.coordinate("pp"), 0)).len(),
        1,
        "an axis that is not there has one chip"
    );
}

fn ghost_training(config: Config, rows: usize) -> Training {
    let context = config.context;
    let text = vec![b'a'; 2 * context];
    let tokens =
        Tokens::from_text(&text, Alphabet::Bytes, "a text of nothing else").expect("a text");
    let split = Split::new(tokens.len(), 1.0).expect("a share");
    Training {
        model: Transformer::new(config, &Mesh::single()).expect("a model"),
        batches: Batches::new(tokens.into(), split, context, rows, 0).expect("batches"),
        options: Options {
            micro_batch: Some(1),
            ..Options::default()
        },
    }
}

#[test]
fn gpt3_traces_in_under_a_second() {
    let config = Config::gpt2(96, 12288, 96, 50257, 2048);
    let parameters = config.parameters();
    assert!(
        (174e9..176e9).contains(&(parameters as f64)),
        "{parameters} parameters"
    );
    let training = ghost_training(config, 8);
    let mesh = Mesh::new([("dp", 8), ("tp", 8)]);
    let began = Instant::now();
    let trace = training
        .trace(&World::ghost(&mesh))
        .expect("a mesh that divides it");
    let took = began.elapsed();
    println!(
        "GPT-3 175B on {mesh}: traced in {took:?}, {} events",
        trace.chip(0).events().count()
    );
    assert!(
        took.as_secs_f64() < 1.0,
        "GPT-3 175B on {mesh} took {took:?} to trace"
    );
    assert_eq!(trace.classes.len(), 1);
    let chip = trace.chip(63);
    // Parameters, gradients and AdamW's two moments in f32, an eighth of each on a chip; activations beside.
    let state = 4 * 4 * parameters / 8;
    assert!(
        chip.peak_bytes > state && chip.peak_bytes < 2 * state,
        "{} bytes against {state} of state",
        chip.peak_bytes
    );
    // 6 flops per parameter and token, an eighth of a sequence's on a chip; attention's products and the embedding's
    // absence about cancel within a tenth.
    let flops: u128 = chip.ops.iter().map(|o| o.flops).sum();
    let want = 6.0 * parameters as f64 * 2048.0 / 8.0;
    assert!(
        (0.95..1.15).contains(&(flops as f64 / want)),
        "{flops:e} flops against {want:e}"
    );
    // Megatron: two all-reduces forward and two backward per layer over tp.
    let over_tp = chip
        .collectives
        .iter()
        .find(|c| &*c.op == "all-reduce" && c.axis == "tp")
        .expect("tensor parallelism");
    assert!(
        over_tp.calls >= 4 * 96 && over_tp.calls <= 4 * 96 + 12,
        "{} all-reduces over tp",
        over_tp.calls
    );
}

#[test]
fn the_first_step_has_the_peak_of_all_steps() {
    let mesh = Mesh::new([("dp", 2), ("tp", 2)]);
    for (name, config) in tiny::models() {
        let model = Transformer::new(config, &mesh).expect("a mesh that divides it");
        let peak = |count: u64| {
            let trace = World::ghost(&mesh).trace(|chip| steps(chip, &model, 8, count));
            trace.expect("a ghost").chip(0).peak_bytes
        };
        assert_eq!(
            peak(1),
            peak(3),
            "{name}: one traced step tells the memory of training"
        );
    }
}

#[test]
fn half_a_million_chips_trace() {
    let mesh = Mesh::new([("dp", 65536), ("tp", 8)]);
    let began = Instant::now();
    let trace = ghost_training(tiny::gpt2(), 65536)
        .trace(&World::ghost(&mesh))
        .expect("a mesh that divides it");
    println!("{} chips traced in {:?}", mesh.chips(), began.elapsed());
    assert_eq!((mesh.chips(), trace.classes.len()), (524_288, 1));
    assert!(trace.chip(524_287).peak_bytes > 0);
    let dp = trace
        .collectives()
        .iter()
        .find(|c| c.axis == "dp")
        .expect("gradients are reduced");
    assert_eq!(
        dp.bytes, dp.floor_bytes,
        "the tree sends as little as possible"
    );
    assert!(
        trace.summary().contains("524288 chips (dp=65536,tp=8)"),
        "{}",
        trace.summary()
    );
}
