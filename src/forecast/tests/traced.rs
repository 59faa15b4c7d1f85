//! The price of a real program's trace.

use super::*;
use crate::collective::Kind;

/// A trace of the real program is priced: the same program over more chips computes less and moves more.
#[test]
fn a_ghosts_trace_has_a_price() {
    use crate::placement::Placement::{Replicate, Shard};
    use crate::spmd::{Chip, FromIndex, Init, World};
    let program = |chip: &Chip| {
        let numbers = FromIndex(|i| i as f32);
        let x = chip.input("x", [4096, 4096], [Replicate], &numbers);
        let w = chip.parameter("w", [4096, 4096], [Shard(1)], Init::ones());
        x.matmul(&w).gather();
    };
    let price = |tp: usize, machine: &Machine| {
        let trace = World::ghost(&Mesh::new([("tp", tp)]))
            .trace(program)
            .unwrap();
        price_trace(&trace, machine, "bf16").unwrap()
    };
    let (one, eight) = (price(1, &a100()), price(8, &a100()));
    let matmul = |p: &TracePrice| p.classes[0].compute["matmul"];
    assert!(matmul(&eight) < matmul(&one) / 3.0);
    assert!(!one.classes[0].exposed.contains_key("tp") || one.classes[0].exposed["tp"] == 0.0);
    let network = Network::of(&a100()).unwrap();
    let whole = 4.0 * 4096.0 * 4096.0;
    let gather = network.collective(Kind::AllGather, 8, 1, whole).unwrap();
    assert!((eight.classes[0].exposed["tp"] / gather - 1.0).abs() <= 1e-6);
    let sum: f64 = eight.classes[0].compute.values().sum::<f64>() + gather;
    assert!((eight.seconds() / sum - 1.0).abs() <= 1e-9);
}

/// Curves of a trace with made-up times go through these times: a collective beside computation apart from one in line, by the chips
/// of its own group; the gap is what the program's own events leave of a step.
#[test]
fn curves_hold_what_a_trace_timed() {
    use crate::placement::Placement::{Partial, Replicate, Shard};
    use crate::spmd::{Chip, FromIndex, World};
    use crate::trace::{EventKind, Stream, Time};
    let program = |chip: &Chip| {
        let numbers = FromIndex(|i| i as f32);
        let x = chip.input("x", [64, 64], [Replicate, Shard(1)], &numbers);
        let w = chip.input("w", [64, 64], [Replicate, Shard(0)], &numbers);
        let sum = x.matmul(&w);
        assert_eq!(sum.placements()[1], Partial);
        let pending = sum.start_redistribute([Replicate, Replicate]);
        let _ = x.matmul(&w).redistribute([Replicate, Replicate]);
        let _ = pending.wait();
    };
    let mesh = Mesh::new([("dp", 2), ("tp", 4)]);
    let mut trace = World::ghost(&mesh)
        .trace(|chip| chip.step(1, || program(chip)))
        .unwrap();
    let step = trace.classes[0].chip.first.as_mut().unwrap();
    let (mut own, mut events) = (0.0, 0);
    for event in &mut step.events {
        let nanoseconds = match (event.kind, event.stream) {
            (EventKind::Op, _) => 1_000,
            (EventKind::Wait, _) => 500,
            (_, Stream::Communication) => 7_000,
            (_, Stream::Compute) => 3_000,
        };
        event.time = Some(Time {
            start_ns: 0,
            duration_ns: nanoseconds,
        });
        events += 1;
        if event.stream == Stream::Compute {
            own += nanoseconds as f64 * 1e-9;
        }
    }
    let gap = measured_gap(&trace, own + 2e-6 * events as f64);
    assert!((gap / 2e-6 - 1.0).abs() <= 1e-9, "{gap}");
    let account: f64 = measured_account(&trace).values().sum();
    assert!((account / own - 1.0).abs() <= 1e-9);
    let curves = measured_curves(&[trace], 8, "made up");
    let at = |name: &str| {
        let curve = curves.iter().find(|c| c.kernel == name).expect(name);
        let nanoseconds = (curve.points[0].1 * 1e9).round();
        (curve.group, nanoseconds)
    };
    assert_eq!(at("matmul"), (8, 1_000.0));
    assert_eq!(at("all-reduce"), (4, 3_000.0));
    assert_eq!(at("all-reduce.beside"), (4, 7_000.0));
}
