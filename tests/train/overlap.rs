//! What travels beside computation: the next block's parameters and the gradients of the block before, by bytes, and with
//! products between start and wait.

use crate::tiny::{llama, training};
use std::collections::BTreeMap;
use supernode::DType;
use supernode::World;
use supernode::mesh::Mesh;
use supernode::model::{Config, ContextMethod};
use supernode::spmd::Zero;
use supernode::trace::{ChipTrace, EventKind, Stream, Trace};
use supernode::train::Training;

const LAYERS: usize = 3;

fn config() -> Config {
    Config {
        layers: LAYERS,
        ..llama()
    }
}

fn split(config: Config, zero: Option<usize>) -> Training {
    let mut training = training(config, 4, 1);
    training.options.zero = zero.map(|n| Zero::stage(n).expect("a stage"));
    training
}

fn traced(mesh: &str, zero: Option<usize>, recompute: bool) -> Trace {
    let mut training = split(config(), zero);
    training.model = training.model.with_recompute(recompute);
    let ghost = World::ghost(&Mesh::parse(mesh).expect("a mesh"));
    training.trace(&ghost).expect("a trace")
}

/// Bytes sent in all, and beside computation.
fn sent(trace: &Trace, op: &str) -> (u64, u64) {
    let found = trace.collectives().iter().find(|c| *c.op == *op);
    found.map_or((0, 0), |c| (c.bytes, c.overlapped_bytes))
}

/// Bytes of one block's parameters, and of all parameters, in f32.
fn bytes() -> (u64, u64) {
    let none = Config {
        layers: 0,
        ..config()
    };
    let all = config().parameters();
    (4 * (all - none.parameters()) / LAYERS as u64, 4 * all)
}

#[test]
fn parameters_are_gathered_a_block_ahead_and_gradients_reduced_a_block_behind() {
    let (block, all) = bytes();
    for recompute in [false, true] {
        let trace = traced("fsdp=2", None, recompute);
        let what = format!("recompute {recompute}");
        // The first block to run, forward and backward, has nobody to gather for it.
        let (_, beside) = sent(&trace, "all-gather");
        assert_eq!(beside, 2 * (LAYERS as u64 - 1) * block / 2, "{what}");
        let (scattered, beside) = sent(&trace, "reduce-scatter");
        assert_eq!((scattered, beside), (all / 2, all / 2), "{what}");
    }
}

#[test]
fn gradients_of_a_replicated_model_are_reduced_as_their_blocks_end() {
    let (block, all) = bytes();
    let table = 4 * (config().vocab * config().hidden) as u64;
    // The head, its norm and the blocks; the embedding ends with the step.
    let early = all - table;
    assert!(early > LAYERS as u64 * block);
    let (_, beside) = sent(&traced("dp=2", None, false), "all-reduce");
    assert_eq!(beside, early);
    let (_, beside) = sent(&traced("dp=2", Some(1), false), "reduce-scatter");
    assert_eq!(beside, early / 2);
}

/// Calls of collectives that sum gradients over an axis, and their bytes.
fn reductions(trace: &Trace, axis: &str) -> (u64, u64) {
    let sums = ["all-reduce", "reduce-scatter"];
    let found = trace.collectives().iter();
    let found = found.filter(|c| sums.contains(&&*c.op) && c.axis == axis);
    found.fold((0, 0), |sum, c| (sum.0 + c.calls, sum.1 + c.bytes))
}

#[test]
fn only_the_last_micro_batch_reduces() {
    let methods = [
        ContextMethod::Ring,
        ContextMethod::Ulysses,
        ContextMethod::Usp { exchange: Some(2) },
    ];
    let cases = [("dp", "dp=2", None, None), ("dp", "dp=2", Some(1), None)];
    let over_cp = methods.map(|method| ("cp", "cp=4", None, Some(method)));
    for (axis, mesh, zero, method) in cases.into_iter().chain(over_cp) {
        // In bf16 a product's weight is a cast parameter, whose gradient is the parameter's.
        for dtype in [DType::F32, DType::Bf16] {
            let mut training = split(config(), zero);
            let model = training.model.with_dtype(dtype);
            training.model = model.with_context_method(method);
            let mut of = |micro: usize| {
                training.options.micro_batch = Some(micro);
                let ghost = World::ghost(&Mesh::parse(mesh).expect("a mesh"));
                let trace = training.trace(&ghost).expect("a trace");
                reductions(&trace, axis)
            };
            let once = of(if axis == "dp" { 2 } else { 4 });
            assert!(once.0 > 0, "{mesh}");
            assert_eq!(of(1), once, "{mesh}, ZeRO {zero:?}, {method:?} in {dtype}");
        }
    }
}

/// Floating-point operations between the start and the wait of each started transfer, by ticket.
pub(crate) fn flops_beside(chip: &ChipTrace) -> BTreeMap<u64, u64> {
    let (mut done, mut began, mut beside) = (0, BTreeMap::new(), BTreeMap::new());
    for event in chip.events() {
        match (event.kind, event.ticket) {
            (EventKind::Wait, Some(ticket)) => {
                let start: u64 = began.remove(&ticket).expect("it was started");
                beside.insert(ticket, done - start);
            }
            (_, Some(ticket)) if event.stream == Stream::Communication => {
                began.insert(ticket, done);
            }
            _ => done += event.flops,
        }
    }
    assert!(began.is_empty(), "all was waited for");
    beside
}

#[test]
fn there_is_work_beside_what_travels() {
    for (mesh, zero) in [("fsdp=2", None), ("dp=2", None), ("dp=2", Some(2))] {
        let mut training = split(config(), zero);
        training.options.bucket_bytes = 0;
        let ghost = World::ghost(&Mesh::parse(mesh).expect("a mesh"));
        let trace = training.trace(&ghost).expect("a trace");
        let beside = flops_beside(trace.chip(0));
        assert!(beside.len() > 9 * (LAYERS - 1), "{mesh}: {beside:?}");
        // All but those of the first block, which end with the backward.
        let idle = beside.values().filter(|flops| **flops == 0).count();
        assert!(2 * idle < beside.len(), "{mesh}, ZeRO {zero:?}: {beside:?}");
    }
}
