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
//!
//! An operand `x` is read by `load_x(i)` and written by `store_x(i, value)`; `x?` may be left out, and `has_x` says so.
//! f16 and bf16 live in u32 words, two elements each: a single one is stored by two atomic operations on its half of the
//! word, which neither lose nor order anything, and a `map` writes whole words. `E` is f32, or u32 where `map y` is of
//! indices. Numbers are in `numbers.width`. An operand may be the same tensor as a result: both then have one binding.
//!
//! `#unroll i N` to `#end` repeats lines with `@i` as 0, 1, .. below the constant N; `#include name` brings another file.

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
}

const PRELUDE: &str = include_str!("../../shaders/prelude.wgsl");
const ROWS: &str = include_str!("../../shaders/rows.wgsl");
const SEES: &str = include_str!("../../shaders/attention_sees.wgsl");

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
        _ => "f32",
    };
    line(format!("alias E = {element};"));
    line(PRELUDE.into());
    if face.entry == Entry::Rows {
        line(ROWS.into());
    }
    line(expand(kernel, &face, variant));
    line(entry(&face, variant));
    out
}

/// True if the first result is of indices: elements are then moved, not computed with.
fn result_of_indices(face: &Interface, variant: &Variant) -> bool {
    let mut written = face.slots.iter().zip(&variant.bound);
    let first = written.find(|(slot, _)| slot.written && slot.dtype.is_none());
    first.is_some_and(|(_, bound)| *bound == Bound::Own(DType::U32))
}

/// Declaration, load and store of one operand.
fn operand(face: &Interface, i: usize, slot: &Slot, bound: Bound) -> String {
    let name = &slot.name;
    let has = format!("const has_{name} = {};\n", bound != Bound::Absent);
    let dtype = match bound {
        Bound::Absent => {
            let ty = if slot.dtype == Some(DType::U32) {
                "u32"
            } else {
                "f32"
            };
            return format!(
                "{has}fn load_{name}(i: u32) -> {ty} {{ return {ty}(0); }}\nfn store_{name}(i: u32, x: {ty}) {{}}"
            );
        }
        Bound::Same(other) => {
            let other = &face.slots[other].name;
            return format!("{has}fn load_{name}(i: u32) -> f32 {{ return load_{other}(i); }}");
        }
        Bound::Own(dtype) => dtype,
    };
    let narrow = dtype.size() == 2;
    let word = match (narrow, slot.written, dtype) {
        (true, true, _) => "atomic<u32>",
        (true, false, _) | (_, _, DType::U32) => "u32",
        _ => "f32",
    };
    let access = if slot.written { "read_write" } else { "read" };
    let at = i + 1;
    let declared =
        format!("@group(0) @binding({at}) var<storage, {access}> data_{name}: array<{word}>;");
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
    let mut text =
        format!("{has}{declared}\nfn load_{name}(i: u32) -> {ty} {{ return {load}; }}\n");
    if slot.written {
        text += &format!("fn store_{name}(i: u32, x: {ty}) {{ {store} }}\n");
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
        Entry::Tiles => "    tile(group, lane);".into(),
    };
    format!(
        "@compute @workgroup_size(WG)\nfn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, \
         @builtin(local_invocation_index) lane: u32) {{\n{body}\n}}"
    )
}

/// The body with what it includes, loops unrolled.
fn expand(kernel: &Kernel, face: &Interface, variant: &Variant) -> String {
    let mut text = kernel.source.to_string();
    if text.contains("#include attention_sees") {
        text = text.replace("#include attention_sees", SEES);
    }
    let constant = |name: &str| {
        let at = face.constants.iter().position(|c| c == name);
        let at = at.unwrap_or_else(|| {
            panic!(
                "shader '{}' unrolls over '{name}', which is no constant of it",
                kernel.name
            )
        });
        variant.constants[at]
    };
    let lines: Vec<&str> = text.lines().collect();
    let mut out = String::new();
    unroll(kernel, &lines, &constant, &mut out);
    out
}

fn unroll(kernel: &Kernel, lines: &[&str], constant: &impl Fn(&str) -> u32, out: &mut String) {
    let mut at = 0;
    while at < lines.len() {
        let Some(head) = lines[at].strip_prefix("#unroll ") else {
            *out += lines[at];
            *out += "\n";
            at += 1;
            continue;
        };
        let (letter, name) = head
            .split_once(' ')
            .unwrap_or_else(|| panic!("shader '{}': '{}'", kernel.name, lines[at]));
        let mut depth = 1;
        let inside = lines[at + 1..].iter().position(|l| {
            depth += l.starts_with("#unroll ") as i32 - (*l == "#end") as i32;
            depth == 0
        });
        let end = at + 1 + inside.unwrap_or_else(|| panic!("shader '{}' lacks #end", kernel.name));
        let block = lines[at + 1..end].join("\n");
        for i in 0..constant(name) {
            let text = block.replace(&format!("@{letter}"), &i.to_string());
            let lines: Vec<&str> = text.lines().collect();
            unroll(kernel, &lines, constant, out);
        }
        at = end + 1;
    }
}
