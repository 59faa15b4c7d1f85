//! One test that prints every table: `cargo test --lib -- --nocapture every_table`.

use super::*;

/// A row: what it is, seconds said with their interval, seconds measured.
struct Row {
    name: String,
    said: f64,
    interval: (f64, f64),
    truth: f64,
}

/// Prints rows and what they amount to; returns mean and worst error, and the share inside the intervals.
fn summary(title: &str, rows: &[Row]) -> (f64, f64, f64) {
    println!("{title}");
    let mut errors = vec![];
    let mut inside = 0;
    for r in rows {
        let error = r.said / r.truth - 1.0;
        let within = r.interval.0 <= r.truth && r.truth <= r.interval.1;
        inside += within as usize;
        errors.push(error.abs());
        println!(
            "  {:<34} {:>10.4} s ({:.4} to {:.4}), was {:.4}, {:+.1} %{}",
            r.name,
            r.said,
            r.interval.0,
            r.interval.1,
            r.truth,
            100.0 * error,
            if within { "" } else { ", outside" }
        );
    }
    errors.sort_by(f64::total_cmp);
    let mean = errors.iter().sum::<f64>() / errors.len() as f64;
    let (median, worst) = (errors[errors.len() / 2], errors[errors.len() - 1]);
    let share = inside as f64 / rows.len() as f64;
    println!(
        "  mean {:.1} %, median {:.1} %, worst {:.1} %, {:.0} % inside the interval",
        100.0 * mean,
        100.0 * median,
        100.0 * worst,
        100.0 * share
    );
    (mean, worst, share)
}

fn row(name: String, setting: &Setting, machine: &Machine, truth: f64) -> Row {
    Row {
        name,
        said: setting.price(machine).unwrap().step_seconds,
        interval: setting.interval(machine).unwrap(),
        truth,
    }
}

fn korthikanti() -> Vec<Row> {
    let machine = a100();
    let mut rows = vec![];
    for (model, sizes, old, new) in published::KORTHIKANTI {
        for (is_new, truth) in [(false, old), (true, new)] {
            let setting = megatron(model, sizes, is_new);
            rows.push(row(
                format!("{model}, new {is_new}"),
                &setting,
                &machine,
                truth,
            ));
        }
    }
    // With gradients over dp=8, not overlapped.
    let setting = megatron("megatron-530b", [35, 8, 2240, 1, 3], true);
    rows.push(row("megatron-530b, dp 8".into(), &setting, &machine, 39.15));
    rows
}

/// Six chunks a stage, as the paper's notes have it; the rest by default.
fn megascale() -> Vec<Row> {
    let rows = published::MEGASCALE.iter();
    rows.map(|(chips, batch, truth)| {
        let setting = megatron("gpt3-175b", [8, chips / 64, *batch, 1, 6], true);
        row(format!("{chips} chips"), &setting, &a100(), *truth)
    })
    .collect()
}

/// Chunks of two layers, as nothing is said.
fn llama() -> Vec<Row> {
    let machine = Machine::named("dgx-h100").unwrap();
    let rows = published::LLAMA.iter();
    rows.map(|(chips, tflops)| {
        let setting = Setting {
            context: 8192,
            zero: 1,
            recompute: Recompute::None,
            ..megatron("llama3-405b", [16, chips / 128, 2048, 1, 4], true)
        };
        let flops = setting.price(&machine).unwrap().model_flops;
        let truth = flops / (tflops * 1e12 * *chips as f64);
        row(format!("{chips} chips"), &setting, &machine, truth)
    })
    .collect()
}

#[test]
fn every_table() {
    let (mean, worst, share) = summary("Korthikanti et al. 2022, table 5", &korthikanti());
    assert!(mean <= 0.04 && worst <= 0.08, "{mean} {worst}");
    let (_, _, other) = summary("MegaScale, Megatron's column, six chunks", &megascale());
    let (_, _, last) = summary("Llama 3 405B, 8K tokens, four chunks", &llama());
    let all = (9.0 * share + 8.0 * other + 2.0 * last) / 19.0;
    println!("{:.0} % of all rows inside the 80 % interval", 100.0 * all);
    assert!(all >= 0.7, "{all}");
}
