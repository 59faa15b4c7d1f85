use super::*;
use std::collections::BTreeSet;

fn even(stages: usize, chunks: usize) -> Times {
    let part = |seconds: f64| vec![vec![seconds / chunks as f64; chunks]; stages];
    Times {
        forward: part(1.0),
        input: part(1.0),
        weight: part(1.0),
        message: 0.0,
        blocking: false,
    }
}

fn end(pipeline: Pipeline, stages: usize, chunks: usize, micros: usize) -> f64 {
    let ran = replay(pipeline, micros, &even(stages, chunks));
    ran.iter().flatten().map(|r| r.end).fold(0.0, f64::max)
}

#[test]
fn every_piece_appears_once() {
    for (_, pipeline) in Pipeline::ALL {
        for (stages, chunks, micros) in [
            (1, 1, 3),
            (4, 1, 8),
            (4, 2, 8),
            (3, 3, 9),
            (4, 1, 2),
            (5, 2, 3),
        ] {
            let fits = match pipeline {
                _ if pipeline.folds() => chunks == 2,
                Pipeline::ZeroBubbleH1 | Pipeline::GPipe => chunks == 1,
                _ => chunks == 1 || micros % stages == 0,
            };
            if !fits {
                continue;
            }
            let passes = if pipeline.parts_backward() { 3 } else { 2 };
            for stage in 0..stages {
                let mut seen = BTreeSet::new();
                for p in list(pipeline, stage, stages, chunks, micros) {
                    assert!(p.chunk < chunks && p.micro < micros);
                    assert!(seen.insert((p.pass, p.chunk, p.micro)), "{p:?} twice");
                }
                assert_eq!(seen.len(), passes * chunks * micros, "{pipeline:?}");
            }
        }
    }
}

/// (p-1)(F+B) for GPipe and 1F1B, a v-th of it interleaved.
#[test]
fn the_bubble_is_the_formulas() {
    for (pipeline, stages, chunks, micros) in [
        (Pipeline::GPipe, 4, 1, 8),
        (Pipeline::OneForwardOneBackward, 4, 1, 8),
        (Pipeline::OneForwardOneBackward, 8, 1, 8),
        (Pipeline::OneForwardOneBackward, 4, 2, 8),
        (Pipeline::OneForwardOneBackward, 8, 3, 64),
    ] {
        let bubble = 3.0 * (stages - 1) as f64 / chunks as f64;
        let error = (end(pipeline, stages, chunks, micros) - 3.0 * micros as f64 - bubble).abs();
        assert!(error <= 1e-9, "{pipeline:?} {stages} {chunks} {micros}");
    }
}

/// ZB-H1: (p-1)(F+I-W) or less; ZB-V and DualPipe less than that, with their limit of memory.
#[test]
fn zero_bubbles_are_small() {
    for (stages, micros) in [(4, 8), (8, 24), (16, 64)] {
        let ideal = 3.0 * micros as f64;
        let h1 = end(Pipeline::ZeroBubbleH1, stages, 1, micros) - ideal;
        assert!(h1 <= (stages - 1) as f64 + 1e-9, "{stages} {micros}: {h1}");
        for folded in [Pipeline::ZeroBubbleV, Pipeline::DualPipe] {
            let bubble = end(folded, stages, 2, micros) - ideal;
            println!("{folded:?} {stages} {micros}: bubble {bubble}, ZB-H1 {h1}");
            assert!(
                bubble <= h1 + 1e-9,
                "{folded:?} {stages} {micros}: {bubble} above {h1}"
            );
        }
        for (pipeline, chunks) in [(Pipeline::ZeroBubbleH1, 1), (Pipeline::ZeroBubbleV, 2)] {
            for stage in 0..stages {
                let (mut live, mut most) = (0usize, 0);
                for p in list(pipeline, stage, stages, chunks, micros) {
                    match p.pass {
                        Pass::Forward => live += 1,
                        Pass::Weight => live -= 1,
                        _ => {}
                    }
                    most = most.max(live);
                }
                let bound = in_flight(pipeline, stage, stages, chunks, micros);
                assert!(most <= bound, "{pipeline:?} {stage}: {most} above {bound}");
            }
        }
    }
}

#[test]
fn values_in_flight_are_the_formulas() {
    assert_eq!(in_flight(Pipeline::GPipe, 0, 4, 1, 8), 8);
    assert_eq!(in_flight(Pipeline::OneForwardOneBackward, 0, 4, 1, 8), 4);
    assert_eq!(in_flight(Pipeline::OneForwardOneBackward, 3, 4, 1, 8), 1);
    // p v + p - 1 chunks: p (1 + (p-1)/(p v)) micro-batches.
    assert_eq!(in_flight(Pipeline::OneForwardOneBackward, 0, 4, 2, 16), 11);
    assert_eq!(
        in_flight(Pipeline::OneForwardOneBackward, 0, 4, 2, 4000),
        11
    );
}

/// Interleaving takes micro-batches that are no multiple of the stages: the last group is smaller.
#[test]
fn no_list_waits_for_ever() {
    for stages in 1..=8 {
        for chunks in 1..=6 {
            for micros in 1..=26 {
                let seconds = end(Pipeline::OneForwardOneBackward, stages, chunks, micros);
                assert!(
                    seconds >= 3.0 * micros as f64 - 1e-9,
                    "{stages} {chunks} {micros}: {seconds}"
                );
            }
        }
    }
}

/// What a long step repeats is taken from two short ones.
#[test]
fn long_steps_are_the_replay() {
    for (pipeline, chunks) in [
        (Pipeline::GPipe, 1),
        (Pipeline::OneForwardOneBackward, 1),
        (Pipeline::OneForwardOneBackward, 2),
        (Pipeline::ZeroBubbleH1, 1),
        (Pipeline::ZeroBubbleV, 2),
    ] {
        let mut times = even(4, chunks);
        times.forward[2][0] *= 1.3;
        times.weight[3][chunks - 1] *= 0.7;
        times.message = 0.05;
        for micros in [4000, 4003] {
            let micros = if chunks == 2 { micros / 4 * 4 } else { micros };
            let whole = replay(pipeline, micros, &times);
            let whole = whole.iter().flatten().map(|r| r.end).fold(0.0, f64::max);
            let short = makespan(pipeline, micros, &times);
            assert!(
                (short / whole - 1.0).abs() <= 2e-3,
                "{pipeline:?} {micros}: {short} and {whole}"
            );
        }
    }
}
