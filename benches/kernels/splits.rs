//! The step of a model of characters (6 layers of 384, 16 sequences of 256 in all) on one chip with two threads, and on meshes
//! whose chips have one thread each: all in turn, so that what else runs on the machine meets each of them alike.

use std::collections::BTreeMap;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use supernode::model::{Config, Transformer};
use supernode::random::Stream;
use supernode::train::data::{Alphabet, Batches, Split, Tokens};
use supernode::train::{Options, Report, Training};
use supernode::{Device, Mesh, World};

const ROUNDS: usize = 5;
/// Steps of a round; the first is not timed.
const STEPS: u64 = 3;
const ROWS: usize = 16;
const CONTEXT: usize = 256;
const CHARACTERS: u64 = 65;

/// Meshes, and the share of one chip's speed that each is to reach.
const MESHES: [(&str, f64); 5] = [
    ("dp=2", 1.0),
    ("dp=4", 0.97),
    ("tp=2", 0.9),
    ("fsdp=2", 0.95),
    ("pp=2", 0.0),
];

fn training(mesh: &Mesh) -> Training {
    let stream = Stream::new(0, "text");
    let letter = |i| b'0' + stream.below(i, CHARACTERS) as u8;
    let text: Vec<u8> = (0..1 << 16).map(letter).collect();
    let tokens = Tokens::from_text(&text, Alphabet::Bytes, "random").expect("a text");
    let split = Split::new(tokens.len(), 1.0).expect("all of it");
    let batches = Batches::new(Arc::new(tokens), split, CONTEXT, ROWS, 0).expect("a long text");
    let config = Config::gpt2(6, 384, 6, 256, CONTEXT);
    Training {
        model: Transformer::new(config, mesh).expect("a mesh that divides it"),
        batches,
        options: Options {
            steps: STEPS,
            ..Options::default()
        },
    }
}

/// Milliseconds of the steps but the first, which must learn.
fn round(mesh: &Mesh, threads: usize) -> Vec<f64> {
    let times = Mutex::new(Vec::new());
    let observe = |report: &Report| {
        if let Report::Step { ms, loss, .. } = report {
            times.lock().expect("no panic").push((*ms, *loss));
        }
    };
    let world = World::threads(mesh, Device::cpu()).expect("a small mesh");
    let world = world.with_threads(threads);
    let run = training(mesh).run(&world, &observe, &AtomicBool::new(false));
    run.unwrap_or_else(|e| panic!("{mesh}: {e}"));
    let times = times.into_inner().expect("no panic");
    let (first, last) = (times[0].1, times[times.len() - 1].1);
    assert!(last < first, "{mesh}: the loss went from {first} to {last}");
    times[1..].iter().map(|(ms, _)| *ms).collect()
}

fn median(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// The table, of the meshes named or of all.
pub(crate) fn table(wanted: &[String]) {
    let single = Mesh::single();
    let named = |name: &str| wanted.is_empty() || wanted.iter().any(|w| w == name);
    let meshes: Vec<_> = MESHES.into_iter().filter(|(name, _)| named(name)).collect();
    let mut times: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    for _ in 0..ROUNDS {
        times
            .entry("one chip")
            .or_default()
            .extend(round(&single, 2));
        for (name, _) in &meshes {
            let mesh = Mesh::parse(name).expect("a mesh");
            times.entry(name).or_default().extend(round(&mesh, 1));
        }
    }
    let one = median(times.get_mut("one chip").expect("it ran"));
    println!("{:<12}{:>10}{:>10}{:>8}", "mesh", "ms", "speed", "bar");
    println!("{:<12}{one:>10.1}{:>10.2}", "one chip", 1.0);
    for (name, bar) in meshes {
        let ms = median(times.get_mut(name).expect("it ran"));
        println!("{name:<12}{ms:>10.1}{:>10.2}{bar:>8.2}", one / ms);
    }
}
