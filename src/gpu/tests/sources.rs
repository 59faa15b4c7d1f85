//! naga validates every shader with every element type of every operand, with and without the optional ones.

use crate::dtype::DType;
use crate::gpu::library::{ALL, MATMUL_MATRICES};
use crate::gpu::shader::{Bound, Entry, Kernel, Variant, interface, source};

fn validate(kernel: &Kernel, variant: &Variant) {
    let text = source(kernel, variant);
    let module = naga::front::wgsl::parse_str(&text)
        .unwrap_or_else(|e| panic!("{} {variant:?}: {}", kernel.name, e.emit_to_string(&text)));
    validator(kernel)
        .validate(&module)
        .unwrap_or_else(|e| panic!("{} {variant:?}: {}", kernel.name, e.emit_to_string(&text)));
}

/// naga's, for what a kernel may use.
fn validator(kernel: &Kernel) -> naga::valid::Validator {
    // No optional capability, but subgroups where a kernel runs in groups of one.
    let able = match interface(kernel).entry {
        Entry::Lanes => naga::valid::Capabilities::SUBGROUP,
        Entry::Matrices => {
            naga::valid::Capabilities::SUBGROUP
                | naga::valid::Capabilities::SHADER_FLOAT16
                | naga::valid::Capabilities::COOPERATIVE_MATRIX
        }
        _ => naga::valid::Capabilities::empty(),
    };
    let mut validator = naga::valid::Validator::new(naga::valid::ValidationFlags::all(), able);
    validator
        .subgroup_stages(naga::valid::ShaderStages::COMPUTE)
        .subgroup_operations(naga::valid::SubgroupOperationSet::all());
    validator
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
            // Both operands are of one type.
            None if face.entry == Entry::Matrices => vec![Bound::Halves],
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
    let step = (all.len() / 100) | 1;
    let last = all.len() - 1;
    all.into_iter()
        .enumerate()
        .filter(|(i, _)| i % step == 0 || *i == last)
        .map(|(_, b)| b)
        .collect()
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
        "A_COLUMNS" | "B_COLUMNS" => [0, 1],
        "SIDE" => [16, 8],
        "LOADS" => [0, 1],
        "D" => [1, 64],
        other => panic!("the test knows no values of {other}"),
    };
    let ranges: Vec<[u32; 2]> = face.constants.iter().map(range).collect();
    let of = |end: usize| ranges.iter().map(|r| r[end]).collect();
    if ranges.is_empty() {
        vec![Vec::new()]
    } else {
        vec![of(0), of(1)]
    }
}

#[test]
fn every_shader_is_valid_for_every_type_and_constant() {
    let mut count = 0;
    for kernel in ALL {
        let all = bindings(kernel);
        for (i, bound) in all.iter().enumerate() {
            for constants in constants(kernel) {
                // Unrolled bodies are long: their largest form once, for the first types.
                if i > 0 && constants.iter().any(|&c| c > 8) {
                    continue;
                }
                let group = if i % 2 == 0 { 64 } else { 8 };
                validate(
                    kernel,
                    &Variant {
                        bound: bound.clone(),
                        constants,
                        group,
                        proven: false,
                    },
                );
                count += 1;
            }
        }
    }
    assert!(count > 1000, "only {count} variants were validated");
}

#[test]
fn operands_may_be_results_and_indices_may_be_moved() {
    for kernel in ALL {
        let face = interface(kernel);
        let result = face.slots.iter().position(|s| s.written).expect("a result");
        for (i, slot) in face.slots.iter().enumerate().filter(|(_, s)| !s.written) {
            let other = slot.dtype == Some(DType::U32) || slot.dtype != face.slots[result].dtype;
            if other || face.entry == Entry::Matrices {
                continue;
            }
            let own = |s: &crate::gpu::shader::Slot| Bound::Own(s.dtype.unwrap_or(DType::F32));
            let mut bound: Vec<Bound> = face.slots.iter().map(own).collect();
            bound[i] = Bound::Same(result);
            let constants = constants(kernel)[0].clone();
            validate(
                kernel,
                &Variant {
                    bound,
                    constants,
                    group: 64,
                    proven: false,
                },
            );
        }
    }
    for name in ["take", "put", "place", "transpose", "cast", "pack"] {
        let kernel = ALL.iter().find(|k| k.name == name).expect("a kernel");
        let bound = vec![Bound::Own(DType::U32); interface(kernel).slots.len()];
        let constants = constants(kernel)[0].clone();
        validate(
            kernel,
            &Variant {
                bound,
                constants,
                group: 64,
                proven: false,
            },
        );
    }
}

/// The kernel through cooperative matrices of 8 by 8, for operands of this type, rows or columns in a row.
fn of_eight(operands: Bound, columns: u32) -> Variant {
    let constants = |name: &String| match name.as_str() {
        "SIDE" => 8,
        "DOWN" | "ACROSS" => 4,
        "LOADS" => 1,
        _ => columns,
    };
    let face = interface(&MATMUL_MATRICES);
    Variant {
        bound: vec![operands, operands, Bound::Own(DType::F32)],
        constants: face.constants.iter().map(constants).collect(),
        group: 128,
        proven: false,
    }
}

/// Metal's language has matrices of 8 by 8, in f16 and f32: naga holds the kernel valid and writes it. No Metal compiler was at hand.
#[test]
fn matrices_of_eight_are_written_for_metal() {
    for (operands, ty) in [(Bound::Own(DType::F32), "float"), (Bound::Halves, "half")] {
        for columns in [0, 1] {
            let variant = of_eight(operands, columns);
            validate(&MATMUL_MATRICES, &variant);
            let text = source(&MATMUL_MATRICES, &variant);
            assert_eq!(text.contains("enable f16;"), ty == "half");
            let module = naga::front::wgsl::parse_str(&text).expect("it was parsed before");
            let info = validator(&MATMUL_MATRICES).validate(&module);
            let options = naga::back::msl::Options {
                lang_version: (2, 3),
                fake_missing_bindings: true,
                ..Default::default()
            };
            let pipeline = naga::back::msl::PipelineOptions::default();
            let info = info.expect("it was valid before");
            let (msl, _) = naga::back::msl::write_string(&module, &info, &options, &pipeline)
                .unwrap_or_else(|e| panic!("{operands:?} {columns}: {e}"));
            let operand = format!("simdgroup_{ty}8x8");
            for word in [
                &*operand,
                "simdgroup_float8x8",
                "simdgroup_multiply_accumulate",
                "simdgroup_store",
            ] {
                assert!(msl.contains(word), "no {word} in {msl}");
            }
            assert!(!msl.contains("16x16"), "{msl}");
            // A language before 2.3 has none.
            let old = naga::back::msl::Options {
                lang_version: (2, 2),
                ..options
            };
            naga::back::msl::write_string(&module, &info, &old, &pipeline).expect_err("too old");
        }
    }
}
