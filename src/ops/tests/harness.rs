//! Runs any op on one chip and on two, and holds it to bounds that the caller derives for f32 arithmetic.
//!
//! What a type rounds on storing is added here. Memory starts as NaN, so an element that is not written shows.

use crate::dtype::DType;
use crate::ops::{Accum, Backward, Gradient, Local, Op, Site};
use crate::reference::{self, assert_within, rounding};
use crate::tensor::{Memory, Tensor, TensorType};
use half::{bf16, f16};
#[cfg(feature = "gpu")]
use std::cell::RefCell;
use std::ops::Range;

#[cfg(feature = "gpu")]
thread_local! {
    /// The graphics processor's chip that cases of this thread run on.
    static CHIP: RefCell<Option<crate::gpu::Chip>> = const { RefCell::new(None) };
}

/// Whether cases of this thread run on a graphics processor. A bound of the matrix unit's asks, which x86-64 alone has.
#[cfg(target_arch = "x86_64")]
pub(super) fn is_on_gpu() -> bool {
    #[cfg(feature = "gpu")]
    return CHIP.with_borrow(|chip| chip.is_some());
    #[cfg(not(feature = "gpu"))]
    false
}

/// Runs cases on the first graphics processor. A machine without one leaves them out and says so, or fails where
/// `SUPERNODE_REQUIRE_GPU` is set.
#[cfg(feature = "gpu")]
pub(super) fn on_gpu(cases: impl FnOnce()) {
    run_on(crate::gpu::Chip::open(0), cases);
}

/// The same with kernels as another kind of adapter has them.
#[cfg(feature = "gpu")]
pub(super) fn on_gpu_as(class: crate::gpu::Class, cases: impl FnOnce()) {
    run_on(crate::gpu::Chip::open_as(0, class), cases);
}

#[cfg(feature = "gpu")]
fn run_on(chip: crate::Result<crate::gpu::Chip>, cases: impl FnOnce()) {
    match chip {
        Ok(chip) => CHIP.set(Some(chip)),
        Err(why) => {
            let required = std::env::var_os("SUPERNODE_REQUIRE_GPU").is_some();
            assert!(!required, "SUPERNODE_REQUIRE_GPU is set, but {why}");
            eprintln!("ignored: {why}");
            return;
        }
    }
    let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(cases));
    // Not when the thread ends: wgpu's own thread-local values may be gone by then.
    CHIP.set(None);
    if let Err(payload) = ended {
        match payload.downcast::<crate::Error>() {
            Ok(error) => panic!("{error}"),
            Err(payload) => std::panic::resume_unwind(payload),
        }
    }
}

/// Memory of the device that cases run on.
pub(super) fn memory() -> Memory {
    #[cfg(feature = "gpu")]
    if let Some(chip) = CHIP.with_borrow(Clone::clone) {
        return Memory::gpu(chip, None);
    }
    Memory::cpu(None)
}

/// Unit roundoff of the arithmetic inside every op.
pub(super) const U: f64 = 1.0 / (1u64 << 24) as f64;

/// The float types, for tables of cases.
pub(super) const FLOATS: [DType; 3] = [DType::F32, DType::Bf16, DType::F16];

/// What is wanted, and how far each element may be from it before it is stored.
pub(super) type Bounded = (Vec<f64>, Vec<f64>);

/// Exactly this.
pub(super) fn exact(want: Vec<f64>) -> Bounded {
    let bound = vec![0.0; want.len()];
    (want, bound)
}

/// This within `k` roundings of each element.
pub(super) fn rounded(want: Vec<f64>, k: usize) -> Bounded {
    let bound = want
        .iter()
        .map(|x| reference::gamma(k, U) * x.abs() + 1e-43)
        .collect();
    (want, bound)
}

/// A tensor's type and its contents, which the type holds exactly.
#[derive(Clone, Debug)]
pub(super) struct Array {
    pub(super) ty: TensorType,
    pub(super) values: Vec<f64>,
}

impl Array {
    /// Normal random numbers, rounded to `dtype`.
    pub(super) fn normal(name: &str, shape: &[usize], dtype: DType) -> Self {
        let values = reference::normals(name, shape.iter().product());
        Self::rounded(shape, dtype, values)
    }

    /// Whole numbers.
    pub(super) fn indices(shape: &[usize], values: &[u32]) -> Self {
        let values = values.iter().map(|&x| x.into()).collect();
        Self::rounded(shape, DType::U32, values)
    }

    /// These numbers, rounded to `dtype`.
    pub(super) fn rounded(shape: &[usize], dtype: DType, values: Vec<f64>) -> Self {
        let ty = TensorType::new(shape, dtype);
        let array = Array { ty, values };
        Self::of(&array.tensor(&Memory::cpu(None)))
    }

    pub(super) fn of(tensor: &Tensor) -> Self {
        Array {
            ty: tensor.ty().clone(),
            values: tensor.to_array().iter().map(|&x| x.into()).collect(),
        }
    }

    pub(super) fn tensor(&self, memory: &Memory) -> Tensor {
        let v = &self.values;
        let made = match self.ty.dtype {
            DType::F32 => memory.tensor(&self.ty.shape, &collect(v, |x| x as f32)),
            DType::Bf16 => memory.tensor(&self.ty.shape, &collect(v, |x| bf16::from_f32(x as f32))),
            DType::F16 => memory.tensor(&self.ty.shape, &collect(v, |x| f16::from_f32(x as f32))),
            DType::U32 => memory.tensor(&self.ty.shape, &collect(v, |x| x as u32)),
        };
        made.expect("this memory has no budget")
    }

    pub(super) fn labels(&self) -> Vec<u32> {
        self.values.iter().map(|&x| x as u32).collect()
    }

    fn part(&self, axis: usize, range: Range<usize>) -> Self {
        let mut shape = self.ty.shape.clone();
        shape[axis] = range.len();
        Array {
            values: reference::slice(&self.ty.shape, axis, range, &self.values),
            ty: TensorType::new(shape, self.ty.dtype),
        }
    }
}

fn collect<T>(values: &[f64], f: impl Fn(f64) -> T) -> Vec<T> {
    values.iter().map(|&x| f(x)).collect()
}

/// One op on given operands.
pub(super) struct Case<'a> {
    pub(super) op: &'a dyn Op,
    pub(super) inputs: Vec<Array>,
    /// Types of the gradients; those of the operands where none is given.
    pub(super) gradient_type: Option<DType>,
    /// Partial results are maxima, not sums.
    pub(super) maximum: bool,
}

impl<'a> Case<'a> {
    pub(super) fn new(op: &'a dyn Op, inputs: Vec<Array>) -> Self {
        Case {
            op,
            inputs,
            gradient_type: None,
            maximum: false,
        }
    }

    /// The op on the whole operands.
    pub(super) fn run(&self) -> Vec<Array> {
        let whole: Vec<Share> = self.inputs.iter().map(Share::whole).collect();
        self.forward(&whole).0.iter().map(Array::of).collect()
    }

    /// Holds results to `forward(inputs)` and gradients to `backward(inputs, results, dy)`, where the results are the op's
    /// own and dy belongs to the first of them; both on one chip and split in two along every letter that allows it.
    pub(super) fn check(
        &self,
        forward: impl Fn(&[Array]) -> Vec<Bounded>,
        backward: impl Fn(&[Array], &[Array], &[f64]) -> Vec<Option<Bounded>>,
    ) {
        let whole: Vec<Share> = self.inputs.iter().map(Share::whole).collect();
        let (outputs, locals) = self.forward(&whole);
        let arrays: Vec<Array> = outputs.iter().map(Array::of).collect();
        let wanted = forward(&self.inputs);
        assert_eq!(wanted.len(), arrays.len(), "{}: results", self.what());
        for (i, (got, want)) in arrays.iter().zip(&wanted).enumerate() {
            assert_stored(&format!("{} result {i}", self.what()), got, want, 1.0, &[]);
        }
        let dy = Array::normal("dy", &arrays[0].ty.shape, arrays[0].ty.dtype);
        let mut gradients = backward(&self.inputs, &arrays, &dy.values);
        if self.op.passes_gradient() {
            // Nothing runs: what is wanted must be dy itself.
            for gradient in std::mem::take(&mut gradients) {
                assert_eq!(gradient.expect("all have one").0, dy.values);
            }
            gradients = vec![None; self.inputs.len()];
        }
        if gradients.iter().any(Option::is_some) {
            self.check_gradients(&whole, &outputs, &locals, &dy, &gradients);
        }
        self.check_splits(&wanted, &dy, &gradients);
    }

    fn what(&self) -> String {
        let types: Vec<String> = self.inputs.iter().map(|x| x.ty.to_string()).collect();
        format!("{:?} of {}", self.op, types.join(", "))
    }

    fn forward(&self, shares: &[Share]) -> (Vec<Tensor>, Vec<Local>) {
        let memory = memory();
        let types: Vec<TensorType> = shares.iter().map(|s| s.array.ty.clone()).collect();
        let outputs = self.op.infer(&types).unwrap_or_else(|why| panic!("{why}"));
        let locals: Vec<Local> = shares.iter().map(|s| s.local.clone()).collect();
        let out_locals: Vec<Local> = outputs.iter().cloned().map(Local::whole).collect();
        let site = Site {
            inputs: &locals,
            outputs: &out_locals,
            seed: 5,
        };
        let inputs: Vec<Tensor> = shares.iter().map(|s| s.array.tensor(&memory)).collect();
        let inputs: Vec<&Tensor> = inputs.iter().collect();
        let mut results: Vec<Tensor> = outputs
            .iter()
            .map(|ty| memory.allocate(ty).expect("this memory has no budget"))
            .collect();
        crate::ops::device::forward(self.op, &site, &inputs, &mut results);
        (results, out_locals)
    }

    /// Gradients of the operands for which `want` has a start (`None`: the gradient is overwritten).
    fn backward(
        &self,
        shares: &[Share],
        outputs: &[Tensor],
        dy: &Array,
        want: &[Option<Start>],
    ) -> Vec<Option<Array>> {
        let memory = memory();
        let saves = self.op.saves();
        let reuses = |i: usize| matches!(want[i], Some(Start::Reuse));
        let locals: Vec<Local> = shares.iter().map(|s| s.local.clone()).collect();
        let out_locals: Vec<Local> = outputs
            .iter()
            .map(|o| Local::whole(o.ty().clone()))
            .collect();
        let inputs: Vec<Option<Tensor>> = (0..shares.len())
            .map(|i| {
                (saves.inputs >> i & 1 == 1 && !reuses(i)).then(|| shares[i].array.tensor(&memory))
            })
            .collect();
        let kept: Vec<Option<Tensor>> = (0..outputs.len())
            .map(|i| (saves.outputs >> i & 1 == 1).then(|| outputs[i].clone()))
            .collect();
        let mut gradients = vec![None; outputs.len()];
        gradients[0] = Some(dy.tensor(&memory));
        let mut wanted: Vec<Option<Gradient>> = (0..shares.len())
            .map(|i| {
                let array = &shares[i].array;
                let dtype = self.gradient_type.unwrap_or(array.ty.dtype);
                let fresh = || memory.allocate(&TensorType::new(array.ty.shape.clone(), dtype));
                want[i].as_ref().map(|start| match start {
                    Start::Replace => Gradient {
                        tensor: fresh().expect("this memory has no budget"),
                        accum: Accum::Replace,
                        reused: false,
                    },
                    Start::Add(base) => Gradient {
                        tensor: base.tensor(&memory),
                        accum: Accum::Add,
                        reused: false,
                    },
                    Start::Reuse => Gradient {
                        tensor: array.tensor(&memory),
                        accum: Accum::Replace,
                        reused: true,
                    },
                })
            })
            .collect();
        let site = Site {
            inputs: &locals,
            outputs: &out_locals,
            seed: 5,
        };
        let mut backward = Backward {
            inputs: &inputs,
            outputs: &kept,
            gradients: &gradients,
            wanted: &mut wanted,
        };
        crate::ops::device::backward(self.op, &site, &mut backward);
        wanted
            .iter()
            .map(|g| g.as_ref().map(|g| Array::of(&g.tensor)))
            .collect()
    }

    fn check_gradients(
        &self,
        shares: &[Share],
        outputs: &[Tensor],
        _: &[Local],
        dy: &Array,
        wanted: &[Option<Bounded>],
    ) {
        assert_eq!(
            wanted.len(),
            self.inputs.len(),
            "{}: gradients",
            self.what()
        );
        for (i, w) in wanted.iter().enumerate() {
            assert_eq!(self.op.differentiable(i), w.is_some(), "operand {i}");
        }
        let only = |i: usize, start: Start| {
            let mut want = vec![None; wanted.len()];
            want[i] = Some(start);
            want
        };
        let all: Vec<Option<Start>> = wanted
            .iter()
            .map(|w| w.as_ref().map(|_| Start::Replace))
            .collect();
        let together = self.backward(shares, outputs, dy, &all);
        for (i, bounded) in wanted.iter().enumerate() {
            let Some(bounded) = bounded else { continue };
            let got = together[i].as_ref().expect("wanted");
            let what = format!("{} gradient {i}", self.what());
            assert_stored(&what, got, bounded, 1.0, &[]);
            let alone = self.backward(shares, outputs, dy, &only(i, Start::Replace));
            let alone = alone[i].as_ref().expect("wanted");
            assert_eq!(bits(alone), bits(got), "{what}: alone and with others");
            if self.op.accumulates(i) {
                let base = Array::normal("base", &got.ty.shape, got.ty.dtype);
                let sum: Vec<f64> = base
                    .values
                    .iter()
                    .zip(&bounded.0)
                    .map(|(b, g)| b + g)
                    .collect();
                // The chain resumes from the base: as many roundings more as it has, each of the base's size.
                let bound = (0..sum.len())
                    .map(|j| bounded.1[j] + reference::gamma(128, U) * base.values[j].abs())
                    .collect();
                let added = self.backward(shares, outputs, dy, &only(i, Start::Add(base)));
                let added = added[i].as_ref().expect("wanted");
                assert_stored(&format!("{what}, added"), added, &(sum, bound), 1.0, &[]);
            }
            if self.op.reuses() == Some(i) && got.ty.dtype == self.inputs[i].ty.dtype {
                let reused = self.backward(shares, outputs, dy, &only(i, Start::Reuse));
                let reused = reused[i].as_ref().expect("wanted");
                assert_eq!(bits(reused), bits(got), "{what}: in place");
            }
        }
    }

    /// Cuts the operands in two along each lower-case letter, and puts results and gradients together as the letters say.
    fn check_splits(&self, outputs: &[Bounded], dy: &Array, gradients: &[Option<Bounded>]) {
        let types: Vec<TensorType> = self.inputs.iter().map(|x| x.ty.clone()).collect();
        let axes = self.op.axes(&types);
        let mut letters: Vec<char> = axes.inputs.iter().flatten().copied().collect();
        letters.sort_unstable();
        letters.dedup();
        for letter in letters.into_iter().filter(char::is_ascii_lowercase) {
            let at = |letters: &Vec<char>| letters.iter().position(|&l| l == letter);
            let cut = |x: &Array, axis: Option<usize>, half: usize| Share::half(x, axis, half);
            if (0..types.len()).any(|i| at(&axes.inputs[i]).is_some_and(|d| types[i].shape[d] < 2))
            {
                continue;
            }
            let what = format!("{} split over '{letter}'", self.what());
            let halves = [0, 1].map(|half| {
                let shares: Vec<Share> = (0..types.len())
                    .map(|i| cut(&self.inputs[i], at(&axes.inputs[i]), half))
                    .collect();
                let (results, _) = self.forward(&shares);
                let dy = cut(dy, at(&axes.outputs[0]), half).array;
                let want: Vec<Option<Start>> = gradients
                    .iter()
                    .map(|g| g.as_ref().map(|_| Start::Replace))
                    .collect();
                let found = if gradients.iter().any(Option::is_some) {
                    self.backward(&shares, &results, &dy, &want)
                } else {
                    vec![None; types.len()]
                };
                (results.iter().map(Array::of).collect::<Vec<_>>(), found)
            });
            for (i, want) in outputs.iter().enumerate() {
                let parts = [&halves[0].0[i], &halves[1].0[i]];
                let whole = axes.whole_without.contains(&letter);
                self.assert_joined(
                    &format!("{what}, result {i}"),
                    parts,
                    at(&axes.outputs[i]),
                    whole,
                    want,
                );
            }
            for (i, want) in gradients.iter().enumerate() {
                let Some(want) = want else { continue };
                let parts = [&halves[0].1[i], &halves[1].1[i]].map(|g| g.as_ref().expect("wanted"));
                self.assert_joined(
                    &format!("{what}, gradient {i}"),
                    parts,
                    at(&axes.inputs[i]),
                    false,
                    want,
                );
            }
        }
    }

    fn assert_joined(
        &self,
        what: &str,
        parts: [&Array; 2],
        axis: Option<usize>,
        whole: bool,
        want: &Bounded,
    ) {
        let [a, b] = parts;
        let pairs = || a.values.iter().zip(&b.values);
        let mut shape = a.ty.shape.clone();
        let values = match axis {
            Some(axis) => {
                shape[axis] += b.ty.shape[axis];
                let sides = [
                    (&a.ty.shape[..], &a.values[..]),
                    (&b.ty.shape[..], &b.values[..]),
                ];
                reference::concatenate(axis, &sides)
            }
            None if whole => {
                assert_eq!(bits(a), bits(b), "{what}: the same on both chips");
                a.values.clone()
            }
            None if self.maximum => pairs().map(|(a, b)| a.max(*b)).collect(),
            None => pairs().map(|(a, b)| a + b).collect(),
        };
        let joined = Array {
            ty: TensorType::new(shape, a.ty.dtype),
            values,
        };
        let partial = axis.is_none() && !whole;
        let parts: &[&Array] = if partial { &[a, b] } else { &[] };
        assert_stored(what, &joined, want, 2.0, parts);
    }
}

/// How a gradient starts.
#[derive(Clone)]
enum Start {
    Replace,
    Add(Array),
    Reuse,
}

/// What one chip holds of an operand.
struct Share {
    array: Array,
    local: Local,
}

impl Share {
    fn whole(array: &Array) -> Self {
        Share {
            local: Local::whole(array.ty.clone()),
            array: array.clone(),
        }
    }

    fn half(array: &Array, axis: Option<usize>, half: usize) -> Self {
        let Some(axis) = axis else {
            return Self::whole(array);
        };
        let n = array.ty.shape[axis];
        let range = if half == 0 { 0..n / 2 } else { n / 2..n };
        let mut start = vec![0; array.ty.rank()];
        start[axis] = range.start;
        let part = array.part(axis, range);
        let local = Local {
            ty: part.ty.clone(),
            global: array.ty.shape.clone(),
            start,
        };
        Share { array: part, local }
    }
}

/// Bits of an array: NaN equals itself, 0 differs from -0.
fn bits(x: &Array) -> Vec<u64> {
    x.values.iter().map(|x| x.to_bits()).collect()
}

/// `got` within `slack` times the bound and what storing rounds: of the result, or of the parts that it is the sum of.
fn assert_stored(what: &str, got: &Array, (want, bound): &Bounded, slack: f64, parts: &[&Array]) {
    let dtype = got.ty.dtype;
    assert_eq!(got.values.len(), want.len(), "{what}: elements");
    let stored: Vec<f64> = (0..want.len())
        .map(|i| {
            let computed = slack * bound[i];
            let of_parts: f64 = parts.iter().map(|p| rounding(dtype, p.values[i])).sum();
            if want[i].is_infinite() {
                return 0.0;
            }
            computed + rounding(dtype, want[i].abs() + computed) + 1.01 * of_parts
        })
        .collect();
    assert_within(what, &got.values, want, &stored);
}
