//! What holds on every machine.

use super::*;
use crate::collective::{Algorithm, Counts, Kind, schedule};

#[test]
fn a_slower_machine_is_never_faster() {
    let setting = megatron("gpt3-175b", [8, 2, 128, 1, 3], true);
    let base = setting.price(&a100()).unwrap().step_seconds;
    for (field, value) in [
        ("level.node.bandwidth", "1e11"),
        ("level.fabric.bandwidth", "5e9"),
        ("level.fabric.latency", "1e-3"),
        ("memory.bandwidth", "1e12"),
        ("matmul.bf16", "1e14"),
        ("stack.launch", "1e-4"),
        ("stack.interference", "0.5"),
    ] {
        let mut machine = a100();
        machine.set(field, value).unwrap();
        let slower = setting.price(&machine).unwrap().step_seconds;
        assert!(slower >= base, "{field}={value}: {slower} below {base}");
    }
}

#[test]
fn nothing_is_below_the_floor() {
    for name in Machine::names() {
        let machine = Machine::named(name).unwrap();
        let Ok(rates) = Rates::of(&machine, "bf16") else {
            continue;
        };
        for n in [1, 7, 64, 100, 1000, 4096, 20000] {
            for k in [1, 64, 1000, 8192] {
                let work = Work::matmul(n, n, k);
                let (floor, price) = (rates.floor(&work), rates.seconds(&work));
                assert!(price >= floor, "{name} {n} {k}: {price} below {floor}");
            }
        }
    }
    let f = megatron("gpt3-175b", [8, 1, 64, 1, 3], true)
        .price(&a100())
        .unwrap();
    assert!(f.step_seconds >= f.model_flops / (64.0 * 312e12));
}

/// The closed form is what walking the executor's own lists gives: for a ring exactly, for halving with a power of two.
#[test]
fn the_closed_form_is_the_lists() {
    let (latency, bandwidth, size) = (2e-6, 1e11, 4.0);
    for n in [2usize, 4, 8, 16] {
        let len = 1 << 20;
        for kind in [Kind::AllReduce, Kind::ReduceScatter, Kind::AllGather] {
            let time = |algorithm| {
                let lists: Vec<_> = (0..n)
                    .map(|i| schedule(kind, algorithm, &Counts::Len(len), n, i))
                    .collect();
                walk(&lists, size, latency, bandwidth)
            };
            let walked = time(Algorithm::Ring).min(time(Algorithm::Recursive));
            let formula = closed_form(kind, n, size * len as f64, latency, bandwidth);
            assert!(
                (walked / formula - 1.0).abs() <= 1e-9,
                "{kind} {n}: {walked} and {formula}"
            );
        }
    }
}

#[test]
fn mistakes_say_what_would_do() {
    let good = megatron("gpt3-175b", [8, 1, 64, 1, 3], true);
    let why = |s: Setting| s.price(&a100()).unwrap_err().to_string();
    assert!(
        why(Setting {
            global_batch: 63,
            micro_batch: 2,
            ..good.clone()
        })
        .contains("63")
    );
    assert!(
        why(Setting {
            virtual_stages: 13,
            ..good.clone()
        })
        .contains("104 parts")
    );
    assert!(
        why(Setting {
            dtype: "fp8".into(),
            ..good.clone()
        })
        .contains("does not have it")
    );
    let mesh = Mesh::new([("ep", 2), ("tp", 8)]);
    assert!(
        why(Setting {
            mesh,
            ..good.clone()
        })
        .contains("the model has none")
    );
    let mesh = Mesh::new([("up", 2), ("tp", 8)]);
    assert!(why(Setting { mesh, ..good }).contains("'up'"));
}

fn on_16_chips() -> Search {
    Search {
        model: model_named("megatron-22b").unwrap(),
        chips: 16,
        global_batch: 32,
        context: 2048,
        dtype: "bf16".into(),
    }
}

#[test]
fn a_plan_fits_and_is_sorted() {
    let search = on_16_chips();
    let found = search
        .run(&a100(), search.candidates(), 5, &Default::default())
        .unwrap();
    assert!(found.too_large > 0 && found.best.len() == 5);
    let capacity = a100().chip.value("memory.capacity").unwrap();
    assert!(found.best.iter().all(|(_, f)| f.memory.total() <= capacity));
    assert!(
        found
            .best
            .windows(2)
            .all(|w| w[0].1.step_seconds <= w[1].1.step_seconds)
    );
    let tiny = Search { chips: 1, ..search };
    let why = tiny
        .run(&a100(), tiny.candidates(), 5, &Default::default())
        .unwrap_err()
        .to_string();
    assert!(why.contains("none of"), "{why}");
}

/// Products beside the transfers of sequence parallelism are among the candidates where the program runs them, and the plan takes them
/// where they are faster: over slow links.
#[test]
fn a_plan_tries_products_beside_transfers() {
    let search = on_16_chips();
    let (beside, whole): (Vec<Setting>, Vec<Setting>) = search
        .candidates()
        .into_iter()
        .partition(|s| s.collective_matmul);
    assert!(!beside.is_empty());
    for s in &beside {
        let sizes = ["tp", "cp"].map(|axis| s.mesh.size_of(axis));
        assert!(
            sizes[0] > 1 && sizes[1] == 1 && s.sequence_parallel,
            "{}",
            s.mesh
        );
    }
    let mut slow = a100();
    slow.set("level.node.bandwidth", "50e9").unwrap();
    let best = |candidates: &[Setting]| {
        let found = search.run(&slow, candidates.to_vec(), 1, &Default::default());
        found.unwrap().best.remove(0)
    };
    let all = [beside, whole.clone()].concat();
    let (with, without) = (best(&all), best(&whole));
    assert!(with.0.collective_matmul, "{}", with.0.mesh);
    assert!(with.1.step_seconds < without.1.step_seconds);
}

/// The order in which axes are named does not matter, nor axes of one chip; only their placement does.
#[test]
fn names_of_ranks_do_not_matter() {
    let base = megatron("gpt3-175b", [8, 4, 128, 1, 3], true);
    let step = |axes: &[(&str, usize)]| {
        let mesh = Mesh::new(axes.iter().copied());
        let setting = Setting {
            mesh,
            ..base.clone()
        };
        setting.price(&a100()).unwrap().step_seconds
    };
    let plain = step(&[("pp", 8), ("dp", 4), ("tp", 8)]);
    for axes in [
        &[
            ("pp", 8),
            ("dp", 4),
            ("fsdp", 1),
            ("ep", 1),
            ("cp", 1),
            ("tp", 8),
        ][..],
        &[("cp", 1), ("pp", 8), ("ep", 1), ("dp", 4), ("tp", 8)],
    ] {
        assert_eq!(step(axes).to_bits(), plain.to_bits(), "{axes:?}");
    }
    // A placement that takes tp off the fast links is no renaming.
    assert!(step(&[("tp", 8), ("pp", 8), ("dp", 4)]) > plain);
    // On one level every placement is a renaming.
    let mut flat = Machine::named("cloudmatrix-384").unwrap();
    flat.set("level.node.latency", "2e-6").unwrap();
    flat.set("level.pod.latency", "2e-6").unwrap();
    let network = Network::of(&flat).unwrap();
    let over = |mesh: &Mesh, axis: &str| {
        let work = Work::Message {
            axis: axis.into(),
            bytes: 1e6,
        };
        network.seconds(mesh, &work).unwrap()
    };
    let (a, b) = (
        Mesh::new([("dp", 4), ("tp", 8)]),
        Mesh::new([("tp", 8), ("dp", 4)]),
    );
    for axis in ["dp", "tp"] {
        assert!(
            (over(&a, axis) / over(&b, axis) - 1.0).abs() <= 1e-12,
            "{axis}"
        );
    }
}

/// More bytes, more chips at the same bytes a chip, and slower links never take less time.
#[test]
fn the_network_is_monotone() {
    for name in Machine::names() {
        let machine = Machine::named(name).unwrap();
        let network = Network::of(&machine).unwrap();
        let level = machine.levels().unwrap().remove(0).name;
        let mut slow = machine.clone();
        let field = format!("level.{level}.bandwidth");
        let half = machine.system.value(&field).unwrap() / 2.0;
        slow.set(&field, &half.to_string()).unwrap();
        let slow = Network::of(&slow).unwrap();
        for kind in [
            Kind::AllReduce,
            Kind::AllGather,
            Kind::ReduceScatter,
            Kind::AllToAll,
        ] {
            for n in [2, 4, 8, 16, 64] {
                let mut before = 0.0;
                for bytes in [1e3, 1e5, 1e6, 3e7, 1e9] {
                    let seconds = network.collective(kind, n, 1, bytes).unwrap();
                    assert!(
                        seconds >= before,
                        "{name} {kind} {n} {bytes}: {seconds} below {before}"
                    );
                    let slower = slow.collective(kind, n, 1, bytes).unwrap();
                    assert!(
                        slower >= seconds,
                        "{name} {kind} {n} {bytes}: {slower} below {seconds}"
                    );
                    before = seconds;
                }
            }
        }
    }
}
