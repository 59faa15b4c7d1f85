//! Latent attention on every kind of mesh: losses, gradients and traces are those of one chip.

use super::gradients;
use super::splits::{Case, agree, cuts};
use crate::tiny::{latent, training};
use supernode::World;
use supernode::mesh::Mesh;
use supernode::model::{Config, ContextMethod, Latent, Transformer};

const CASES: [Case; 11] = [
    ("tp=2", None, false),
    ("tp=4", None, true),
    ("cp=2", None, false),
    ("dp=2", Some(1), false),
    ("fsdp=2", None, false),
    ("dp=2,tp=2", None, true),
    ("tp=2,cp=2", None, true),
    ("fsdp=2,tp=2", None, false),
    ("fsdp=2,cp=2,tp=2", None, true),
    ("dp=2,cp=2,tp=2", Some(2), false),
    ("dp=2,fsdp=2,cp=2,tp=2", None, true),
];

/// With a latent for queries and without, and with values as large as keys.
fn models() -> [(&'static str, Config); 2] {
    let sizes = latent().latent.expect("it has one");
    let plain = Latent {
        q_rank: None,
        v_dim: 6,
        ..sizes
    };
    let straight = Config {
        latent: Some(plain),
        ..latent()
    };
    [("latent", latent()), ("without a query latent", straight)]
}

#[test]
fn latent_attention_does_not_depend_on_the_mesh() {
    for (name, config) in models() {
        agree(name, &training(config, 8, 10), &CASES, 1e-5);
    }
}

#[test]
fn gathered_gradients_are_those_of_one_chip() {
    for (name, config) in models() {
        let batch = |rows, steps| training(config.clone(), rows, steps);
        gradients::agree(name, &batch, cuts(CASES));
    }
}

#[test]
fn parameters_are_counted() {
    for (name, config) in models() {
        let layout = training(config.clone(), 8, 1).layout(&World::ghost(&Mesh::single()));
        let count = layout.expect("a layout").kept_bytes(0).0 / 4;
        assert_eq!(count, config.parameters(), "{name}");
    }
}

#[test]
fn impossible_sizes_say_what_stands_in_the_way() {
    let sizes = latent().latent.expect("it has one");
    let with = |latent: Latent| Config {
        latent: Some(latent),
        ..crate::tiny::latent()
    };
    let learned = Config {
        latent: Some(sizes),
        ..crate::tiny::gpt2()
    };
    let cases: [(Config, &str, &[&str]); 5] = [
        (with(sizes), "tp=3", &["tp=3", "8 heads", "tp=2 does"]),
        (
            with(sizes),
            "tp=4,cp=4",
            &["cp=4", "the 2 heads", "tp=4", "cp=2 does"],
        ),
        (
            with(Latent {
                rope_dim: 3,
                ..sizes
            }),
            "single",
            &["rope-head-dim 3", "4 is even"],
        ),
        (
            with(Latent { v_dim: 7, ..sizes }),
            "single",
            &["values of 7", "heads of 6"],
        ),
        (learned, "single", &["rotary", "learned"]),
    ];
    for (config, mesh, parts) in cases {
        let mesh = Mesh::parse(mesh).expect("a mesh");
        let model = Transformer::new(config, &mesh);
        let ulysses = |m: Transformer| m.with_context_method(Some(ContextMethod::Ulysses));
        let checked = model.and_then(|model| ulysses(model).check(&mesh));
        let message = checked.expect_err("refused").to_string();
        for part in parts {
            assert!(message.contains(part), "'{part}' is missing in: {message}");
        }
    }
}
