//! Every example prints what its header says, and its program does on a ghost what it does on real chips, event by event.

#![allow(dead_code, unreachable_pub)] // Each example has a `main` of its own.

use std::sync::atomic::AtomicBool;
use supernode::mesh::Mesh;
use supernode::spmd::{Chip, Device, World};

#[path = "../examples/all_reduce.rs"]
mod all_reduce;
#[path = "../examples/attention.rs"]
mod attention;
#[path = "../examples/matmul.rs"]
mod matmul;
#[path = "../examples/own_op.rs"]
mod own_op;
#[path = "../examples/sharded_matmul.rs"]
mod sharded_matmul;
#[path = "../examples/train_step.rs"]
mod train_step;

/// The text block of a header.
fn promised(source: &str) -> String {
    let header = source.lines().take_while(|line| line.starts_with("//!"));
    let block = header
        .skip_while(|line| *line != "//! ```text")
        .skip(1)
        .take_while(|line| *line != "//! ```");
    let text: Vec<&str> = block
        .map(|line| line.trim_start_matches("//!"))
        .map(|line| line.strip_prefix(' ').unwrap_or(line).trim_end())
        .collect();
    assert!(!text.is_empty(), "the header has no text block");
    text.join("\n")
}

fn check_output(source: &str, printed: String) {
    let lines: Vec<&str> = printed.lines().map(str::trim_end).collect();
    assert_eq!(lines.join("\n").trim_end(), promised(source));
}

fn check_traces<T: Send>(axes: &[(&str, usize)], program: impl Fn(&Chip) -> T + Sync) {
    let mesh = Mesh::new(axes.iter().copied());
    let world = World::threads(&mesh, Device::cpu()).expect("a small mesh");
    let run = world.with_threads(1).run(&program).expect("the run");
    let ghost = World::ghost(&mesh).trace(&program).expect("the trace");
    assert!(
        ghost.chip(0).events().count() > 0,
        "a program does something"
    );
    assert_eq!(run.trace().difference(&ghost), None, "on {mesh}");
    assert_eq!(run.pool_peaks(), ghost.peak_bytes(), "on {mesh}");
}

#[test]
fn matmul_prints_what_its_header_says() {
    check_output(
        include_str!("../examples/matmul.rs"),
        matmul::report().unwrap(),
    );
    check_traces(&[], matmul::program);
}

#[test]
fn attention_prints_what_its_header_says() {
    check_output(
        include_str!("../examples/attention.rs"),
        attention::report().unwrap(),
    );
    check_traces(&[("tp", 2)], attention::program);
}

#[test]
fn all_reduce_prints_what_its_header_says() {
    check_output(
        include_str!("../examples/all_reduce.rs"),
        all_reduce::report().unwrap(),
    );
    check_traces(&[("dp", 4)], all_reduce::program);
    check_traces(&[("dp", 3)], all_reduce::program);
}

#[test]
fn sharded_matmul_prints_what_its_header_says() {
    check_output(
        include_str!("../examples/sharded_matmul.rs"),
        sharded_matmul::report().unwrap(),
    );
    // The shares of a Sharded stay on their chip: what the program returns is dropped there.
    check_traces(&[("dp", 2), ("tp", 2)], |chip| {
        drop(sharded_matmul::program(chip))
    });
    check_traces(&[("dp", 3), ("tp", 1)], |chip| {
        drop(sharded_matmul::program(chip))
    });
}

#[test]
fn own_op_prints_what_its_header_says() {
    check_output(
        include_str!("../examples/own_op.rs"),
        own_op::report().unwrap(),
    );
    check_traces(&[("dp", 2), ("tp", 3)], own_op::program);
    let world = World::threads(&Mesh::single(), Device::cpu()).unwrap();
    let run = world.run(own_op::program).unwrap();
    let squares = |c: usize| {
        (0..4)
            .map(|b| (6 * b + c) as f32)
            .map(|x| 2.0 * x * x)
            .sum::<f32>()
    };
    let ds = run.outputs()[0].as_ref().expect("a real chip");
    assert!(ds.iter().enumerate().all(|(c, &x)| x == squares(c)), "{ds}");
}

#[test]
fn train_step_learns_alike_on_four_chips_and_on_one() {
    let (four, one) = (Mesh::new([("dp", 2), ("tp", 2)]), Mesh::single());
    let losses = |mesh: &Mesh| {
        let training = train_step::training(mesh, 4, 3).unwrap();
        train_step::train(mesh, &training, false).unwrap()
    };
    let ((a, run), (b, _)) = (losses(&four), losses(&one));
    assert_eq!((a.len(), b.len()), (4, 4));
    let difference = train_step::difference(&a, &b);
    assert!(difference <= 1e-5, "{a:?} against {b:?}");
    assert!(a[3] < a[0], "{a:?} falls");
    assert_eq!(
        run.outputs()[0].sample.len(),
        4,
        "a first token and three drawn ones"
    );
}

#[test]
fn train_step_is_the_same_on_a_ghost() {
    let mesh = Mesh::new([("dp", 2), ("tp", 2)]);
    let training = train_step::training(&mesh, 1, 0).unwrap();
    let world = World::threads(&mesh, Device::cpu()).unwrap();
    let run = training
        .run(&world, &|_| (), &AtomicBool::new(false))
        .unwrap();
    let ghost = training.trace(&World::ghost(&mesh)).unwrap();
    assert_eq!(run.trace().difference(&ghost), None);
    assert_eq!(run.pool_peaks(), ghost.peak_bytes());
}

/// The program that the README shows is the example's, but for indentation.
#[test]
fn the_readme_shows_the_sharded_matmul() {
    let words = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
    let source = include_str!("../examples/sharded_matmul.rs");
    let from = source
        .find("pub fn program")
        .expect("the example's program");
    let program = &source[from..from + source[from..].find("\n}\n").expect("its end") + 2];
    let readme = words(include_str!("../README.md"));
    assert!(
        readme.contains(&words(program)),
        "README.md does not hold\n{program}"
    );
}
