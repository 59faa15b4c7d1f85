//! A user's own op: an implementation of [`Op`] is all it takes to be sharded, differentiated, traced and counted.
//!
//! `cargo run --release --example own_op` prints
//!
//! ```text
//! ```

use ndarray::ArrayD;
use std::fmt::Write;
use supernode::mesh::Mesh;
use supernode::ops::{Axes, Backward, Cost, Linear, Op, Saved, Site, letters_besides, misfit};
use supernode::placement::Placement::Shard;
use supernode::spmd::{Chip, Device, FromIndex, Init, World};
use supernode::tensor::{Tensor, TensorType};
use supernode::{DType, Result};

/// `y[.., c] = x[.., c] s[c]`, a learned scale per channel (LayerScale: Touvron et al. 2021, arXiv:2103.17239), in f32.
///
/// Backward: `dx = dy s`, `ds = sum over rows of dy x`.
#[derive(Clone, Debug)]
pub struct LayerScale;

impl Op for LayerScale {
    fn name(&self) -> &'static str {
        "layer_scale"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let f32s = inputs.iter().all(|t| t.dtype == DType::F32);
        match inputs {
            [x, s] if f32s && x.rank() > 0 && s.shape == [x.last()] => Ok(vec![x.clone()]),
            _ => Err(misfit("layer_scale", "x [.., c] and s [c] in f32", inputs)),
        }
    }

    // From these letters follows where the operands may be split, and that ds is a partial sum over what splits the rows.
    fn axes(&self, inputs: &[TensorType]) -> Axes {
        let rows = letters_besides(inputs[0].rank() - 1, "c");
        Axes::new(&format!("{rows}c,c->{rows}c")).linear(Linear::Each)
    }

    fn cost(&self, inputs: &[TensorType], outputs: &[TensorType]) -> Cost {
        Cost::elementwise(inputs, outputs, 1)
    }

    fn forward(&self, _: &Site, inputs: &[&Tensor], outputs: &mut [Tensor]) {
        let [x, s] = [inputs[0], inputs[1]].map(|t| t.slice().typed::<f32>());
        let y = outputs[0].slice_mut().typed::<f32>();
        y.iter_mut()
            .zip(x)
            .zip(s.iter().cycle())
            .for_each(|((y, x), s)| *y = x * s);
    }

    fn saves(&self) -> Saved {
        Saved::INPUTS
    }

    fn backward(&self, _: &Site, backward: &mut Backward) {
        let [x, s] = [0, 1].map(|i| backward.input(i).slice().typed::<f32>());
        let dy = backward.gradient(0).slice().typed::<f32>();
        if let Some(dx) = &mut backward.wanted[0] {
            let dx = dx.tensor.slice_mut().typed::<f32>();
            dx.iter_mut()
                .zip(dy)
                .zip(s.iter().cycle())
                .for_each(|((dx, dy), s)| *dx = dy * s);
        }
        if let Some(ds) = &mut backward.wanted[1] {
            let (ds, c) = (ds.tensor.slice_mut().typed::<f32>(), s.len());
            let column = |j: usize| {
                dy.iter()
                    .zip(x)
                    .skip(j)
                    .step_by(c)
                    .map(|(dy, x)| dy * x)
                    .sum()
            };
            ds.iter_mut()
                .enumerate()
                .for_each(|(j, ds)| *ds = column(j));
        }
    }
}

/// `loss = sum (x s)^2` for x [4, 6] with s = 1: the gradient of s, which is twice the sum over rows of x^2.
pub fn program(chip: &Chip) -> Option<ArrayD<f32>> {
    let split = chip.placed(&[("dp", Shard(0)), ("tp", Shard(1))]);
    let x = chip.input("x", [4, 6], split, &FromIndex(|i| i as f32));
    let loss = chip.record(|| {
        let s = chip.parameter("s", [6], chip.placed(&[("tp", Shard(0))]), Init::ones());
        let y = chip.apply_one(LayerScale, &[&x, &s]);
        y.multiply(&y).sum()
    });
    loss.backward();
    let (_, ds) = chip.take_gradients().swap_remove(0);
    ds.gather().read()
}

/// What `main` prints.
pub fn report() -> Result<String> {
    let mut out = String::new();
    for mesh in [Mesh::single(), Mesh::new([("dp", 2), ("tp", 3)])] {
        let run = World::threads(&mesh, Device::cpu())?.run(program)?;
        let ds = run.outputs()[0].as_ref().expect("real chips have contents");
        let _ = writeln!(out, "{mesh}: gradient of s = {ds}");
        for op in run
            .trace()
            .chip(0)
            .ops
            .iter()
            .filter(|o| o.op.starts_with("layer_scale"))
        {
            let _ = writeln!(
                out,
                "  {}: {} flop, {} bytes on a chip",
                op.op, op.flops, op.bytes
            );
        }
        for c in run.trace().collectives() {
            let _ = writeln!(out, "  {} over {}: {} bytes", c.op, c.axis, c.bytes);
        }
    }
    Ok(out)
}

fn main() -> Result<()> {
    print!("{}", report()?);
    Ok(())
}
