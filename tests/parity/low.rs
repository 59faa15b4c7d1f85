//! Narrow types against PyTorch: an op's largest error in bf16 or f16 is at most twice PyTorch's own in that type.
//!
//! Both errors are against exact results from the same rounded operands; PyTorch's stand in `tests/fixtures/errors.json`. The bound
//! is that of FlashAttention's tests (Dao et al. 2022).

use super::ops::{Case, cases, op};
use half::{bf16, f16};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;
use supernode::DType;
use supernode::mesh::Mesh;
use supernode::ops::{self, Activate, Activation, LayerNorm, Matmul, Op, RmsNorm, Softmax, SwiGlu};
use supernode::reference;
use supernode::spmd::{Chip, Device, Sharded, World};

type Results = BTreeMap<String, Vec<f64>>;

fn round(dtype: DType, x: f64) -> f64 {
    match dtype {
        DType::Bf16 => bf16::from_f64(x).to_f64(),
        DType::F16 => f16::from_f64(x).to_f64(),
        other => panic!("{other} is no narrow type"),
    }
}

/// An op on its operands.
type Apply = Box<dyn Fn(&Chip, &[&Sharded]) -> Sharded + Send + Sync>;

/// What is computed of a case: the op, its operands by name and shape in the op's order, and the result's shape.
struct Work {
    op: Apply,
    operands: Vec<(&'static str, Vec<usize>)>,
    /// Attention's heads stand before tokens in the file.
    by_heads: bool,
}

fn work(case: &Case) -> Option<Work> {
    let size = |name: &str| case.size(name);
    let has = |name: &str| case.optional(name).is_some();
    fn apply<O: Op + Clone + Send + Sync + 'static>(op: O) -> Apply {
        Box::new(move |chip, x| chip.apply(op.clone(), x).swap_remove(0))
    }
    let work = |op, operands| {
        Some(Work {
            op,
            operands,
            by_heads: false,
        })
    };
    match op(case) {
        "attention" if !case.has_documents() => Some(Work {
            op: apply(ops::Attention {
                causal: case.flag("causal"),
                window: case.maybe("window").map(|w| w as usize),
                offset: size("offset"),
                scale: Some(case.number("scale") as f32),
                soft_cap: case.maybe("soft_cap").map(|c| c as f32),
                documents: false,
                offsets: None,
            }),
            operands: [
                ("q", "heads", "queries"),
                ("k", "kv_heads", "keys"),
                ("v", "kv_heads", "keys"),
            ]
            .map(|(x, h, t)| (x, ["batch", h, t, "head_dim"].map(size).to_vec()))
            .to_vec(),
            by_heads: true,
        }),
        "layer_norm" | "rms_norm" => {
            let (r, c, eps) = (size("r"), size("c"), case.number("eps") as f32);
            let (weight, bias) = (has("weight"), has("bias"));
            let all = [("x", vec![r, c]), ("weight", vec![c]), ("bias", vec![c])];
            let operands = all.into_iter().filter(|(x, _)| has(x)).collect();
            let norm = match op(case) {
                "layer_norm" => apply(LayerNorm { eps, weight, bias }),
                _ => apply(RmsNorm { eps, weight }),
            };
            work(norm, operands)
        }
        "activation" => {
            let activation = match case.name.as_str() {
                "activation.gelu_tanh" => Activation::GeluTanh,
                "activation.gelu_erf" => Activation::GeluErf,
                "activation.silu" => Activation::Silu,
                _ => Activation::Relu2,
            };
            let n = case.tensor("x").len();
            work(apply(Activate { activation }), vec![("x", vec![n])])
        }
        "swiglu" => {
            let n = case.tensor("up").len();
            work(apply(SwiGlu), vec![("gate", vec![n]), ("up", vec![n])])
        }
        "softmax" => work(apply(Softmax), vec![("x", vec![size("r"), size("v")])]),
        "linear" => {
            let [m, n, k] = ["m", "n", "k"].map(size);
            let product = Matmul {
                bias: has("bias"),
                activation: (case.name == "linear.gelu").then_some(Activation::GeluTanh),
                ..Matmul::default()
            };
            let all = [("a", vec![m, k]), ("b", vec![k, n]), ("bias", vec![n])];
            let operands = all.into_iter().filter(|(x, _)| has(x)).collect();
            work(apply(product), operands)
        }
        _ => None,
    }
}

/// The exact results of a case whose operands were rounded.
fn exact(case: &Case) -> Results {
    let dy = case.tensor("dy");
    let named = |names: &[&str], values: Vec<Vec<f64>>| {
        names.iter().map(|n| n.to_string()).zip(values).collect()
    };
    match op(case) {
        "attention" => {
            let g = case.attention();
            let [q, k, v] = ["q", "k", "v"].map(|x| case.tensor(x));
            let (o, lse) = reference::attention(&g, q, k, v);
            let [dq, dk, dv] = reference::attention_backward(&g, [q, k, v], &o, &lse, dy);
            named(&["y", "dq", "dk", "dv"], vec![o, dq, dk, dv])
        }
        "layer_norm" => {
            let (s, x, w) = (
                [case.size("r"), case.size("c")],
                case.tensor("x"),
                case.optional("weight"),
            );
            let (y, mean, rstd) =
                reference::layer_norm(s, x, w, case.optional("bias"), case.number("eps"));
            let [dx, dweight, dbias] = reference::layer_norm_backward(s, x, w, &mean, &rstd, dy);
            named(
                &["y", "dx", "dweight", "dbias"],
                vec![y, dx, dweight, dbias],
            )
        }
        "rms_norm" => {
            let (s, x, w) = (
                [case.size("r"), case.size("c")],
                case.tensor("x"),
                case.optional("weight"),
            );
            let (y, rstd) = reference::rms_norm(s, x, w, case.number("eps"));
            let [dx, dweight] = reference::rms_norm_backward(s, x, w, &rstd, dy);
            named(&["y", "dx", "dweight"], vec![y, dx, dweight])
        }
        "activation" => {
            let f = match case.name.as_str() {
                "activation.gelu_tanh" => reference::Activation::GeluTanh,
                "activation.gelu_erf" => reference::Activation::GeluErf,
                "activation.silu" => reference::Activation::Silu,
                _ => reference::Activation::Relu2,
            };
            let x = case.tensor("x");
            let dx = reference::activation_backward(f, x, dy);
            named(&["y", "dx"], vec![reference::activation(f, x), dx])
        }
        "swiglu" => {
            let [gate, up] = ["gate", "up"].map(|x| case.tensor(x));
            let [dgate, dup] = reference::swiglu_backward(gate, up, dy);
            named(
                &["y", "dgate", "dup"],
                vec![reference::swiglu(gate, up), dgate, dup],
            )
        }
        "softmax" => {
            let s = [case.size("r"), case.size("v")];
            let y = reference::softmax(s, case.tensor("x"));
            let dx = reference::softmax_backward(s, &y, dy);
            named(&["y", "dx"], vec![y, dx])
        }
        _ => {
            let f = (case.name == "linear.gelu").then_some(reference::Activation::GeluTanh);
            let s = ["m", "n", "k"].map(|x| case.size(x));
            let [a, b] = ["a", "b"].map(|x| case.tensor(x));
            let (y, z) = reference::linear(s, a, b, case.optional("bias"), f);
            let [da, db, dbias] = reference::linear_backward(s, a, b, &z, f, dy);
            named(&["y", "da", "db", "dbias"], vec![y, da, db, dbias])
        }
    }
}

fn input(chip: &Chip, name: &str, shape: &[usize], dtype: DType, values: &[f64]) -> Sharded {
    let (shape, place) = (shape.to_vec(), chip.replicated());
    match dtype {
        DType::Bf16 => {
            let x: Vec<bf16> = values.iter().map(|&x| bf16::from_f64(x)).collect();
            chip.input(name, shape, place, &x)
        }
        _ => {
            let x: Vec<f16> = values.iter().map(|&x| f16::from_f64(x)).collect();
            chip.input(name, shape, place, &x)
        }
    }
}

/// The case on a chip in `dtype`.
fn computed(device: &Device, dtype: DType, case: &Case, work: &Work) -> Results {
    let turned = |shape: &[usize], x: &[f64]| match work.by_heads {
        true => reference::permute(shape, &[0, 2, 1, 3], x),
        false => x.to_vec(),
    };
    let placed = |shape: &[usize]| match (work.by_heads, shape) {
        (true, &[b, h, t, d]) => vec![b, t, h, d],
        _ => shape.to_vec(),
    };
    let world = World::threads(&Mesh::single(), device.clone()).expect("it was opened before");
    let run = world.run(|chip| {
        let operands: Vec<Sharded> = work
            .operands
            .iter()
            .map(|(name, shape)| {
                let x = turned(shape, case.tensor(name));
                input(chip, name, &placed(shape), dtype, &x).variable()
            })
            .collect();
        let mut y = None;
        let loss = chip.record(|| {
            let inputs: Vec<&Sharded> = operands.iter().collect();
            let result = (work.op)(chip, &inputs);
            let first = &work.operands[0].1;
            let dy = match work.by_heads {
                true => turned(first, case.tensor("dy")),
                false => case.tensor("dy").to_vec(),
            };
            let dy = input(chip, "dy", result.shape(), dtype, &dy);
            y = Some(result.detach());
            result.multiply(&dy).sum()
        });
        loss.backward();
        let read = |name: String, x: &Sharded| {
            let values: Vec<f64> = x
                .read()
                .expect("a real chip")
                .iter()
                .map(|&x| x.into())
                .collect();
            // Back to heads before tokens.
            (name, turned(x.shape(), &values))
        };
        let mut found = vec![read("y".into(), y.as_ref().expect("recorded"))];
        for ((name, _), x) in work.operands.iter().zip(&operands) {
            let gradient = chip.take_gradient(x).expect("all are differentiable");
            found.push(read(format!("d{name}"), &gradient));
        }
        found
    });
    let mut outputs = run
        .unwrap_or_else(|e| panic!("{} in {dtype}: {e}", case.name))
        .into_outputs();
    outputs.remove(0).into_iter().collect()
}

fn largest_difference(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let differences = a.iter().zip(b).map(|(a, b)| (a - b).abs());
    differences.fold(0.0, |m, d| if d <= m { m } else { d })
}

/// Every case of the file on `device`.
pub(crate) fn check_on(device: &Device) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/errors.json");
    let file: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let mut compared = 0;
    for dtype in [DType::Bf16, DType::F16] {
        let errors = file[dtype.name()].as_object().expect("a map by case");
        for mut case in cases() {
            let (Some(errors), Some(work)) = (errors.get(&case.name), work(&case)) else {
                continue;
            };
            case.round(|x| round(dtype, x));
            let (want, got) = (exact(&case), computed(device, dtype, &case, &work));
            for (name, pytorch) in errors.as_object().expect("a map by tensor") {
                let error = largest_difference(&got[name], &want[name]);
                let pytorch = pytorch.as_f64().expect("a number");
                assert!(
                    error <= 2.0 * pytorch,
                    "{} {name} in {dtype} on {device}: off by {error:e}, PyTorch by {pytorch:e}",
                    case.name
                );
                compared += 1;
            }
        }
    }
    assert!(compared >= 100, "only {compared} tensors were compared");
}

#[test]
fn narrow_types_are_as_exact_as_pytorchs() {
    check_on(&Device::cpu());
}
