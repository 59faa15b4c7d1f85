//! The published tables that were looked at while this was written.

use super::*;

/// Korthikanti et al. 2022 (arXiv:2205.05198), table 5: model, sizes, seconds the old way and the new.
pub(super) const KORTHIKANTI: [(&str, [usize; 5], f64, f64); 4] = [
    ("megatron-22b", [1, 1, 4, 4, 1], 1.42, 1.10),
    ("gpt3-175b", [8, 1, 64, 1, 3], 18.13, 13.75),
    ("megatron-530b", [35, 1, 280, 1, 3], 49.05, 37.83),
    ("megatron-1t", [64, 1, 512, 1, 1], 94.42, 71.49),
];

#[test]
fn korthikantis_steps() {
    let machine = a100();
    let (mut errors, mut inside) = (vec![], 0);
    for (model, sizes, old, new) in KORTHIKANTI {
        for (is_new, truth) in [(false, old), (true, new)] {
            let forecast = megatron(model, sizes, is_new).price(&machine).unwrap();
            let (low, high) = megatron(model, sizes, is_new).interval(&machine).unwrap();
            inside += (low <= truth && truth <= high) as usize;
            let error = forecast.step_seconds / truth - 1.0;
            println!(
                "{model} new={is_new}: {:.2} s, was {truth} s, {:+.1} %",
                forecast.step_seconds,
                error * 100.0
            );
            errors.push(error.abs());
        }
    }
    errors.sort_by(f64::total_cmp);
    let mean = errors.iter().sum::<f64>() / errors.len() as f64;
    println!(
        "mean {mean:.4}, median {:.4}, worst {:.4}, {inside} of 8 inside the interval",
        errors[4], errors[7]
    );
    assert!(mean <= 0.04, "mean error {mean}");
    assert!(errors[7] <= 0.08, "worst error {}", errors[7]);
    assert!(inside >= 7, "{inside} of 8 inside the interval");
}

/// Table 4 of the same paper: forward and backward of a 22B layer, in milliseconds.
#[test]
fn korthikantis_layers() {
    let machine = a100();
    for (recompute, sequence_parallel, forward, backward) in [
        (Recompute::None, false, 7.7, 11.9),
        (Recompute::None, true, 7.2, 11.8),
        (Recompute::Full, false, 7.7, 19.5),
        (Recompute::Selective, false, 7.7, 13.2),
        (Recompute::Selective, true, 7.2, 13.1),
    ] {
        let old = megatron("megatron-22b", [1, 1, 4, 4, 1], false);
        let setting = Setting {
            recompute,
            sequence_parallel,
            ..old
        };
        let (f, b) = setting.layer_seconds(&machine).unwrap();
        let error = (f + b) / ((forward + backward) * 1e-3) - 1.0;
        println!(
            "{recompute:?} {sequence_parallel}: {:.2} + {:.2} ms, was {forward} + {backward}, {:+.1} %",
            f * 1e3,
            b * 1e3,
            error * 100.0
        );
        assert!(
            error.abs() <= 0.06,
            "{recompute:?} {sequence_parallel}: {error}"
        );
    }
}

/// Figure 1 of the same paper, the activations of the new way in GiB.
#[test]
fn korthikantis_activations() {
    for ((model, sizes, ..), gib) in KORTHIKANTI.into_iter().zip([9.6, 12.4, 23.1, 26.6]) {
        let memory = megatron(model, sizes, true).memory(&a100()).unwrap();
        let kept = memory.activations / (1u64 << 30) as f64;
        println!("{model}: {kept:.1} GiB, was {gib}");
        assert!(
            (kept / gib - 1.0).abs() <= 0.1,
            "{model}: {kept} GiB, was {gib}"
        );
    }
}

/// MegaScale (arXiv:2402.15627), table 2, the column of Megatron: chips, sequences, seconds.
pub(super) const MEGASCALE: [(usize, usize, f64); 8] = [
    (256, 768, 40.0),
    (512, 768, 21.2),
    (768, 768, 15.2),
    (1024, 768, 11.9),
    (3072, 6144, 29.02),
    (6144, 6144, 14.78),
    (8192, 6144, 12.24),
    (12288, 6144, 8.57),
];

/// Llama 3 (arXiv:2407.21783), table 4, 8K tokens: chips, TFLOP/s a chip.
pub(super) const LLAMA: [(usize, f64); 2] = [(8192, 430.0), (16384, 400.0)];

/// MegaScale's column of Megatron (arXiv:2402.15627, table 2) and Llama 3 (arXiv:2407.21783, table 4). Printed: their settings are not
/// stated in full, so each row is a range over chunks, recomputation and ZeRO stage.
#[test]
fn published_rows_with_ranges() {
    let mut rows = vec![];
    for (chips, batch, truth) in MEGASCALE {
        let dp = chips / 64;
        rows.push((
            "dgx-a100",
            "gpt3-175b",
            [8, dp, batch],
            truth,
            format!("MegaScale's Megatron, {chips} chips"),
        ));
    }
    for (chips, tflops) in LLAMA {
        let setting = megatron("llama3-405b", [16, chips / 128, 2048, 1, 1], true);
        let flops = Setting {
            context: 8192,
            ..setting
        }
        .price(&Machine::named("dgx-h100").unwrap())
        .unwrap()
        .model_flops;
        let truth = flops / (tflops * 1e12 * chips as f64);
        rows.push((
            "dgx-h100",
            "llama3-405b",
            [16, chips / 128, 2048],
            truth,
            format!("Llama 3, {chips} chips"),
        ));
    }
    for (machine, model, [pp, dp, batch], truth, name) in rows {
        let llama = model == "llama3-405b";
        let machine = Machine::named(machine).unwrap();
        let (mut low, mut high) = (f64::INFINITY, 0.0f64);
        for chunks in [1, 2, 3, 4, 6, 8] {
            for recompute in [Recompute::None, Recompute::Selective] {
                let setting = megatron(model, [pp, dp, batch, 1, chunks], true);
                let context = if llama { 8192 } else { 2048 };
                let zero = llama as u8;
                let setting = Setting {
                    recompute,
                    context,
                    zero,
                    ..setting
                };
                if let Ok(f) = setting.price(&machine) {
                    let (l, h) = (f.step_seconds, f.step_seconds);
                    (low, high) = (low.min(l), high.max(h));
                }
            }
        }
        println!("{name}: {low:.2} to {high:.2} s, was {truth:.2} s");
        assert!(high > 0.0, "{name}: no setting was priced");
        assert!(
            low <= truth * 1.1 && truth <= high * 1.1,
            "{name}: {truth} is far from {low} to {high}"
        );
    }
}
