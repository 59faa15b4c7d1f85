//! `reference.rs` against PyTorch, op by op, forward and backward, to 1e-10 of each tensor's largest entry.
//!
//! The cases come from `tests/fixtures/ops.safetensors`; its README says how it was made. Both sides compute in f64, so the
//! bound leaves five digits to the order of sums. A case in the file that no test here names is a failure.

use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;
use supernode::reference::{self, Activation, Attention, RotaryScaling, RotaryStyle};

const IGNORED: u32 = u32::MAX;

/// One case: its tensors by name, and its parameters.
pub(super) struct Case {
    pub(super) name: String,
    floats: BTreeMap<String, Vec<f64>>,
    ids: BTreeMap<String, Vec<u32>>,
    parameters: Value,
}

impl Case {
    pub(super) fn tensor(&self, name: &str) -> &[f64] {
        let found = self.floats.get(name);
        found.unwrap_or_else(|| panic!("{} has no tensor {name}", self.name))
    }

    pub(super) fn optional(&self, name: &str) -> Option<&[f64]> {
        self.floats.get(name).map(Vec::as_slice)
    }

    pub(super) fn number(&self, name: &str) -> f64 {
        let found = self.parameters[name].as_f64();
        found.unwrap_or_else(|| panic!("{} has no number {name}", self.name))
    }

    pub(super) fn size(&self, name: &str) -> usize {
        self.number(name) as usize
    }

    pub(super) fn flag(&self, name: &str) -> bool {
        let found = self.parameters[name].as_bool();
        found.unwrap_or_else(|| panic!("{} has no flag {name}", self.name))
    }

    /// A number that the case may leave out.
    pub(super) fn maybe(&self, name: &str) -> Option<f64> {
        self.parameters[name].as_f64()
    }

    pub(super) fn has_documents(&self) -> bool {
        self.ids.contains_key("query_documents")
    }

    /// Rounds every tensor.
    pub(super) fn round(&mut self, round: impl Fn(f64) -> f64) {
        let all = self.floats.values_mut().flatten();
        all.for_each(|x| *x = round(*x));
    }

    /// What an attention case attends to.
    pub(super) fn attention(&self) -> Attention<'_> {
        let documents = self
            .ids
            .get("query_documents")
            .map(|q| (&q[..], &self.ids["key_documents"][..]));
        Attention {
            batch: self.size("batch"),
            heads: self.size("heads"),
            kv_heads: self.size("kv_heads"),
            queries: self.size("queries"),
            keys: self.size("keys"),
            head_dim: self.size("head_dim"),
            scale: self.number("scale"),
            soft_cap: self.maybe("soft_cap"),
            causal: self.flag("causal"),
            window: self.maybe("window").map(|w| w as usize),
            offset: self.size("offset"),
            documents,
        }
    }

    /// Panics unless `got` is the tensor `name` to 1e-10 of its largest entry.
    fn expect(&self, name: &str, got: &[f64]) {
        let want = self.tensor(name);
        let largest = want.iter().fold(0.0, |m: f64, x| m.max(x.abs()));
        let bound = vec![1e-10 * largest; want.len()];
        reference::assert_within(&format!("{}/{name}", self.name), got, want, &bound);
    }
}

/// All cases of the file.
pub(super) fn cases() -> Vec<Case> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/ops.safetensors");
    let bytes = std::fs::read(path).unwrap();
    let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
    let listed: Value =
        serde_json::from_str(&header.metadata().as_ref().unwrap()["cases"]).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let listed = listed["cases"].as_object().unwrap().iter();
    listed
        .map(|(name, parameters)| {
            let mut case = Case {
                name: name.clone(),
                floats: BTreeMap::new(),
                ids: BTreeMap::new(),
                parameters: parameters.clone(),
            };
            for (key, view) in file.tensors() {
                let Some(key) = key.strip_prefix(&format!("{name}/")) else {
                    continue;
                };
                match view.dtype() {
                    Dtype::F64 => {
                        let read = |b: &[u8]| f64::from_le_bytes(b.try_into().unwrap());
                        let x = view.data().chunks_exact(8).map(read).collect();
                        case.floats.insert(key.into(), x);
                    }
                    _ => {
                        assert_eq!(view.dtype(), Dtype::U32, "{name}/{key}");
                        let read = |b: &[u8]| u32::from_le_bytes(b.try_into().unwrap());
                        let x = view.data().chunks_exact(4).map(read).collect();
                        case.ids.insert(key.into(), x);
                    }
                }
            }
            case
        })
        .collect()
}

/// The part of a case's name before the dot: which op it tests.
pub(super) fn op(case: &Case) -> &str {
    case.name.split('.').next().unwrap()
}

/// What an op's cases are handed to.
type Check = fn(&Case);

/// Every op of the file, and who checks it.
const CHECKS: [(&str, Check); 13] = [
    ("attention", attention),
    ("layer_norm", layer_norm),
    ("rms_norm", rms_norm),
    ("rotary", rotary),
    ("activation", activation),
    ("swiglu", swiglu),
    ("linear", linear),
    ("embedding", embedding),
    ("cross_entropy", cross_entropy),
    ("mean_loss", mean_loss),
    ("softmax", softmax),
    ("adamw", optimizer),
    ("sgd", optimizer),
];

#[test]
fn the_textbook_agrees_with_pytorch() {
    let cases = cases();
    for case in &cases {
        let name = op(case);
        let check = CHECKS.iter().find(|(op, _)| *op == name);
        let (_, check) = check.unwrap_or_else(|| panic!("nothing checks {}", case.name));
        check(case);
    }
    for (name, _) in CHECKS {
        assert!(cases.iter().any(|c| op(c) == name), "no case of {name}");
    }
}

fn attention(case: &Case) {
    let g = case.attention();
    let [q, k, v] = ["q", "k", "v"].map(|x| case.tensor(x));
    let (o, lse) = reference::attention(&g, q, k, v);
    case.expect("y", &o);
    case.expect("lse", &lse);
    let [dq, dk, dv] = reference::attention_backward(&g, [q, k, v], &o, &lse, case.tensor("dy"));
    case.expect("dq", &dq);
    case.expect("dk", &dk);
    case.expect("dv", &dv);
}

fn layer_norm(case: &Case) {
    let (s, x, w) = (
        [case.size("r"), case.size("c")],
        case.tensor("x"),
        case.optional("weight"),
    );
    let bias = case.optional("bias");
    let (y, mean, rstd) = reference::layer_norm(s, x, w, bias, case.number("eps"));
    case.expect("y", &y);
    let [dx, dweight, dbias] =
        reference::layer_norm_backward(s, x, w, &mean, &rstd, case.tensor("dy"));
    case.expect("dx", &dx);
    if w.is_some() {
        case.expect("dweight", &dweight);
    }
    if bias.is_some() {
        case.expect("dbias", &dbias);
    }
}

fn rms_norm(case: &Case) {
    let (s, x, w) = (
        [case.size("r"), case.size("c")],
        case.tensor("x"),
        case.optional("weight"),
    );
    let (y, rstd) = reference::rms_norm(s, x, w, case.number("eps"));
    case.expect("y", &y);
    let [dx, dweight] = reference::rms_norm_backward(s, x, w, &rstd, case.tensor("dy"));
    case.expect("dx", &dx);
    if w.is_some() {
        case.expect("dweight", &dweight);
    }
}

fn rotary(case: &Case) {
    let number = |x: &Value| x.as_f64().unwrap();
    let scaling = match &case.parameters["scaling"] {
        Value::Null => RotaryScaling::None,
        s if s.get("low").is_none() => RotaryScaling::Linear {
            factor: number(&s["factor"]),
        },
        s => RotaryScaling::Llama3 {
            factor: number(&s["factor"]),
            low: number(&s["low"]),
            high: number(&s["high"]),
            original_context: number(&s["original_context"]),
        },
    };
    let style = match case.parameters["style"].as_str().unwrap() {
        "halves" => RotaryStyle::Halves,
        style => {
            assert_eq!(style, "pairs");
            RotaryStyle::Pairs
        }
    };
    let f = reference::rotary_frequencies(case.size("rotary_dim"), case.number("theta"), scaling);
    case.expect("frequencies", &f);
    let (cos, sin) = reference::rotary_table(case.size("offset"), case.size("t"), &f);
    let sizes = ["b", "t", "h", "d"].map(|x| case.size(x));
    case.expect(
        "y",
        &reference::rotary(sizes, case.tensor("x"), &cos, &sin, style),
    );
    let dx = reference::rotary_backward(sizes, case.tensor("dy"), &cos, &sin, style);
    case.expect("dx", &dx);
}

fn activation(case: &Case) {
    let f = match case.name.as_str() {
        "activation.gelu_tanh" => Activation::GeluTanh,
        "activation.gelu_erf" => Activation::GeluErf,
        "activation.silu" => Activation::Silu,
        name => {
            assert_eq!(name, "activation.relu2");
            Activation::Relu2
        }
    };
    let x = case.tensor("x");
    case.expect("y", &reference::activation(f, x));
    case.expect(
        "dx",
        &reference::activation_backward(f, x, case.tensor("dy")),
    );
}

fn swiglu(case: &Case) {
    let [gate, up, dy] = ["gate", "up", "dy"].map(|x| case.tensor(x));
    case.expect("y", &reference::swiglu(gate, up));
    let [dgate, dup] = reference::swiglu_backward(gate, up, dy);
    case.expect("dgate", &dgate);
    case.expect("dup", &dup);
}

fn linear(case: &Case) {
    let f = (case.name == "linear.gelu").then_some(Activation::GeluTanh);
    let s = ["m", "n", "k"].map(|x| case.size(x));
    let [a, b, dy] = ["a", "b", "dy"].map(|x| case.tensor(x));
    let bias = case.optional("bias");
    let (y, z) = reference::linear(s, a, b, bias, f);
    case.expect("y", &y);
    let [da, db, dbias] = reference::linear_backward(s, a, b, &z, f, dy);
    case.expect("da", &da);
    case.expect("db", &db);
    if bias.is_some() {
        case.expect("dbias", &dbias);
    }
}

fn embedding(case: &Case) {
    let (s, ids) = ([case.size("v"), case.size("c")], &case.ids["ids"]);
    case.expect("y", &reference::embedding(s, case.tensor("table"), ids, 0));
    let dtable = reference::embedding_backward(s, ids, 0, case.tensor("dy"));
    case.expect("dtable", &dtable);
}

fn cross_entropy(case: &Case) {
    let (s, valid) = ([case.size("r"), case.size("v")], case.size("valid"));
    let (x, dy, labels) = (case.tensor("x"), case.tensor("dy"), &case.ids["labels"]);
    case.expect("y", &reference::cross_entropy(s, valid, x, labels, IGNORED));
    let dx = reference::cross_entropy_backward(s, valid, x, labels, IGNORED, dy);
    case.expect("dx", &dx);
}

fn mean_loss(case: &Case) {
    let (s, valid) = ([case.size("r"), case.size("v")], case.size("valid"));
    let (x, dy, labels) = (case.tensor("x"), case.tensor("dy"), &case.ids["labels"]);
    let losses = reference::cross_entropy(s, valid, x, labels, IGNORED);
    let (loss, dlosses) = reference::mean_loss(&losses, labels, IGNORED);
    case.expect("y", &[loss]);
    let dlosses = reference::scale(dy[0], &dlosses);
    let dx = reference::cross_entropy_backward(s, valid, x, labels, IGNORED, &dlosses);
    case.expect("dx", &dx);
}

fn softmax(case: &Case) {
    let s = [case.size("r"), case.size("v")];
    let y = reference::softmax(s, case.tensor("x"));
    case.expect("y", &y);
    case.expect("dx", &reference::softmax_backward(s, &y, case.tensor("dy")));
}

/// Three steps of AdamW or SGD on given gradients, clipped; the parameters after each.
fn optimizer(case: &Case) {
    let mut p = case.tensor("p").to_vec();
    let (mut m, mut v) = (vec![0.0; p.len()], vec![0.0; p.len()]);
    let mut found = Vec::new();
    for (step, g) in (1..).zip(case.tensor("g").chunks(p.len())) {
        let factor = reference::clip(reference::global_norm(&[g]), case.number("clip"));
        if case.name == "sgd" {
            let [lr, momentum, weight_decay] =
                ["lr", "momentum", "weight_decay"].map(|x| case.number(x));
            let o = reference::Sgd {
                lr,
                momentum,
                weight_decay,
            };
            (p, m) = reference::sgd(&o, &p, &m, g, factor);
        } else {
            let [lr, beta1, beta2, eps, weight_decay] =
                ["lr", "beta1", "beta2", "eps", "weight_decay"].map(|x| case.number(x));
            let o = reference::AdamW {
                lr,
                beta1,
                beta2,
                eps,
                weight_decay,
                step,
            };
            (p, m, v) = reference::adamw(&o, &p, [&m, &v], g, factor);
        }
        found.extend_from_slice(&p);
    }
    case.expect("y", &found);
}
