//! A user's own op, written against the public surface alone, is sharded, traced, differentiated and counted like ours.

use supernode::dtype::TensorType;
use supernode::mesh::Mesh;
use supernode::ops::{Accum, Axes, Backward, Cost, Linear, Op, Saved, Site, misfit, traffic};
use supernode::placement::Placement::{Partial, Replicate, Shard};
use supernode::spmd::{Chip, Device, FromIndex, Init, World};
use supernode::tensor::Tensor;
use supernode::{DType, ErrorKind};

/// `y[b] = sum over c of x[b,c]^2 w[c]`: x [b, c], w [c], both f32.
#[derive(Debug)]
struct WeightedSquares;

fn numbers(tensor: &Tensor) -> &[f32] {
    tensor.slice().typed()
}

impl Op for WeightedSquares {
    fn name(&self) -> &'static str {
        "weighted_squares"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        match inputs {
            [x, w] if x.rank() == 2 && w.shape == x.shape[1..] => {
                Ok(vec![TensorType::new([x.shape[0]], DType::F32)])
            }
            _ => Err(misfit("weighted_squares", "x [b, c] and w [c]", inputs)),
        }
    }

    fn axes(&self, _: &[TensorType]) -> Axes {
        Axes::new("bc,c->b").linear(Linear::No)
    }

    fn cost(&self, inputs: &[TensorType], outputs: &[TensorType]) -> Cost {
        let flops = 3 * inputs[0].elements() as u64;
        Cost {
            flops,
            bytes: traffic(inputs) + traffic(outputs),
            scratch: 4096,
        }
    }

    fn forward(&self, _: &Site, inputs: &[&Tensor], outputs: &mut [Tensor]) {
        let (x, w) = (numbers(inputs[0]), numbers(inputs[1]));
        let y = outputs[0].slice_mut().typed::<f32>();
        for (b, y) in y.iter_mut().enumerate() {
            let row = &x[b * w.len()..(b + 1) * w.len()];
            *y = row.iter().zip(w).map(|(x, w)| x * x * w).sum();
        }
    }

    fn saves(&self) -> Saved {
        Saved::INPUTS
    }

    fn backward(&self, _: &Site, backward: &mut Backward) {
        let (x, w, dy) = (
            numbers(backward.input(0)),
            numbers(backward.input(1)),
            numbers(backward.gradient(0)),
        );
        let c = w.len();
        if let Some(dx) = &mut backward.wanted[0] {
            assert_eq!(
                dx.accum,
                Accum::Replace,
                "the op did not offer to accumulate"
            );
            let dx = dx.tensor.slice_mut().typed::<f32>();
            for (i, dx) in dx.iter_mut().enumerate() {
                *dx = 2.0 * x[i] * w[i % c] * dy[i / c];
            }
        }
        if let Some(dw) = &mut backward.wanted[1] {
            let dw = dw.tensor.slice_mut().typed::<f32>();
            for (j, dw) in dw.iter_mut().enumerate() {
                *dw = dy
                    .iter()
                    .enumerate()
                    .map(|(b, dy)| x[b * c + j] * x[b * c + j] * dy)
                    .sum();
            }
        }
    }
}

const B: usize = 4;
const C: usize = 6;

fn x_of(i: u64) -> f32 {
    (i % 5) as f32 - 2.0
}

/// Loss, gradient of x, gradient of w, on a mesh where b is split over dp and c over tp.
fn program(chip: &Chip) -> [Option<Vec<f32>>; 3] {
    let x = chip
        .input(
            "x",
            [B, C],
            chip.placed(&[("dp", Shard(0)), ("tp", Shard(1))]),
            &FromIndex(x_of),
        )
        .variable();
    let w = chip.parameter(
        "w",
        [C],
        chip.placed(&[("tp", Shard(0))]),
        Init::Constant(2.0),
    );
    let loss = chip.record(|| {
        // Two uses of the weight: their gradients add up.
        let y = chip.scope("mine", || chip.apply_one(WeightedSquares, &[&x, &w]));
        assert_eq!(
            *y.placements(),
            chip.normalized(&[("dp", Shard(0)), ("tp", Partial)])
        );
        y.add(&chip.apply_one(WeightedSquares, &[&x, &w]))
            .sum()
            .gather()
    });
    loss.backward();
    let dx = chip.take_gradient(&x).expect("a gradient").gather();
    let (_, dw) = chip.take_gradients().swap_remove(0);
    [loss, dx, dw.gather()].map(|t| t.read().map(|a| a.into_raw_vec_and_offset().0))
}

/// The placements as a sharded tensor shows them: over axes of one chip all mean `Replicate`.
trait Normalized {
    fn normalized(
        &self,
        named: &[(&str, supernode::placement::Placement)],
    ) -> supernode::placement::Placements;
}

impl Normalized for Chip {
    fn normalized(
        &self,
        named: &[(&str, supernode::placement::Placement)],
    ) -> supernode::placement::Placements {
        let named: Vec<_> = named
            .iter()
            .copied()
            .filter(|(name, _)| self.size_of(name) > 1)
            .collect();
        self.placed(&named)
    }
}

#[test]
fn it_is_sharded_differentiated_and_reduced_like_ours() {
    let x: Vec<f32> = (0..(B * C) as u64).map(x_of).collect();
    let loss: f32 = x.iter().map(|x| 2.0 * 2.0 * x * x).sum();
    let dx: Vec<f32> = x.iter().map(|x| 2.0 * 2.0 * 2.0 * x).collect();
    let dw: Vec<f32> = (0..C)
        .map(|j| (0..B).map(|b| 2.0 * x[b * C + j] * x[b * C + j]).sum())
        .collect();
    for mesh in [
        "single",
        "dp=2",
        "tp=2",
        "tp=3",
        "dp=2,tp=2",
        "dp=3,tp=2",
        "dp=2,tp=4",
    ] {
        let mesh = Mesh::parse(mesh).expect("a mesh");
        let world = World::threads(&mesh, Device::cpu())
            .expect("a small mesh")
            .with_threads(1);
        let run = world
            .run(program)
            .unwrap_or_else(|e| panic!("on {mesh}: {e}"));
        for output in run.outputs() {
            let want = [vec![loss], dx.clone(), dw.clone()].map(Some);
            assert_eq!(*output, want, "on {mesh}");
        }
        let ghost = World::ghost(&mesh)
            .trace(program)
            .expect("a ghost that fits");
        assert_eq!(run.trace().difference(&ghost), None);
        assert_eq!(run.pool_peaks(), ghost.peak_bytes());
    }
}

#[test]
fn the_trace_has_its_cost_scope_and_scratch() {
    let mesh = Mesh::new([("dp", 2), ("tp", 2)]);
    let trace = World::ghost(&mesh)
        .trace(program)
        .expect("a ghost that fits");
    let chip = trace.chip(0);
    let event = chip
        .events()
        .find(|e| &*e.op == "weighted_squares")
        .expect("its event");
    assert_eq!(chip.scope(event), "mine");
    assert!(
        chip.site(event).contains("own_op.rs:"),
        "{}",
        chip.site(event)
    );
    let share = B * C / 4;
    assert_eq!((event.flops, event.scratch), (3 * share as u64, 4096));
    assert_eq!(chip.peak_scratch_bytes, 4096);
    let back = chip
        .events()
        .filter(|e| &*e.op == "weighted_squares.backward");
    assert_eq!(
        back.map(|e| e.flops).collect::<Vec<_>>(),
        [6 * share as u64; 2]
    );
    let reductions = chip
        .collectives
        .iter()
        .map(|c| (&*c.op, c.axis.as_str(), c.calls));
    let all: Vec<_> = reductions.collect();
    // The loss over both axes, dw over dp; both gathers of dx and that of dw are this test's own.
    assert!(
        all.contains(&("all-reduce", "dp", 2)) && all.contains(&("all-reduce", "tp", 1)),
        "{all:?}"
    );
}

#[test]
fn mistakes_with_it_are_told_as_with_ours() {
    let mesh = Mesh::new([("tp", 2)]);
    let refused = |shape: [usize; 2], placements: [supernode::placement::Placement; 2]| {
        let error = World::ghost(&mesh).trace(|chip| {
            let x = chip.input("x", shape, [placements[0]], &FromIndex(x_of));
            let w = chip.input("w", [C], [placements[1]], &FromIndex(x_of));
            chip.apply(WeightedSquares, &[&x, &w])
        });
        let error = error.expect_err("it does not fit");
        assert_eq!(error.kind(), ErrorKind::Chip);
        error.to_string()
    };
    let shapes = refused([B, C + 1], [Replicate, Replicate]);
    assert!(
        shapes.contains("weighted_squares wants x [b, c] and w [c], got f32[4, 7], f32[6]"),
        "{shapes}"
    );
    let placements = refused([B, C], [Shard(1), Replicate]);
    assert!(
        placements.contains("weighted_squares:")
            && placements.contains("operand 1 would have to be Shard(0)"),
        "{placements}"
    );
}

/// An op that forgot its backward.
#[derive(Debug)]
struct Forgetful;

impl Op for Forgetful {
    fn name(&self) -> &'static str {
        "forgetful"
    }
    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        Ok(inputs.to_vec())
    }
    fn axes(&self, inputs: &[TensorType]) -> Axes {
        Axes::elementwise(1, &inputs[0])
    }
    fn cost(&self, inputs: &[TensorType], outputs: &[TensorType]) -> Cost {
        Cost::elementwise(inputs, outputs, 1)
    }
    fn forward(&self, _: &Site, inputs: &[&Tensor], outputs: &mut [Tensor]) {
        outputs[0].bytes_mut().copy_from_slice(inputs[0].bytes());
    }
}

#[test]
fn an_op_without_a_backward_says_so() {
    let world = World::threads(&Mesh::single(), Device::cpu())
        .expect("one chip")
        .with_threads(1);
    let run = world.run(|chip| {
        let x = chip
            .input("x", [2], chip.replicated(), &FromIndex(x_of))
            .variable();
        chip.record(|| chip.apply_one(Forgetful, &[&x]).sum())
            .backward();
    });
    let error = run.expect_err("there is no backward").to_string();
    assert!(
        error.contains("op 'forgetful' has no backward") && error.contains("own_op.rs:"),
        "{error}"
    );
}
