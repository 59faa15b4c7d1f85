//! Shader sources: constants written by Rust, loads and stores by element type, and a body that sees f32 alone.
//!
//! WGSL has no generics. A body is a file of `shaders/` (or a user's own) whose comment names its interface, one clause
//! after another, in a line that begins with how it is entered:
//!
//! ```text
//! // map y; reads x, bias?, labels: u32; numbers width, eps: f32; constants ADD
//! ```
//!
//! | entry | the body defines | it runs |
//! |---|---|---|
//! | `map y` | `fn value(i: u32) -> E` | once for each element of y, which it gives |
//! | `elements` | `fn element(i: u32)` | once for each index below the launch's count |
//! | `rows` | `fn row(r: u32, lane: u32)` | `WG` invocations for each row |
//! | `tiles` | `fn tile(group: vec3<u32>, lane: u32)` | as the launch says |
//! | `lanes` | the same | as the launch says, in groups of one subgroup |
//! | `matrices` | the same, with the subgroup's number for `lane` | the same, in groups of four subgroups |
//!
//! An operand `x` is read by `load_x(i)` and written by `store_x(i, value)`; `x?` may be left out, and `has_x` says so.
//! `load4_x(i)` and `store4_x(i, four)` move four elements: one access where the launch promised that `i` is then a multiple
//! of four ([`Bound::Fours`]), four of them elsewhere.
//! f16 and bf16 live in u32 words, two elements each: a single one is stored by two atomic operations on its half of the
//! word, which neither lose nor order anything, and a `map` writes whole words. `E` is f32, or u32 where `map y` is of
//! indices. Numbers are in `numbers.width`. An operand may be the same tensor as a result: both then have one binding.
//!
//! How lines are repeated and files included stands in `template`.

use super::template::expand;
use crate::dtype::DType;
use std::collections::HashMap;
use std::fmt::Write;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// A shader body: what it is called in traces and messages, and its WGSL.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Kernel {
    /// The name, unique in the program.
    pub name: &'static str,
    /// The body, with its interface in a comment (see the room's text).
    pub source: &'static str,
}

/// How a body is entered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Entry {
    Map,
    Elements,
    Rows,
    Tiles,
    Lanes,
    Matrices,
}

/// One operand of a body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Slot {
    pub(crate) name: String,
    /// None: any float type, or indices where the body allows it.
    pub(crate) dtype: Option<DType>,
    pub(crate) optional: bool,
    pub(crate) written: bool,
}

/// A scalar of a launch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Number {
    pub(crate) name: String,
    pub(crate) float: bool,
}

/// What a body's comment says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Interface {
    pub(crate) entry: Entry,
    pub(crate) slots: Vec<Slot>,
    pub(crate) numbers: Vec<Number>,
    pub(crate) constants: Vec<String>,
}

/// What stands in a slot of one launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Bound {
    /// Nothing: the operand is left out.
    Absent,
    /// A tensor of this type.
    Own(DType),
    /// The same, of which four elements are one access: they begin at multiples of four.
    Fours(DType),
    /// A tensor of f16 as such, for cooperative matrices.
    Halves,
    /// The same tensor as the result in this slot.
    Same(usize),
}

/// Everything that a shader's source follows from, besides its body.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Variant {
    pub(crate) bound: Vec<Bound>,
    pub(crate) constants: Vec<u32>,
    /// Invocations of a group.
    pub(crate) group: u32,
    /// The launch proves that no access is out of bounds: the driver's checks may be left out.
    pub(crate) proven: bool,
}

const PRELUDE: &str = include_str!("../../shaders/prelude.wgsl");
const ROWS: &str = include_str!("../../shaders/rows.wgsl");

/// The interface of a kernel, read once.
pub(crate) fn interface(kernel: &Kernel) -> Arc<Interface> {
    static READ: OnceLock<Mutex<HashMap<Kernel, Arc<Interface>>>> = OnceLock::new();
    let read = READ.get_or_init(Mutex::default);
    let mut read = read.lock().unwrap_or_else(PoisonError::into_inner);
    read.entry(*kernel)
        .or_insert_with(|| Arc::new(parse(kernel)))
        .clone()
}

fn parse(kernel: &Kernel) -> Interface {
    let wrong = |why: &str| -> ! { panic!("shader '{}': {why}", kernel.name) };
    let entry = |line: &str| {
        let first = line.split([' ', ';']).next().unwrap_or("");
        Some(match first {
            "map" => Entry::Map,
            "elements" => Entry::Elements,
            "rows" => Entry::Rows,
            "tiles" => Entry::Tiles,
            "lanes" => Entry::Lanes,
            "matrices" => Entry::Matrices,
            _ => return None,
        })
    };
    let line = kernel
        .source
        .lines()
        .filter_map(|l| l.strip_prefix("// "))
        .find(|l| entry(l).is_some() && (l.contains(';')))
        .unwrap_or_else(|| wrong("no comment names its interface, as in `// map y; reads x`"));
    let mut found = Interface {
        entry: entry(line).expect("the line was chosen for it"),
        slots: Vec::new(),
        numbers: Vec::new(),
        constants: Vec::new(),
    };
    for clause in line.split(';').map(str::trim) {
        let (verb, list) = clause.split_once(' ').unwrap_or((clause, ""));
        for item in list.split(',').map(str::trim).filter(|i| !i.is_empty()) {
            let (name, ty) = item.split_once(": ").unwrap_or((item, ""));
            let optional = name.ends_with('?');
            let name = name.trim_end_matches('?').to_string();
            match verb {
                "map" | "reads" | "writes" => found.slots.push(Slot {
                    name,
                    dtype: match ty {
                        "" => None,
                        "f32" => Some(DType::F32),
                        "u32" => Some(DType::U32),
                        _ => wrong("operands are of any type, f32 or u32"),
                    },
                    optional,
                    written: verb != "reads",
                }),
                "numbers" => found.numbers.push(Number {
                    name,
                    float: ty == "f32",
                }),
                "constants" => found.constants.push(name),
                _ => wrong("clauses are map, reads, writes, numbers and constants"),
            }
        }
    }
    found
}

/// The whole WGSL of a kernel's variant.
pub(crate) fn source(kernel: &Kernel, variant: &Variant) -> String {
    let face = interface(kernel);
    let mut out = String::new();
    let mut line = |text: String| writeln!(out, "{text}").expect("a string takes any text");
    let halves = variant.bound.contains(&Bound::Halves);
    if halves {
        line("enable f16;".into());
    }
    if face.entry == Entry::Matrices {
        line("enable wgpu_cooperative_matrix;".into());
    }
    line(format!("const WG = {}u;", variant.group));
    for (name, value) in face.constants.iter().zip(&variant.constants) {
        line(format!("const {name} = {value}u;"));
    }
    line("struct Numbers {\n    count: u32,\n    infinity: u32,".into());
    for n in &face.numbers {
        line(format!(
            "    {}: {},",
            n.name,
            if n.float { "f32" } else { "u32" }
        ));
    }
    line("}\n@group(0) @binding(0) var<uniform> numbers: Numbers;".into());
    for (i, (slot, bound)) in face.slots.iter().zip(&variant.bound).enumerate() {
        line(operand(&face, i, slot, *bound));
    }
    let element = match (&face.entry, variant.bound.first()) {
        (Entry::Map, Some(Bound::Own(DType::U32))) => "u32",
        _ if result_of_indices(&face, variant) => "u32",
        _ if halves => "f16",
        _ => "f32",
    };
    line(format!("alias E = {element};"));
    line(PRELUDE.into());
    if face.entry == Entry::Rows {
        line(ROWS.into());
    }
    line(expand(kernel, &face.constants, &variant.constants));
    line(entry(&face, variant));
    out
}

/// True if the first result is of indices: elements are then moved, not computed with.
fn result_of_indices(face: &Interface, variant: &Variant) -> bool {
    let mut written = face.slots.iter().zip(&variant.bound);
    let first = written.find(|(slot, _)| slot.written && slot.dtype.is_none());
    first.is_some_and(|(_, bound)| *bound == Bound::Own(DType::U32))
}

/// Declaration, loads and stores of one operand.
fn operand(face: &Interface, i: usize, slot: &Slot, bound: Bound) -> String {
    let name = &slot.name;
    let has = format!("const has_{name} = {};\n", bound != Bound::Absent);
    match bound {
        Bound::Absent => {
            let ty = if slot.dtype == Some(DType::U32) {
                "u32"
            } else {
                "f32"
            };
            format!(
                "{has}fn load_{name}(i: u32) -> {ty} {{ return {ty}(0); }}\nfn store_{name}(i: u32, x: {ty}) {{}}\n\
                 fn load4_{name}(i: u32) -> vec4<{ty}> {{ return vec4<{ty}>(); }}\nfn store4_{name}(i: u32, x: vec4<{ty}>) {{}}"
            )
        }
        Bound::Same(other) => {
            let other = &face.slots[other].name;
            format!(
                "{has}fn load_{name}(i: u32) -> f32 {{ return load_{other}(i); }}\n\
                 fn load4_{name}(i: u32) -> vec4<f32> {{ return load4_{other}(i); }}"
            )
        }
        Bound::Own(dtype) => has + &by_one(i, slot, dtype),
        Bound::Fours(dtype) => has + &by_four(i, slot, dtype),
        Bound::Halves => has + &declared(i, slot, "f16"),
    }
}

fn declared(i: usize, slot: &Slot, word: &str) -> String {
    let access = if slot.written { "read_write" } else { "read" };
    let (at, name) = (i + 1, &slot.name);
    format!("@group(0) @binding({at}) var<storage, {access}> data_{name}: array<{word}>;\n")
}

fn by_one(i: usize, slot: &Slot, dtype: DType) -> String {
    let name = &slot.name;
    let narrow = dtype.size() == 2;
    let word = match (narrow, slot.written, dtype) {
        (true, true, _) => "atomic<u32>",
        (true, false, _) | (_, _, DType::U32) => "u32",
        _ => "f32",
    };
    let (ty, load, store) = if narrow {
        let word = if slot.written {
            format!("atomicLoad(&data_{name}[i >> 1u])")
        } else {
            format!("data_{name}[i >> 1u]")
        };
        let load = format!("{dtype}_to_f32(({word} >> ((i & 1u) * 16u)) & 0xffffu)");
        let store = format!(
            "let shift = (i & 1u) * 16u; atomicAnd(&data_{name}[i >> 1u], ~(0xffffu << shift)); \
             atomicOr(&data_{name}[i >> 1u], f32_to_{dtype}(x) << shift);"
        );
        ("f32", load, store)
    } else {
        let ty = if dtype == DType::U32 { "u32" } else { "f32" };
        (
            ty,
            format!("data_{name}[i]"),
            format!("data_{name}[i] = x;"),
        )
    };
    let mut text = declared(i, slot, word);
    text += &format!(
        "fn load_{name}(i: u32) -> {ty} {{ return {load}; }}\n\
         fn load4_{name}(i: u32) -> vec4<{ty}> {{ return vec4<{ty}>(load_{name}(i), load_{name}(i + 1u), load_{name}(i + 2u), load_{name}(i + 3u)); }}\n"
    );
    if slot.written {
        text += &format!(
            "fn store_{name}(i: u32, x: {ty}) {{ {store} }}\n\
             fn store4_{name}(i: u32, x: vec4<{ty}>) {{ store_{name}(i, x.x); store_{name}(i + 1u, x.y); store_{name}(i + 2u, x.z); store_{name}(i + 3u, x.w); }}\n"
        );
    }
    text
}

/// Words of four elements. Single ones may be read; a store of one is written for code that never runs, since another
/// invocation may own the word's other three.
fn by_four(i: usize, slot: &Slot, dtype: DType) -> String {
    let name = &slot.name;
    if dtype.size() == 4 {
        let ty = if dtype == DType::U32 { "u32" } else { "f32" };
        let mut text = declared(i, slot, &format!("vec4<{ty}>"));
        text += &format!(
            "fn load_{name}(i: u32) -> {ty} {{ return data_{name}[i >> 2u][i & 3u]; }}\n\
             fn load4_{name}(i: u32) -> vec4<{ty}> {{ return data_{name}[i >> 2u]; }}\n"
        );
        if slot.written {
            text += &format!(
                "fn store_{name}(i: u32, x: {ty}) {{ data_{name}[i >> 2u][i & 3u] = x; }}\n\
                 fn store4_{name}(i: u32, x: vec4<{ty}>) {{ data_{name}[i >> 2u] = x; }}\n"
            );
        }
        return text;
    }
    let mut text = declared(i, slot, "vec2<u32>");
    text += &format!(
        "fn load_{name}(i: u32) -> f32 {{ return {dtype}_to_f32((data_{name}[i >> 2u][(i >> 1u) & 1u] >> ((i & 1u) * 16u)) & 0xffffu); }}\n\
         fn load4_{name}(i: u32) -> vec4<f32> {{ let w = data_{name}[i >> 2u]; \
         return vec4<f32>({dtype}_to_f32(w.x & 0xffffu), {dtype}_to_f32(w.x >> 16u), {dtype}_to_f32(w.y & 0xffffu), {dtype}_to_f32(w.y >> 16u)); }}\n"
    );
    if slot.written {
        text += &format!(
            "fn store4_{name}(i: u32, x: vec4<f32>) {{ data_{name}[i >> 2u] = vec2<u32>(f32_to_{dtype}(x.x) | (f32_to_{dtype}(x.y) << 16u), \
             f32_to_{dtype}(x.z) | (f32_to_{dtype}(x.w) << 16u)); }}\n\
             fn store_{name}(i: u32, x: f32) {{ var four = load4_{name}(i & 0xfffffffcu); four[i & 3u] = x; store4_{name}(i & 0xfffffffcu, four); }}\n"
        );
    }
    text
}

/// `main`, which calls the body.
fn entry(face: &Interface, variant: &Variant) -> String {
    let body = match face.entry {
        Entry::Map => match variant.bound[0] {
            Bound::Own(dtype) if dtype.size() == 2 => {
                let name = &face.slots[0].name;
                format!(
                    "    let i = 2u * ((group.y * groups.x + group.x) * WG + lane);\n    if (i >= numbers.count) {{ return; }}\n    \
                     var word = f32_to_{dtype}(value(i));\n    if (i + 1u < numbers.count) {{ word |= f32_to_{dtype}(value(i + 1u)) << 16u; }}\n    \
                     atomicStore(&data_{name}[i >> 1u], word);"
                )
            }
            _ => format!(
                "    let i = (group.y * groups.x + group.x) * WG + lane;\n    if (i < numbers.count) {{ store_{}(i, value(i)); }}",
                face.slots[0].name
            ),
        },
        Entry::Elements => {
            "    let i = (group.y * groups.x + group.x) * WG + lane;\n    if (i < numbers.count) { element(i); }".into()
        }
        Entry::Rows => {
            "    let r = group.y * groups.x + group.x;\n    if (r < numbers.count) { row(r, lane); }".into()
        }
        Entry::Tiles | Entry::Lanes | Entry::Matrices => "    tile(group, lane);".into(),
    };
    let lane = match face.entry {
        Entry::Lanes => "subgroup_invocation_id",
        Entry::Matrices => "subgroup_id",
        _ => "local_invocation_index",
    };
    format!(
        "@compute @workgroup_size(WG)\nfn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, \
         @builtin({lane}) lane: u32) {{\n{body}\n}}"
    )
}
