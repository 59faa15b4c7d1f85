//! Lines of a shader body that are repeated, and files that several bodies share.
//!
//! `#unroll i N` to `#end` repeats lines with `@i` as 0, 1, .. below N, a constant of the body or a number. `#include name a=b`
//! brings the file `name` with `b` for `$a`. Both stand at the beginning of a line. `@{N}` is the constant `N` where a name needs
//! its digits.

use super::shader::Kernel;

/// Files that bodies include.
const SHARED: &[(&str, &str)] = &[
    (
        "attention_part",
        include_str!("../../shaders/attention_part.wgsl"),
    ),
    (
        "attention_rows",
        include_str!("../../shaders/attention_rows.wgsl"),
    ),
    (
        "attention_sees",
        include_str!("../../shaders/attention_sees.wgsl"),
    ),
    (
        "attention_store",
        include_str!("../../shaders/attention_store.wgsl"),
    ),
    (
        "block_product",
        include_str!("../../shaders/block_product.wgsl"),
    ),
    (
        "product_end",
        include_str!("../../shaders/product_end.wgsl"),
    ),
];

/// The body with what it includes, loops unrolled, for these values of its constants.
pub(super) fn expand(kernel: &Kernel, names: &[String], values: &[u32]) -> String {
    let constant = |name: &str| {
        if let Ok(n) = name.parse() {
            return n;
        }
        let at = names.iter().position(|c| c == name);
        let at = at.unwrap_or_else(|| {
            panic!(
                "shader '{}' unrolls over '{name}', which is no constant of it",
                kernel.name
            )
        });
        values[at]
    };
    let mut text = include(kernel);
    for (name, value) in names.iter().zip(values) {
        text = text.replace(&format!("@{{{name}}}"), &value.to_string());
    }
    let lines: Vec<&str> = text.lines().collect();
    let mut out = String::new();
    unroll(kernel, &lines, &constant, &mut out);
    out
}

fn include(kernel: &Kernel) -> String {
    let mut out = String::new();
    for line in kernel.source.lines() {
        match line.strip_prefix("#include ") {
            None => out += line,
            Some(what) => out += &included(kernel, what),
        }
        out += "\n";
    }
    out
}

fn included(kernel: &Kernel, what: &str) -> String {
    let mut words = what.split_whitespace();
    let name = words.next().unwrap_or("");
    let found = SHARED.iter().find(|(n, _)| *n == name);
    let (_, text) = found.unwrap_or_else(|| panic!("shader '{}' includes '{name}'", kernel.name));
    let mut text = text.to_string();
    for word in words {
        let (a, b) = word
            .split_once('=')
            .unwrap_or_else(|| panic!("shader '{}': '#include {what}'", kernel.name));
        text = text.replace(&format!("${a}"), b);
    }
    assert!(
        !text.contains('$'),
        "shader '{}': '#include {what}' lacks a value",
        kernel.name
    );
    text
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
