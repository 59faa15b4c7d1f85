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
