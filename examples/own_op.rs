//! A user's own op: implementing [`Op`] is all it takes to be sharded, differentiated, traced and counted.
//!
//! `cargo run --release --example own_op` prints
//!
//! ```text
//! gradient of s: [1008, 1160, 1328, 1512, 1712, 1928]
//! 6 chips (dp=2,tp=3), world ghost, 1 class(es)
//! op (chip 0)                    calls        flop       bytes          ms
//! multiply.backward                  1          8          96         0.00
//! layer_scale.backward               1          8          80         0.00
//! multiply                           1          4          48         0.00
//! accumulate                         1          4          48         0.00
//! layer_scale                        1          4          40         0.00
//! sum                                1          4          20         0.00
//! sum.backward                       1          0          20         0.00
//! moved (chip 0)          axis   calls       bytes       floor     overlap
//! all-reduce                dp       1          8           8          0 %
//! all-gather                tp       1         16          16          0 %
//! peak memory per chip: 512 B of tensors, 8 B of scratch
//! ```

use ndarray::{ArrayD, Axis};
use supernode::mesh::Mesh;
use supernode::ops::{Axes, Backward, Cost, Linear, Op, Saved, Site, misfit};
use supernode::placement::Placement::Shard;
use supernode::spmd::{Chip, Device, FromIndex, Init, World};
use supernode::tensor::{Tensor, TensorType};
use supernode::{DType, Result};

/// `y[b,c] = x[b,c] s[c]`, a learned scale per channel (LayerScale, arXiv:2103.17239), in f32.
///
/// Backward: `dx = dy s`, `ds[c] = sum over b of dy[b,c] x[b,c]`.
#[derive(Clone, Debug)]
pub struct LayerScale;

impl Op for LayerScale {
    fn name(&self) -> &'static str {
        "layer_scale"
    }
    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let row = |x: &TensorType| TensorType::new([x.last()], DType::F32);
        match inputs {
            [x, s] if x.rank() == 2 && x.dtype == s.dtype && *s == row(x) => Ok(vec![x.clone()]),
            _ => Err(misfit(self.name(), "x [b, c] and s [c] in f32", inputs)),
        }
    }
    // From the letters follows where operands may be split, and that ds is a sum over chips that split b.
    fn axes(&self, _: &[TensorType]) -> Axes {
        Axes::new("bc,c->bc").linear(Linear::Each)
    }
    fn cost(&self, inputs: &[TensorType], outputs: &[TensorType]) -> Cost {
        Cost::elementwise(inputs, outputs, 1)
    }
    fn forward(&self, _: &Site, inputs: &[&Tensor], outputs: &mut [Tensor]) {
        write(&mut outputs[0], inputs[0].to_array() * inputs[1].to_array());
    }
    fn saves(&self) -> Saved {
        Saved::INPUTS
    }
    fn backward(&self, _: &Site, backward: &mut Backward) {
        let (x, s) = (backward.input(0).to_array(), backward.input(1).to_array());
        let dy = backward.gradient(0).to_array();
        if let Some(dx) = &mut backward.wanted[0] {
            write(&mut dx.tensor, &dy * &s);
        }
        if let Some(ds) = &mut backward.wanted[1] {
            write(&mut ds.tensor, (dy * x).sum_axis(Axis(0)));
        }
    }
}

fn write(to: &mut Tensor, from: ArrayD<f32>) {
    let to = to.slice_mut().typed::<f32>();
    to.copy_from_slice(&from.into_iter().collect::<Vec<_>>());
}

/// `loss = sum of (x s)^2` with s = 1: the gradient of s, twice the sum of x^2 over b.
pub fn program(chip: &Chip) -> Option<ArrayD<f32>> {
    let split = chip.placed(&[("dp", Shard(0)), ("tp", Shard(1))]);
    let x = chip.input("x", [4, 6], split, &FromIndex(|i| i as f32));
    let s = chip.parameter("s", [6], chip.placed(&[("tp", Shard(0))]), Init::ones());
    let y = chip.record(|| chip.apply_one(LayerScale, &[&x, &s]));
    y.multiply(&y).sum().backward();
    let (_, ds) = chip.take_gradients().swap_remove(0);
    ds.gather().read()
}

/// What `main` prints.
pub fn report() -> Result<String> {
    let mesh = Mesh::new([("dp", 2), ("tp", 3)]);
    let run = World::threads(&mesh, Device::cpu())?.run(program)?;
    let ds = run.outputs()[0].as_ref().expect("real chips have contents");
    let trace = World::ghost(&mesh).trace(program)?;
    Ok(format!("gradient of s: {ds}\n{}", trace.summary()))
}

fn main() -> Result<()> {
    print!("{}", report()?);
    Ok(())
}
