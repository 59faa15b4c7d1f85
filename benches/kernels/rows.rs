//! Everything that is not a matrix product, against a plain stream of the same bytes.
//!
//! An op of rows that reads and writes each byte once is limited by memory, so its ruler is a loop that sums what the op
//! reads and fills what it writes (`MemoryStream`). Both run in turn and the best of each is compared: a ratio of 1.3 says
//! that the op takes 1.3 times as long as the stream. Tensors hold 64 MiB in f32 or more, beyond any first or second cache.
//! What an op keeps beside its operands counts as traffic too (the mean and rstd of a norm); what it touches twice
//! counts once.

use criterion::{BenchmarkId, Criterion, Throughput};
use std::time::{Duration, Instant};
use supernode::kernels::MemoryStream;
use supernode::ops::{
    self, Accum, Activation, AdamW, Backward, Gradient, Local, Op, RotaryStyle, Site,
};
use supernode::random::Stream;
use supernode::tensor::{Memory, Tensor, TensorType};
use supernode::{DType, bf16};

/// Rows and columns of most cases: 16.8 million elements.
const ROWS: usize = 16_384;
const COLUMNS: usize = 1024;

/// An op of rows with its operands in place.
struct Case {
    name: String,
    /// How many times the stream's time is allowed.
    goal: f64,
    reads: u64,
    writes: u64,
    run: Box<dyn FnMut()>,
}

impl Case {
    fn seconds(&mut self) -> f64 {
        let began = Instant::now();
        (self.run)();
        began.elapsed().as_secs_f64()
    }
}

/// Tensors of normal numbers, and of token numbers.
struct Operands(Memory);

impl Operands {
    fn empty(&self, shape: &[usize], dtype: DType) -> Tensor {
        let ty = TensorType::new(shape, dtype);
        self.0.allocate(&ty).expect("memory for the operands")
    }

    fn normal(&self, name: &str, shape: &[usize], dtype: DType) -> Tensor {
        let stream = Stream::new(0, name);
        // A block of normal numbers, repeated: drawing 16 million takes longer than timing them.
        let block: Vec<f32> = (0..65_521).map(|i| stream.normal(i)).collect();
        let mut tensor = self.empty(shape, dtype);
        let source = block.iter().copied().cycle();
        match dtype {
            DType::F32 => fill(tensor.slice_mut().typed::<f32>(), source),
            DType::Bf16 => fill(
                tensor.slice_mut().typed::<bf16>(),
                source.map(bf16::from_f32),
            ),
            other => unreachable!("no case computes on {other}"),
        }
        tensor
    }

    fn numbers(&self, name: &str, shape: &[usize], below: usize) -> Tensor {
        let stream = Stream::new(0, name);
        let mut tensor = self.empty(shape, DType::U32);
        let numbers = (0..).map(|i| stream.below(i, below as u64) as u32);
        fill(tensor.slice_mut().typed::<u32>(), numbers);
        tensor
    }
}

fn fill<T>(to: &mut [T], from: impl Iterator<Item = T>) {
    to.iter_mut().zip(from).for_each(|(x, y)| *x = y);
}

/// An op on whole tensors.
struct Call<O> {
    op: O,
    inputs: Vec<Tensor>,
    outputs: Vec<Tensor>,
    input_locals: Vec<Local>,
    output_locals: Vec<Local>,
}

impl<O: Op> Call<O> {
    fn new(operands: &Operands, op: O, inputs: Vec<Tensor>) -> Self {
        let types: Vec<TensorType> = inputs.iter().map(|x| x.ty().clone()).collect();
        let results = op.infer(&types).unwrap_or_else(|why| panic!("{why}"));
        Call {
            op,
            outputs: results
                .iter()
                .map(|t| operands.empty(&t.shape, t.dtype))
                .collect(),
            inputs,
            input_locals: types.into_iter().map(Local::whole).collect(),
            output_locals: results.into_iter().map(Local::whole).collect(),
        }
    }

    fn forward(&mut self) {
        let inputs: Vec<&Tensor> = self.inputs.iter().collect();
        let site = Site {
            inputs: &self.input_locals,
            outputs: &self.output_locals,
            seed: 0,
        };
        self.op.forward(&site, &inputs, &mut self.outputs);
    }

    fn bytes(tensors: &[Tensor]) -> u64 {
        tensors.iter().map(|x| x.ty().bytes()).sum()
    }

    fn forward_case(mut self, name: &str, goal: f64) -> Case
    where
        O: 'static,
    {
        Case {
            name: name.to_string(),
            goal,
            reads: Self::bytes(&self.inputs),
            writes: Self::bytes(&self.outputs),
            run: Box::new(move || self.forward()),
        }
    }

    /// The gradient of operand 0 and of every later float operand, from that of result 0. What the op says it saves
    /// counts as read, and small statistics with it.
    fn backward_case(mut self, operands: &Operands, name: &str, goal: f64) -> Case
    where
        O: 'static,
    {
        self.forward();
        let dy = operands.normal("dy", self.outputs[0].shape(), self.outputs[0].dtype());
        let saved = self.op.saves();
        let keep = |bits: u32, all: &[Tensor]| -> Vec<Option<Tensor>> {
            let kept = |(i, x): (usize, &Tensor)| (bits >> i & 1 == 1).then(|| x.clone());
            all.iter().enumerate().map(kept).collect()
        };
        let mut inputs = keep(saved.inputs, &self.inputs);
        let outputs = keep(saved.outputs, &self.outputs);
        let total = |all: &[Option<Tensor>]| -> u64 {
            all.iter().flatten().map(|x| x.ty().bytes()).sum::<u64>()
        };
        let reads = total(&inputs) + total(&outputs) + dy.ty().bytes();
        let mut wanted: Vec<Option<Gradient>> = Vec::new();
        for (i, x) in self.inputs.iter().enumerate() {
            let reused = self.op.reuses() == Some(i);
            wanted.push(self.op.differentiable(i).then(|| Gradient {
                tensor: if reused {
                    inputs[i]
                        .take()
                        .expect("an operand that is reused is saved")
                } else {
                    operands.empty(x.shape(), if i == 0 { x.dtype() } else { DType::F32 })
                },
                accum: Accum::Replace,
                reused,
            }));
        }
        let writes = wanted.iter().flatten();
        let writes = writes.map(|g| g.tensor.ty().bytes()).sum::<u64>();
        self.inputs.clear();
        self.outputs.clear();
        let mut gradients = vec![None; self.output_locals.len()];
        gradients[0] = Some(dy);
        Case {
            name: name.to_string(),
            goal,
            reads,
            writes,
            run: Box::new(move || {
                let site = Site {
                    inputs: &self.input_locals,
                    outputs: &self.output_locals,
                    seed: 0,
                };
                self.op.backward(
                    &site,
                    &mut Backward {
                        inputs: &inputs,
                        outputs: &outputs,
                        gradients: &gradients,
                        wanted: &mut wanted,
                    },
                );
            }),
        }
    }
}

/// The goal of what only moves memory, and of what computes more.
const PLAIN: f64 = 1.3;
const HEAVY: f64 = 2.0;

/// A case, made when its turn comes: all together would not fit a small machine.
type Made = Box<dyn Fn(&Operands) -> Case>;

fn forward<O: Op>(
    cases: &mut Vec<Made>,
    name: &'static str,
    goal: f64,
    make: impl Fn(&Operands) -> (O, Vec<Tensor>) + 'static,
) {
    cases.push(Box::new(move |o| {
        let (op, inputs) = make(o);
        Call::new(o, op, inputs).forward_case(name, goal)
    }));
}

fn both<O: Op>(
    cases: &mut Vec<Made>,
    [name, back]: [&'static str; 2],
    goal: f64,
    make: impl Fn(&Operands) -> (O, Vec<Tensor>) + Clone + 'static,
) {
    forward(cases, name, goal, make.clone());
    cases.push(Box::new(move |o| {
        let (op, inputs) = make(o);
        Call::new(o, op, inputs).backward_case(o, back, goal)
    }));
}

fn all() -> Vec<Made> {
    let mut all = Vec::new();
    norms(&mut all);
    pointwise(&mut all);
    losses(&mut all);
    moved(&mut all);
    all.push(Box::new(adamw));
    all
}

fn matrix(o: &Operands) -> Tensor {
    o.normal("x", &[ROWS, COLUMNS], DType::F32)
}

fn norms(all: &mut Vec<Made>) {
    both(all, ["layer_norm", "layer_norm.backward"], PLAIN, |o| {
        let [w, b] = ["w", "b"].map(|name| o.normal(name, &[COLUMNS], DType::F32));
        let op = ops::LayerNorm {
            eps: 1e-5,
            weight: true,
            bias: true,
        };
        (op, vec![matrix(o), w, b])
    });
    both(all, ["rms_norm", "rms_norm.backward"], PLAIN, |o| {
        let w = o.normal("w", &[COLUMNS], DType::F32);
        let op = ops::RmsNorm {
            eps: 1e-5,
            weight: true,
        };
        (op, vec![matrix(o), w])
    });
    both(all, ["softmax", "softmax.backward"], PLAIN, |o| {
        (ops::Softmax, vec![matrix(o)])
    });
    forward(all, "sum", PLAIN, |o| (ops::Sum, vec![matrix(o)]));
    forward(all, "sum_of_squares", PLAIN, |o| {
        (ops::SumOfSquares, vec![matrix(o)])
    });
    both(all, ["bias", "bias.backward (column sum)"], PLAIN, |o| {
        let b = o.normal("b", &[COLUMNS], DType::F32);
        (ops::AddBias, vec![matrix(o), b])
    });
}

fn pointwise(all: &mut Vec<Made>) {
    forward(all, "add", PLAIN, |o| {
        (
            ops::Add,
            vec![matrix(o), o.normal("y", &[ROWS, COLUMNS], DType::F32)],
        )
    });
    for (dtype, goal, names) in [
        (
            DType::F32,
            PLAIN,
            [
                ["gelu erf", "gelu erf.backward"],
                ["gelu tanh", "gelu tanh.backward"],
                ["silu", "silu.backward"],
            ],
        ),
        (
            DType::Bf16,
            HEAVY,
            [
                ["gelu erf bf16", "gelu erf.backward bf16"],
                ["gelu tanh bf16", "gelu tanh.backward bf16"],
                ["silu bf16", "silu.backward bf16"],
            ],
        ),
    ] {
        let kinds = [Activation::GeluErf, Activation::GeluTanh, Activation::Silu];
        for (activation, names) in kinds.into_iter().zip(names) {
            both(all, names, goal, move |o| {
                let x = o.normal("x", &[ROWS, COLUMNS], dtype);
                (ops::Activate { activation }, vec![x])
            });
        }
    }
    both(all, ["swiglu", "swiglu.backward"], PLAIN, |o| {
        let up = o.normal("up", &[ROWS, COLUMNS], DType::F32);
        (ops::SwiGlu, vec![matrix(o), up])
    });
    forward(all, "dropout", HEAVY, |o| {
        let op = ops::Dropout {
            p: 0.1,
            name: "drop".to_string(),
            order: Default::default(),
            rows_before: 0,
        };
        (op, vec![matrix(o)])
    });
    for (name, style) in [
        ("rotary halves", RotaryStyle::Halves),
        ("rotary pairs", RotaryStyle::Pairs),
    ] {
        forward(all, name, PLAIN, move |o| {
            let op = ops::Rotary {
                style,
                ..Default::default()
            };
            (op, vec![o.normal("x", &[16, 1024, 16, 64], DType::F32)])
        });
    }
}

fn losses(all: &mut Vec<Made>) {
    for (v, rows, dtype, names) in [
        (
            50_257,
            512,
            DType::F32,
            ["cross_entropy 50k", "cross_entropy.backward 50k"],
        ),
        (
            128_256,
            256,
            DType::F32,
            ["cross_entropy 128k", "cross_entropy.backward 128k"],
        ),
    ] {
        both(all, names, PLAIN, move |o| {
            let logits = o.normal("x", &[rows, v], dtype);
            let labels = o.numbers("labels", &[rows], v);
            (ops::CrossEntropy::default(), vec![logits, labels])
        });
    }
}

fn moved(all: &mut Vec<Made>) {
    for (dtype, output, name) in [
        (DType::F32, DType::Bf16, "cast f32 to bf16"),
        (DType::Bf16, DType::F32, "cast bf16 to f32"),
    ] {
        forward(all, name, PLAIN, move |o| {
            let x = o.normal("x", &[ROWS, COLUMNS], dtype);
            (ops::Cast { dtype: output }, vec![x])
        });
    }
    forward(all, "transpose", PLAIN, |o| {
        let x = o.normal("x", &[4096, 4096], DType::F32);
        (ops::Transpose { order: vec![1, 0] }, vec![x])
    });
    forward(all, "transpose heads", PLAIN, |o| {
        let x = o.normal("x", &[16, 1024, 16, 64], DType::F32);
        let order = vec![0, 2, 1, 3];
        (ops::Transpose { order }, vec![x])
    });
    forward(all, "transpose keys", PLAIN, |o| {
        let x = o.normal("x", &[16, 1024, 16, 64], DType::F32);
        let order = vec![0, 2, 3, 1];
        (ops::Transpose { order }, vec![x])
    });
    forward(all, "embedding", PLAIN, |o| {
        // As many rows of the table as tokens, so that each byte is read about once.
        let table = o.normal("table", &[ROWS, COLUMNS], DType::F32);
        let ids = o.numbers("ids", &[ROWS], ROWS);
        (ops::Embedding::default(), vec![table, ids])
    });
}

fn adamw(o: &Operands) -> Case {
    let [mut p, mut m, mut v, g] =
        ["p", "m", "v", "g"].map(|name| o.normal(name, &[ROWS, COLUMNS], DType::F32));
    v.slice_mut()
        .typed::<f32>()
        .iter_mut()
        .for_each(|x| *x *= *x);
    let bytes = p.ty().bytes();
    let rule = AdamW::default();
    Case {
        name: "adamw".to_string(),
        goal: PLAIN,
        reads: 4 * bytes,
        writes: 3 * bytes,
        run: Box::new(move || rule.update(&mut p, &mut m, &mut v, &g, None)),
    }
}

/// For how long a case is timed in turn with its stream, at least.
const BUDGET: Duration = Duration::from_millis(700);

/// Prints how many times the stream's time each op takes on `threads` threads, the current pool's.
pub(crate) fn table(threads: usize, wanted: &str) {
    let operands = Operands(Memory::cpu(None));
    println!(
        "{:<32}{:>10}{:>10}{:>8}{:>7}",
        "op of rows", "ms", "stream", "ratio", "goal"
    );
    for make in all() {
        let mut case = make(&operands);
        if !case.name.contains(wanted) {
            continue;
        }
        let mut stream = MemoryStream::new(case.reads, case.writes);
        let (mut best, mut rate) = (f64::INFINITY, 0.0f64);
        case.seconds();
        let began = Instant::now();
        while began.elapsed() < BUDGET {
            for _ in 0..3 {
                best = best.min(case.seconds());
            }
            rate = rate.max(stream.bytes_per_second());
        }
        let least = (case.reads + case.writes) as f64 / rate;
        let ratio = best / least;
        let missed = if ratio <= case.goal { "" } else { "  missed" };
        println!(
            "{:<32}{:>10.3}{:>10.3}{ratio:>8.2}{:>7.1}{missed}  {threads} thread(s)",
            case.name,
            best * 1e3,
            least * 1e3,
            case.goal
        );
    }
}

/// The same cases under criterion, each beside a pass over as many bytes.
pub(crate) fn bench(c: &mut Criterion, threads: usize) {
    let operands = Operands(Memory::cpu(None));
    let mut group = c.benchmark_group(format!("rows, {threads} thread(s)"));
    for make in all() {
        let mut case = make(&operands);
        group.throughput(Throughput::Bytes(case.reads + case.writes));
        group.bench_function(BenchmarkId::from_parameter(&case.name), |bench| {
            bench.iter(|| (case.run)());
        });
    }
    group.finish();
}
