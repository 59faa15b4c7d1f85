//! burn's wgpu backend and this crate's chip on one adapter, in turn, in one process.
//!
//! Every timing ends with a read: burn records work lazily and this crate submits it in batches, so only what has come back is
//! done. Both sides compute the same sizes in f32; products are checked against sums in f64, and both models must begin near the
//! loss of even odds and fall on their one batch. Prints medians, and the ratio. `PRODUCTS` and `STEPS` are rounds, 0 for none;
//! burn compiles and chooses among kernels in its first steps, for a minute on a software adapter: with `WAIT=1` timing begins
//! with a line on the standard input after "warm" was printed.

#![recursion_limit = "512"]

mod gpt;
/// The model in this crate, as `supernode bench` trains it.
#[path = "../../../src/cli/bench/trainer.rs"]
mod trainer;

use burn::tensor::{Device, DeviceKind, Tensor, TensorData};
use std::time::Instant;
use supernode::DType;
use supernode::mesh::Mesh;
use supernode::model::Config;
use supernode::placement::Placement::Replicate;
use supernode::random::Stream;
use supernode::spmd::{Chip, Device as Kind, FromIndex, World};

/// Layers, width, heads, vocabulary, tokens of a sequence, sequences.
pub(crate) const CHAR_6X384: [usize; 6] = [6, 384, 6, 256, 256, 1];

const WARM: usize = 3;

fn main() {
    let rounds = |name: &str, default: usize| {
        let found = std::env::var(name).ok();
        found.map_or(default, |text| text.parse().expect(name))
    };
    let (products, steps) = (rounds("PRODUCTS", 15), rounds("STEPS", 9));
    let world = World::threads(&Mesh::single(), Kind::gpu(0)).expect("an adapter");
    let run = world.run(|chip| {
        // A software adapter counts as a processor; there is one adapter for both sides, or the comparison is none.
        let device = Device::wgpu(match std::env::var("BURN_DEVICE").as_deref() {
            Ok("discrete") => DeviceKind::DiscreteGpu(0),
            Ok("integrated") => DeviceKind::IntegratedGpu(0),
            _ => DeviceKind::Cpu,
        });
        for n in [256, 512, 1024] {
            if products > 0 {
                matmul(chip, &device, n, products);
            }
        }
        if steps > 0 {
            step(chip, &device, steps);
        }
    });
    run.expect("both sides ran");
}

/// Medians of two kinds of run that take turns, after a few that warm up.
fn in_turn(rounds: usize, mut one: impl FnMut(), mut other: impl FnMut()) -> [f64; 2] {
    let mut seconds = [vec![], vec![]];
    for round in 0..WARM + rounds {
        if round == WARM && std::env::var_os("WAIT").is_some() {
            eprintln!("warm");
            std::io::stdin()
                .read_line(&mut String::new())
                .expect("a line");
        }
        let runs: [&mut dyn FnMut(); 2] = [&mut one, &mut other];
        for (run, seconds) in runs.into_iter().zip(&mut seconds) {
            let began = Instant::now();
            run();
            if round >= WARM {
                seconds.push(began.elapsed().as_secs_f64());
            }
        }
    }
    seconds.map(|mut s| {
        s.sort_by(f64::total_cmp);
        s[s.len() / 2]
    })
}

fn matmul(chip: &Chip, device: &Device, n: usize, rounds: usize) {
    let numbers = ["a", "b"].map(|name| Stream::new(0, name));
    let [a, b] = [0, 1].map(|side| -> Vec<f32> {
        (0..(n * n) as u64)
            .map(|i| numbers[side].normal(i))
            .collect()
    });
    let [x, y] = [(0, "a"), (1, "b")].map(|(side, name)| {
        let contents = FromIndex(|i| numbers[side].normal(i));
        chip.input(name, [n, n], [Replicate; 0], &contents)
    });
    let [p, q] =
        [&a, &b].map(|v| Tensor::<2>::from_data(TensorData::new(v.clone(), [n, n]), device));
    let (mut mine, mut theirs) = (vec![], vec![]);
    let [ours, burn] = in_turn(
        rounds,
        || {
            mine = x
                .matmul(&y)
                .read()
                .expect("a real chip has contents")
                .into_raw_vec_and_offset()
                .0
        },
        || {
            theirs = p
                .clone()
                .matmul(q.clone())
                .into_data()
                .try_to_vec()
                .expect("f32")
        },
    );
    for (side, got) in [("supernode", &mine), ("burn", &theirs)] {
        check(side, n, &a, &b, got);
    }
    let rate = |seconds: f64| 2e-9 * (n as f64).powi(3) / seconds;
    println!(
        "matmul {n}^3, GFLOP/s: supernode {:.1}, burn {:.1}, ratio {:.2}",
        rate(ours),
        rate(burn),
        burn / ours
    );
}

/// Elements on a diagonal against sums in f64, within `n u |a| |b|`.
fn check(side: &str, n: usize, a: &[f32], b: &[f32], got: &[f32]) {
    for i in (0..n).step_by(7) {
        let j = (3 * i + 1) % n;
        let terms = (0..n).map(|k| f64::from(a[i * n + k]) * f64::from(b[k * n + j]));
        let (sum, size) = terms.fold((0.0, 0.0), |(s, t), x| (s + x, t + x.abs()));
        let bound = n as f64 * f64::from(f32::EPSILON) * size;
        let error = (f64::from(got[i * n + j]) - sum).abs();
        assert!(
            error <= bound,
            "{side} {n}: [{i}, {j}] is off by {error}, bound {bound}"
        );
    }
}

fn step(chip: &Chip, device: &Device, rounds: usize) {
    let [layers, width, heads, vocab, tokens, rows] = CHAR_6X384;
    let [ids, labels] = trainer::random_tokens([rows, tokens], vocab);
    let config = Config::gpt2(layers, width, heads, vocab, tokens);
    let mut mine = trainer::Trainer::new(chip, config, DType::F32, [rows, tokens]);
    let mut theirs = gpt::Trainer::new(&device.clone().autodiff(), &ids, &labels);
    let (mut a, mut b) = (vec![], vec![]);
    let [ours, burn] = in_turn(rounds, || a.push(mine.step()), || b.push(theirs.step()));
    let even = (vocab as f64).ln();
    for (side, losses) in [("supernode", &a), ("burn", &b)] {
        let (first, last) = (losses[0], losses[losses.len() - 1]);
        assert!(
            (first - even).abs() <= 1.5,
            "{side} begins at {first}, even odds are {even}"
        );
        assert!(last < first, "{side} goes from {first} to {last}");
        println!("{side}: loss {first:.3} to {last:.3}");
    }
    println!(
        "step of {layers} x {width}, {heads} heads, {rows} x {tokens} tokens, ms: supernode {:.1}, burn {:.1}, ratio {:.2}",
        1e3 * ours,
        1e3 * burn,
        burn / ours
    );
}
