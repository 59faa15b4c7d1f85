//! Measured curves, held against the numbers that were fitted to a part of them.

use super::*;
use crate::collective::Kind;
use std::collections::BTreeMap;

/// Rows of a measured file, as numbers.
pub(super) fn measured(file: &str) -> Vec<Vec<f64>> {
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
            // Scatter of the measurements. Two H100 took 23 us where the next smaller size, which is kept, took 28: no curve that
            // grows comes nearer than 22 %. Four took 55 us where the next larger one took 51: none comes nearer than 7 %. Eight A100
            // took 263.2 us between 209.7 and 265.3, where a library changes its way; the price is 236.1. Between straight lines and the
            // slower way's slope up to the next point, weighed 1 - w to w, that one comes in from w = 0.1 on; but of the kept points
            // alone, each left out in turn, every w above 0 misses more (4.2 % at 0, 4.5 at 0.2, 5.6 at 1), so it is not taken. The shape
            // of the other file of A100s between two kept points misses as much as no shape.
            assert!(
                over <= 1 && mean <= 0.08,
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
