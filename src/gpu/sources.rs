//! Every shader of this crate with every element type of every operand and every constant at both ends of its range, as the driver
//! would get it: for tests that validate and translate them without any device.

use super::library::ALL;
use super::shader::{Bound, Entry, Kernel, Slot, Variant, interface, source};
use crate::dtype::DType;

/// A shader's source, and what it needs of a device beyond the plain language.
#[derive(Debug)]
pub struct Source {
    /// The kernel's name, types of its operands and its constants.
    pub name: String,
    /// WGSL.
    pub text: String,
    /// It talks across a subgroup.
    pub subgroups: bool,
    /// Rows and columns of its cooperative matrices, if it has any.
    pub matrices: Option<u32>,
}

/// All of them, some thousand.
pub fn every_source() -> Vec<Source> {
    let mut all = Vec::new();
    for kernel in ALL {
        all.extend(variants(kernel).iter().map(|v| of(kernel, v)));
        all.extend(moved(kernel).iter().map(|v| of(kernel, v)));
    }
    all
}

fn of(kernel: &Kernel, variant: &Variant) -> Source {
    let face = interface(kernel);
    let matrices = face.entry == Entry::Matrices;
    let constants = face.constants.iter().zip(&variant.constants);
    let side = constants.clone().find(|(name, _)| *name == "SIDE");
    Source {
        name: format!(
            "{} {:?} {:?}",
            kernel.name,
            variant.bound,
            constants.collect::<Vec<_>>()
        ),
        text: source(kernel, variant),
        subgroups: matches!(face.entry, Entry::Lanes | Entry::Matrices),
        matrices: side.filter(|_| matrices).map(|(_, side)| *side),
    }
}

/// Every type of every operand, with every constant at both ends of its range.
fn variants(kernel: &Kernel) -> Vec<Variant> {
    if interface(kernel).entry == Entry::Matrices {
        return of_matrices(kernel);
    }
    let mut all = Vec::new();
    for (i, bound) in bindings(kernel).into_iter().enumerate() {
        for constants in constants(kernel) {
            // Unrolled bodies are long: their largest form once, for the first types.
            if i > 0 && constants.iter().any(|&c| c > 8) {
                continue;
            }
            all.push(Variant {
                bound: bound.clone(),
                constants,
                group: if i % 2 == 0 { 64 } else { 8 },
                proven: false,
            });
        }
    }
    all
}

/// Both operands of one type, each form that [`super::matrices`] has, each layout.
fn of_matrices(kernel: &Kernel) -> Vec<Variant> {
    let face = interface(kernel);
    let mut all = Vec::new();
    for form in super::matrices::FORMS {
        for layout in 0..4 {
            let constants = |name: &String| form.constant(name, [layout & 1, layout >> 1]);
            let of_result = |slot: &Slot| slot.dtype.map_or(form.bound(), Bound::Own);
            all.push(Variant {
                bound: face.slots.iter().map(of_result).collect(),
                constants: face.constants.iter().map(constants).collect(),
                group: 128,
                proven: false,
            });
        }
    }
    all
}

/// Each operand as the first result, and indices in place of floats where the body only moves elements.
fn moved(kernel: &Kernel) -> Vec<Variant> {
    let face = interface(kernel);
    if face.entry == Entry::Matrices {
        return Vec::new();
    }
    let result = face.slots.iter().position(|s| s.written).expect("a result");
    let with = |bound| Variant {
        bound,
        constants: constants(kernel)[0].clone(),
        group: 64,
        proven: false,
    };
    let mut all = Vec::new();
    for (i, slot) in face.slots.iter().enumerate().filter(|(_, s)| !s.written) {
        let other = slot.dtype == Some(DType::U32) || slot.dtype != face.slots[result].dtype;
        if other {
            continue;
        }
        let own = |s: &Slot| Bound::Own(s.dtype.unwrap_or(DType::F32));
        let mut bound: Vec<Bound> = face.slots.iter().map(own).collect();
        bound[i] = Bound::Same(result);
        all.push(with(bound));
    }
    if ["take", "put", "place", "transpose", "cast", "pack"].contains(&kernel.name) {
        all.push(with(vec![Bound::Own(DType::U32); face.slots.len()]));
    }
    all
}

/// True for kernels that move four elements at a time.
fn takes_fours(kernel: &Kernel) -> bool {
    matches!(interface(kernel).entry, Entry::Tiles | Entry::Lanes)
}

/// Every way to bind a kernel's operands: types of those of any type, presence of the optional ones, and each operand being
/// the first result.
fn bindings(kernel: &Kernel) -> Vec<Vec<Bound>> {
    let face = interface(kernel);
    let floats = [DType::F32, DType::Bf16, DType::F16];
    let mut all = vec![Vec::new()];
    for slot in &face.slots {
        let mut choices: Vec<Bound> = match slot.dtype {
            Some(dtype) => vec![Bound::Own(dtype)],
            None if takes_fours(kernel) => [Bound::Own, Bound::Fours]
                .iter()
                .flat_map(|of| floats.map(of))
                .collect(),
            None => floats.map(Bound::Own).to_vec(),
        };
        if slot.optional {
            choices.push(Bound::Absent);
        }
        let longer = |bound: &Vec<Bound>| {
            let more = |choice: &Bound| {
                let mut bound = bound.clone();
                bound.push(*choice);
                bound
            };
            choices.iter().map(more).collect::<Vec<_>>()
        };
        all = all.iter().flat_map(longer).collect();
    }
    // A large product of types says nothing that its first, last and some hundred combinations do not; the step is odd, so
    // that it meets every choice of every slot.
    let (step, last) = ((all.len() / 100) | 1, all.len() - 1);
    let mut i = 0;
    all.retain(|_| {
        i += 1;
        (i - 1) % step == 0 || i - 1 == last
    });
    all
}

/// Constants of a kernel: all of them small, and all of them at their largest.
fn constants(kernel: &Kernel) -> Vec<Vec<u32>> {
    let face = interface(kernel);
    let range = |name: &String| match name.as_str() {
        "ADD" | "NORMALIZE" | "MEAN" | "SQUARES" | "PAIRS" | "WIDE" | "B" | "LOOSE" => [0, 1],
        "FUNCTION" => [0, 4],
        "A" => [0, 1],
        "ROWS" | "COLUMNS" | "VECTORS" | "A_BLOCKS" | "B_BLOCKS" => [1, 2],
        "WG_X" | "WG_Y" => [4, 8],
        "DEPTH" => [4, 8],
        "LANES" => [4, 8],
        "DOWN" | "ACROSS" => [1, 4],
        "D" => [1, 64],
        other => panic!("no values of the constant {other} are known here"),
    };
    let ranges: Vec<[u32; 2]> = face.constants.iter().map(range).collect();
    let of = |end: usize| ranges.iter().map(|r| r[end]).collect();
    if ranges.is_empty() {
        vec![Vec::new()]
    } else {
        vec![of(0), of(1)]
    }
}
