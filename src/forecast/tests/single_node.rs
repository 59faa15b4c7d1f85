//! 1,440 steps on one node of A100s, everything computed again: constants from hidden 1024, tested on 2048, and back.
//!
//! Without `dp` the times of the file are linear in layers and micro-batches to the last of 16 digits: they are parts of layers that
//! were timed alone, added up. So each part begins on an idle chip here (`stack.parts`), products are priced as those that were measured
//! alone at these sizes, and the 1,440 are 16 layers and 16 heads a width: one for each pair of `tp` and micro-batch. Those of few tokens,
//! which wait for the host, scatter by 15 % about any rule (two sequences over tp=4 at 2048 take less than one).
//!
//! A pair is therefore what is measured once, however many of the rows repeat it (4 of tp=8 with eight sequences, 128 of tp=1 with one):
//! constants are those of the least mean over pairs of a pair's mean error. By rows, as it was before, they follow the pairs that are
//! repeated most. What is left out of a fit within a width says so without the other one: each pair, each micro-batch or each `tp`, mean
//! and median in per cent:
//!
//! | | 1024 by rows | by pairs | 2048 by rows | by pairs |
//! |---|---|---|---|---|
//! | pairs | 4.4, 2.7 | 4.4, 2.3 | 7.8, 7.8 | 7.2, 5.6 |
//! | micro-batches | 4.0, 2.5 | 4.0, 2.3 | 7.6, 6.0 | 7.5, 5.9 |
//! | `tp` | 4.9, 3.4 | 4.9, 2.9 | 8.1, 7.9 | 8.1, 5.7 |
//! | the other width | 7.3, 6.2 | 7.5, 5.7 | 5.6, 4.5 | 4.8, 3.3 |
//!
//! What a price is made of was chosen on hidden 1024 alone: by leaving out one pair after the other (first column, mean error), by
//! leaving out the largest micro-batches, and by what Megatron-LM's kernels read and write. Each choice was then tested on 2048 once; the
//! times of 2048's layers, without any price beside them, had been seen before.
//!
//! | choice, fitted by rows | 1024, left out | 2048, mean and median | back |
//! |---|---|---|---|
//! | launches or kernels of a whole pass, whichever is longer; one share for all that streams | 4.8 % | 8.4, 6.2 % | 4.3, 2.6 % |
//! | the same with products as measured inside a layer | 4.8 % | 10.2, 10.0 % | 5.4, 3.7 % |
//! | each kernel waits for its own launch, the chip's own shares | 4.5 % | 11.3, 9.8 % | 11.3, 12.4 % |
//! | parts alone, biases and copies around unfused attention, the loss's sums over `tp` | 4.0 % | 8.3, 5.8 % | 9.0, 9.0 % |
//! | and the loss's small kernels, and the embedding's gradient | 4.0 % | 8.6, 5.6 % | 7.2, 7.2 % |
//! | and a share for softmax and loss alone | 4.3 % | 8.3, 5.8 % | 6.5, 6.1 % |
//! | and GELU as any element-wise kernel | 4.2 % | 7.9, 6.2 % | 6.6, 6.2 % |
//!
//! These rows come from a sketch that simplifies pipelines, the embedding's gradient and the optimizer, and whose last two rows give some
//! kernels that add to earlier micro-batches' gradients a wrong price (on 2048, and in the head on 1024); the prices here, made as
//! its last row says, do not, and miss 7.3 and 6.2 %, and 5.6 and 4.5 % back, by rows.
//!
//! Of these prices two more were tried and refused on hidden 1024, without a look at 2048. As they are they miss 3.8 % where a pair is left
//! out, and 5.1 % of the largest micro-batches, left out. With norms as any element-wise kernel (apex has another kernel than the one
//! whose share was measured) that is 5.0 and 6.9 %; with pipelines that fill before each product, a prologue of 64 or 128 as inside a layer,
//! 4.4 and 5.8, or 4.7 and 6.7 %; with both 4.4 and 5.3, or 4.8 and 6.2 %.
//!
//! A second sketch took the times apart: a layer, the head, the embedding, the optimizer and a message, for each pair. Two errors of
//! the prices cancel where nothing is split over `tp`: on 2048 layers are said to take 15 to 19 % more than they did, heads 32 to 42 %
//! less (a head of tp=1 takes three times as long as one of tp=2, at 80 TFLOP/s; nobody says why). What mends both parts within 1024
//! misses more of 2048:
//!
//! | choice, three constants by rows | 1024, left out | 1024, largest left out | 2048, mean and median |
//! |---|---|---|---|
//! | as it is, two constants | 4.2 % | 5.7 % | 7.3, 6.2 % |
//! | the loss in 2 bytes, a rate for the head of tp=1, sums of a backward waited for, messages at 12.5 GiB/s beside kernels | 3.4 % | 3.0 % | 9.7, 8.3 % |
//! | the same with the loss in f32, and softmax as any element-wise kernel, not fitted | 3.9 % | 2.8 % | 8.6, 6.5 % |
//! | and no kernels that add to earlier gradients | 4.0 % | 2.2 % | 8.2, 6.5 % |
//!
//! Refused on 1024 and 2048 each alone: a pause before a part's first kernel or between kernels, times of host and chip joined by
//! `(h^q + k^q)^(1/q)` in place of a run in order, shares of element-wise kernels, norms, GELU and products fitted too. Fits by rows to
//! squares, logarithms, the median, or mean and median were looked at on the other width before pairs were thought of: 7.3 to 7.7 and 5.7
//! to 6.2 %, but 5.6 to 8.5 and 4.5 to 8.4 % back.

use super::calibration::measured;
use super::*;
use std::collections::{BTreeMap, BTreeSet};

/// What is fitted, from the least to the most that is tried: microseconds in which the software launches a kernel, and twentieths of the
/// bandwidth that its softmax and loss reach.
const LAUNCHES: std::ops::RangeInclusive<usize> = 40..=80;
const SHARES: std::ops::RangeInclusive<usize> = 8..=17;

/// `tp` and micro-batch.
type Pair = (usize, usize);

/// What counts once in a fit.
#[derive(Clone, Copy, Debug)]
enum Weight {
    /// Each row of the file.
    Row,
    /// Each pair, by the mean of its rows.
    Pair,
}

/// Relative errors of all rows of a width, by pair, with these seconds of a launch and this share.
struct Trial {
    constants: [f64; 2],
    errors: BTreeMap<Pair, Vec<f64>>,
}

impl Trial {
    /// Sizes of the errors of some pairs.
    fn sizes(&self, of: &dyn Fn(&Pair) -> bool) -> Vec<f64> {
        let some = self.errors.iter().filter(|(pair, _)| of(pair));
        some.flat_map(|(_, e)| e.iter().map(|e| e.abs())).collect()
    }

    /// What a fit makes small.
    fn mean(&self, weight: Weight, of: &dyn Fn(&Pair) -> bool) -> f64 {
        match weight {
            Weight::Row => mean(&self.sizes(of)),
            Weight::Pair => {
                let pairs = self.errors.keys().filter(|pair| of(pair));
                let means: Vec<f64> = pairs.map(|one| mean(&self.sizes(&|p| p == one))).collect();
                mean(&means)
            }
        }
    }
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// The trial of the least mean over the pairs that are kept.
fn fit(trials: &[Trial], weight: Weight, kept: &dyn Fn(&Pair) -> bool) -> usize {
    let means: Vec<f64> = trials.iter().map(|t| t.mean(weight, kept)).collect();
    let all = 0..trials.len();
    all.min_by(|a, b| means[*a].total_cmp(&means[*b])).unwrap()
}

/// Mean and median error of the rows that were left out of a fit within a width: each pair in turn, each micro-batch, each `tp`.
fn left_out(trials: &[Trial], weight: Weight) -> [(f64, f64); 3] {
    let by: [fn(&Pair) -> usize; 3] = [|(tp, micro)| 100 * tp + micro, |p| p.1, |p| p.0];
    by.map(|of| {
        let groups: BTreeSet<usize> = trials[0].errors.keys().map(of).collect();
        let missed = groups.into_iter().flat_map(|out| {
            let fitted = fit(trials, weight, &|pair| of(pair) != out);
            trials[fitted].sizes(&|pair| of(pair) == out)
        });
        mean_and_median(missed.collect())
    })
}

fn mean_and_median(mut sizes: Vec<f64>) -> (f64, f64) {
    sizes.sort_by(f64::total_cmp);
    (mean(&sizes), sizes[sizes.len() / 2])
}

/// Every trial over the rows of a width.
fn trials(rows: &[Vec<f64>], hidden: f64) -> Vec<Trial> {
    let rows: Vec<&Vec<f64>> = rows.iter().filter(|r| r[3] == hidden).collect();
    let all = LAUNCHES.flat_map(|l| SHARES.map(move |s| [l as f64 * 1e-6, s as f64 * 0.05]));
    let trial = |constants| {
        let machine = machine(constants);
        let mut errors: BTreeMap<Pair, Vec<f64>> = BTreeMap::new();
        for row in &rows {
            let pair = (row[7] as usize, row[2] as usize);
            let seconds = step(row).price_only(&machine).unwrap().step_seconds;
            let error = seconds / (row[10] * 1e-3) - 1.0;
            errors.entry(pair).or_default().push(error);
        }
        Trial { constants, errors }
    };
    all.map(trial).collect()
}

fn machine([launch, share]: [f64; 2]) -> Machine {
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
    machine
}

/// A row's columns: gpus, global batch, micro-batch, hidden, heads, layers, tokens, tp, dp, pp, milliseconds.
fn step(row: &[f64]) -> Setting {
    let n = |i: usize| row[i] as usize;
    let model = crate::model::Config::gpt2(n(5), n(3), n(4), 51200, n(6));
    let mesh = Mesh::new([("pp", n(9)), ("dp", n(8)), ("tp", n(7))]);
    Setting {
        micro_batch: n(2),
        recompute: Recompute::Full,
        ..Setting::new((&model).into(), mesh, n(1))
    }
}

#[test]
#[ignore = "needs measured curves: SUPERNODE_CALIBRATION=DIR"]
fn single_node_steps() {
    let rows = measured("a100_single_node_steps.csv");
    let widths = [1024.0, 2048.0].map(|hidden| trials(&rows, hidden));
    let all = |_: &Pair| true;
    for (own, other, most) in [(0, 1, (0.076, 0.06)), (1, 0, (0.06, 0.05))] {
        let (trained, tested) = (&widths[own], &widths[other]);
        let missed = [Weight::Row, Weight::Pair].map(|weight| {
            let out = left_out(trained, weight);
            println!("width {own}, by {weight:?}: left out {out:.4?}");
            out.iter().map(|(mean, median)| mean + median).sum::<f64>()
        });
        // Nothing of the other width is needed to see which weight is the better one.
        assert!(missed[1] < missed[0], "{missed:?}");
        let fitted = fit(trained, Weight::Pair, &all);
        let [launch, share] = trained[fitted].constants;
        if own == 0 {
            // What stands in the stack's file.
            let stack = a100().stack.value("stack.launch").unwrap();
            assert!((stack - launch).abs() <= 1e-9, "{stack}, {launch}");
        }
        let (mean, median) = mean_and_median(tested[fitted].sizes(&all));
        println!(
            "fit on width {own}: launch {:.0} us, softmax {share:.2} of the bandwidth, mean {:.3}; on the other: mean {mean:.3}, median {median:.3}",
            launch * 1e6,
            trained[fitted].mean(Weight::Row, &all)
        );
        assert!(
            mean <= most.0 && median <= most.1,
            "mean {mean}, median {median}"
        );
    }
}
