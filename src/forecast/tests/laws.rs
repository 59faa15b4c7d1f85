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
        .contains("104 chunks")
    );
    assert!(
        why(Setting {
            global_batch: 60,
            ..good.clone()
        })
        .contains("pp=8")
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

#[test]
fn a_plan_fits_and_is_sorted() {
    let search = Search {
        model: model_named("megatron-22b").unwrap(),
        chips: 16,
        global_batch: 32,
        context: 2048,
        dtype: "bf16".into(),
    };
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
