//! A collective over tensors that lie one behind the other brings the bits of one over a single tensor.

use super::super::exchange::{Exchange, Header};
use super::super::payload::Piece;
use super::Call;
use crate::collective::{Algorithm, Counts, Kind, Reduce, schedule};
use crate::cpu::memory::Pool;
use crate::dtype::{DType, TensorType};
use crate::mesh::Mesh;
use crate::random::Stream;
use crate::tensor::{Memory, Tensor};
use std::panic::Location;
use std::sync::Arc;
use std::time::Duration;

/// Elements that each chip brings and takes away; for every number of chips.
fn sizes(kind: Kind, counts: &Counts, n: usize, index: usize) -> (usize, usize) {
    let each = |c: usize| match counts {
        Counts::Each(each) => each[c],
        _ => unreachable!("these kinds are given each chip's"),
    };
    let all = || (0..n).map(each).sum();
    match kind {
        Kind::ReduceScatter => (all(), each(index)),
        Kind::AllGather => (each(index), all()),
        Kind::Shift => (each(index), each((index + n - 1) % n)),
        _ => match counts {
            Counts::Len(len) => (*len, *len),
            _ => unreachable!("the other kinds are given a length"),
        },
    }
}

/// `len` elements as tensors of at most `longest`, empty ones among them.
fn tensors(memory: &Memory, dtype: DType, len: usize, longest: usize) -> Vec<Tensor> {
    let mut left = len;
    let mut lengths = vec![0];
    while left > 0 {
        let next = (longest - lengths.len() % 3).clamp(1, left);
        lengths.extend([next, 0]);
        left -= next;
    }
    let tensor = |len: usize| memory.allocate(&TensorType::new([len], dtype));
    let all: crate::Result<_> = lengths.into_iter().map(tensor).collect();
    all.expect("memory without a budget")
}

fn fill(tensors: &mut [Tensor], rank: usize) {
    let numbers = Stream::new(rank as u64, "contents");
    let mut element = 0;
    for tensor in tensors {
        let dtype = tensor.dtype();
        for place in tensor.bytes_mut().chunks_exact_mut(dtype.size()) {
            let x = numbers.normal(element);
            match dtype {
                DType::Bf16 => place.copy_from_slice(&half::bf16::from_f32(x).to_le_bytes()),
                _ => place.copy_from_slice(&x.to_le_bytes()),
            }
            element += 1;
        }
    }
}

/// A tensor in two pieces.
fn halves(tensor: &Tensor) -> [Piece; 2] {
    let (all, len) = (Piece::whole(tensor), tensor.elements());
    [all.part(0..len / 2), all.part(len / 2..len)]
}

/// What every chip has in the end, as bytes, where no tensor is longer than `longest`.
fn run(
    (kind, algorithm, dtype): (Kind, Algorithm, DType),
    counts: &Counts,
    n: usize,
    longest: usize,
) -> Vec<Vec<u8>> {
    let mesh = Arc::new(Mesh::new([("dp", n)]));
    let exchange = Exchange::new(mesh.clone(), Duration::from_secs(60), mesh.chips());
    let chip = |index: usize| {
        let (exchange, mesh, memory) = (&exchange, &mesh, Memory::cpu(None));
        let (brings, takes) = sizes(kind, counts, n, index);
        move || {
            let mut input = tensors(&memory, dtype, brings, longest);
            fill(&mut input, index);
            let mut output = tensors(&memory, dtype, takes, longest);
            let call = Call {
                lane: exchange.lane(index),
                group: mesh.group(index, "dp"),
                call: (0, 1),
                header: Arc::new(Header {
                    signature: "test".into(),
                    scope: "".into(),
                    site: Location::caller(),
                }),
                schedule: schedule(kind, algorithm, counts, n, index),
                reduce: Reduce::Sum,
                dtype,
                staging: Pool::new(None),
            };
            let pieces: Vec<Piece> = input.iter().flat_map(halves).collect();
            let ran = call.run(&pieces, &mut output);
            assert!(ran.is_ok(), "{:?}", exchange.error());
            drop(pieces);
            assert!(input.iter().all(Tensor::is_unique), "a message was kept");
            exchange.end(index);
            let bytes = output.iter().flat_map(|t| t.bytes().to_vec());
            bytes.collect::<Vec<u8>>()
        }
    };
    std::thread::scope(|scope| {
        let chips: Vec<_> = (0..n).map(|index| scope.spawn(chip(index))).collect();
        let ends = chips.into_iter().map(|c| c.join());
        ends.map(|end| end.unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect()
    })
}

#[test]
fn cutting_tensors_changes_no_bit() {
    let whole = usize::MAX;
    for n in 1..6 {
        let each = Counts::Each((0..n).map(|c| 700 * c + 3).collect());
        for (kind, counts) in [
            (Kind::AllReduce, Counts::Len(5)),
            (Kind::AllReduce, Counts::Len(9_001)),
            (Kind::ReduceScatter, each.clone()),
            (Kind::AllGather, each.clone()),
            // Every number of chips divides it: all have as much.
            (Kind::AllToAll, Counts::Len(1_860)),
            (Kind::Broadcast { root: n / 2 }, Counts::Len(1_009)),
            (Kind::Shift, each.clone()),
        ] {
            for algorithm in [Algorithm::Tree, Algorithm::Ring, Algorithm::Recursive] {
                for dtype in [DType::F32, DType::Bf16] {
                    let what = (kind, algorithm, dtype);
                    let want = run(what, &counts, n, whole);
                    for longest in [7, 600, 1_500] {
                        let got = run(what, &counts, n, longest);
                        assert!(got == want, "{what:?} of {n} in tensors of {longest}");
                    }
                }
            }
        }
    }
}
