//! The house's table of arrows, held against the sources: which room may import which, where `unsafe` may stand, how long
//! a file may be, and that nothing is left to be done.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Every room with the rooms that it may import, beside itself. What stands lower in the table is higher in the house.
///
/// `random`, `dtype` and `cpu` are the kernels crate, which can import nothing of this one.
const ARROWS: [(&str, &[&str]); 22] = [
    ("error", &[]),
    ("files", &[]),
    ("random", &[]),
    ("dtype", &[]),
    ("pipeline", &["error"]),
    ("mesh", &["error"]),
    ("placement", &["mesh", "error"]),
    ("collective", &["placement", "mesh", "dtype", "error"]),
    (
        "trace",
        &["collective", "placement", "mesh", "dtype", "files", "error"],
    ),
    ("cluster", &["files", "error"]),
    ("cpu", &["dtype", "random"]),
    ("gpu", &["dtype", "random", "files", "error"]),
    ("tensor", &["cpu", "gpu", "dtype", "error"]),
    ("kernels", &["cpu"]),
    ("tape", &["tensor", "placement"]),
    (
        "ops",
        &[
            "tape",
            "tensor",
            "cpu",
            "gpu",
            "placement",
            "random",
            "dtype",
            "error",
        ],
    ),
    (
        "spmd",
        &[
            "ops",
            "tape",
            "tensor",
            "cpu",
            "gpu",
            "trace",
            "collective",
            "placement",
            "mesh",
            "random",
            "dtype",
            "error",
        ],
    ),
    (
        "model",
        &[
            "spmd",
            "ops",
            "trace",
            "placement",
            "mesh",
            "dtype",
            "error",
        ],
    ),
    (
        "train",
        &[
            "model",
            "spmd",
            "ops",
            "tensor",
            "trace",
            "pipeline",
            "placement",
            "mesh",
            "random",
            "dtype",
            "files",
            "error",
        ],
    ),
    (
        "forecast",
        &[
            "cluster",
            "model",
            "trace",
            "pipeline",
            "collective",
            "mesh",
            "dtype",
            "files",
            "error",
        ],
    ),
    ("report", &["trace", "collective", "mesh", "error"]),
    ("reference", &["dtype", "random"]),
];

/// Rooms at the top of the house: nobody imports them, and they may import every room but the oracle of the tests.
const TOP: [&str; 3] = ["lib", "main", "cli"];

/// The files that may allow `unsafe`, as the sixteenth decision lists them: SIMD tokens, aligned memory, disjoint output
/// tiles, trusted shaders and kept pipelines.
const UNSAFE: [&str; 21] = [
    "kernels/attention/backward.rs",
    "kernels/attention/forward.rs",
    "kernels/attention/heads.rs",
    "kernels/attention/narrow/backward.rs",
    "kernels/attention/narrow/forward.rs",
    "kernels/attention/narrow/mod.rs",
    "kernels/attention/split.rs",
    "kernels/attention/tile.rs",
    "kernels/matmul/microkernel.rs",
    "kernels/matmul/mod.rs",
    "kernels/matmul/pack.rs",
    "kernels/matmul/pack_pairs.rs",
    "kernels/matmul/region.rs",
    "kernels/matmul/stream.rs",
    "kernels/matmul/strip.rs",
    "kernels/matmul/unit.rs",
    "kernels/matmul/unit_stream.rs",
    "kernels/memory.rs",
    "kernels/simd/mod.rs",
    "gpu/device.rs",
    "gpu/kept.rs",
];

/// Files are about 500 lines; beyond this a room becomes a folder.
const LONGEST: usize = 600;

struct Source {
    /// Path below `src`, with slashes.
    path: String,
    text: String,
}

impl Source {
    /// The room: the first part of the path, without the ending.
    fn room(&self) -> &str {
        self.path
            .split('/')
            .next()
            .expect("a path")
            .trim_end_matches(".rs")
    }
}

fn files(dir: &Path, into: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display())) {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            files(&path, into);
        } else if path.extension().is_some_and(|e| e == "rs") {
            into.push(path);
        }
    }
}

/// Sources of both crates: those of the kernels crate have paths that begin with `kernels/`.
fn all_sources() -> Vec<Source> {
    let mut all = sources_below("kernels/src", "kernels/");
    all.extend(sources());
    all
}

/// Sources of this crate.
fn sources() -> Vec<Source> {
    sources_below("src", "")
}

fn sources_below(folder: &str, prefix: &str) -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
    let mut paths = Vec::new();
    files(&root, &mut paths);
    paths.sort();
    let read = |path: &PathBuf| {
        let parts = path.strip_prefix(&root).expect("below src").iter();
        let parts: Vec<_> = parts.map(|p| p.to_string_lossy()).collect();
        let text = fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        Source {
            path: format!("{prefix}{}", parts.join("/")),
            text,
        }
    };
    let sources: Vec<Source> = paths.iter().map(read).collect();
    assert!(
        sources.len() > 50,
        "{} files below {}",
        sources.len(),
        root.display()
    );
    sources
}

/// The text without comments, and without what stands under `#[cfg(test)]`, as rustfmt lays it out: an item ends on
/// its first line, or with a brace as far in as its attribute. Returns the names of test modules too.
fn built(text: &str) -> (String, Vec<String>) {
    let (mut out, mut modules) = (String::new(), Vec::new());
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        let code = line.trim_start();
        if code.starts_with("//") {
            continue;
        }
        if code != "#[cfg(test)]" {
            let code = line.split(" // ").next().expect("a line has a beginning");
            out += &format!("{code}\n");
            continue;
        }
        let indent = &line[..line.len() - code.len()];
        // `) -> T {` goes on, `}`, `},` and `),` end an item, a variant or an arm.
        let ends = |l: &&str| {
            let rest = l.strip_prefix(indent).unwrap_or("");
            (rest.starts_with('}') || rest.starts_with(')')) && !rest.ends_with('{')
        };
        let item = lines
            .find(|l| !l.trim_start().starts_with("#["))
            .expect("an attribute has an item");
        let module = item.trim().strip_prefix("mod ");
        modules.extend(module.and_then(|m| m.strip_suffix(';')).map(String::from));
        if ![";", ",", "{}"].iter().any(|end| item.ends_with(end)) {
            lines.find(ends).expect("an item ends");
        }
    }
    (out, modules)
}

/// Sources that are built outside of tests.
fn built_sources() -> Vec<Source> {
    let all = sources();
    let mut tests = BTreeSet::new();
    for source in &all {
        let own = source.path.trim_end_matches(".rs").trim_end_matches("/mod");
        let beside = own == "lib" || own == "main";
        tests.extend(
            built(&source.text)
                .1
                .into_iter()
                .map(|m| if beside { m } else { format!("{own}/{m}") }),
        );
    }
    let of_tests = |s: &Source| {
        let own = s.path.trim_end_matches(".rs");
        tests
            .iter()
            .any(|t| own == t || own.starts_with(&format!("{t}/")))
    };
    let kept = all.into_iter().filter(|s| !of_tests(s));
    kept.map(|s| Source {
        text: built(&s.text).0,
        path: s.path,
    })
    .collect()
}

/// First names behind `crate::` (in the command, behind `supernode::` too), those in braces included.
fn imports(source: &Source) -> BTreeSet<String> {
    let mut roots = vec!["crate::"];
    if matches!(source.room(), "main" | "cli") {
        roots.push("supernode::");
    }
    let mut names = BTreeSet::new();
    for root in roots {
        for (at, _) in source.text.match_indices(root) {
            let before = source.text[..at].chars().next_back();
            if before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == '$') {
                continue;
            }
            let rest = &source.text[at + root.len()..];
            let word = |s: &str| {
                s.trim_start()
                    .chars()
                    .take_while(|c| c.is_alphanumeric() || *c == '_')
                    .collect::<String>()
            };
            match rest.strip_prefix('{') {
                None => drop(names.insert(word(rest))),
                Some(list) => names.extend(first_names(list)),
            }
        }
    }
    names.remove("");
    names.into_iter().map(|n| home(&n).to_string()).collect()
}

/// The first names of a list in braces, nested lists left out: `a::b, c::{d, e}, f}` gives a, c, f.
fn first_names(list: &str) -> Vec<String> {
    let (mut depth, mut names, mut name) = (0, Vec::new(), String::new());
    for c in list.chars() {
        match c {
            '}' if depth == 0 => break,
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => names.push(std::mem::take(&mut name)),
            _ if depth == 0 => name.push(c),
            _ => {}
        }
    }
    names.push(name);
    names
        .iter()
        .map(|n| n.trim().split("::").next().unwrap_or("").to_string())
        .filter(|n| !n.is_empty())
        .collect()
}

/// The room of a name that the crate's root exports again.
fn home(name: &str) -> &str {
    match name {
        "Error" | "ErrorKind" | "Result" => "error",
        "DType" | "bf16" | "f16" => "dtype",
        other => other,
    }
}

#[test]
fn arrows_point_one_way() {
    let mut wrong = Vec::new();
    let mut seen = 0;
    for source in built_sources() {
        let room = source.room();
        if TOP.contains(&room) {
            continue;
        }
        let Some((_, allowed)) = ARROWS.iter().find(|(name, _)| *name == room) else {
            wrong.push(format!(
                "{}: the table of arrows has no room '{room}'",
                source.path
            ));
            continue;
        };
        let known = |name: &str| TOP.contains(&name) || ARROWS.iter().any(|(n, _)| *n == name);
        for name in imports(&source) {
            seen += 1;
            if !known(&name) {
                wrong.push(format!(
                    "{}: imports crate::{name}, of which the table knows no room",
                    source.path
                ));
            } else if name != room && !allowed.contains(&name.as_str()) {
                wrong.push(format!(
                    "{}: '{room}' imports '{name}'; it may import {allowed:?}",
                    source.path
                ));
            }
        }
    }
    assert!(
        seen > 100,
        "only {seen} imports were found: the reader of sources is broken"
    );
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn a_room_imports_only_rooms_above_it_in_the_table() {
    for (i, (room, allowed)) in ARROWS.iter().enumerate() {
        for name in *allowed {
            assert!(
                ARROWS[..i].iter().any(|(n, _)| n == name),
                "'{room}' may import '{name}', which is not above it"
            );
        }
    }
}

#[test]
fn the_oracle_is_imported_by_tests_and_benches_only() {
    // The bench command checks every result against it before it is timed.
    let own = |path: &str| path.starts_with("reference") || path.starts_with("cli/bench/");
    for source in built_sources().iter().filter(|s| !own(&s.path)) {
        assert!(
            !imports(source).contains("reference"),
            "{} imports the textbook",
            source.path
        );
    }
}

#[test]
fn unsafe_stands_in_the_listed_files_only() {
    let allows = |s: &Source| {
        s.text
            .lines()
            .any(|l| l.trim_start().starts_with("#") && l.contains("allow(unsafe_code)"))
    };
    let found: Vec<String> = all_sources()
        .into_iter()
        .filter(allows)
        .map(|s| s.path)
        .collect();
    assert_eq!(found, UNSAFE);
}

#[test]
fn every_unsafe_block_says_why_it_is_sound() {
    for source in all_sources() {
        let lines: Vec<&str> = source.text.lines().collect();
        for (i, line) in lines.iter().enumerate() {
            let code = line.split("//").next().expect("a line has a beginning");
            if !code.contains("unsafe {") && !code.contains("unsafe impl") {
                continue;
            }
            // The reason stands on the line or in the comment above the statement.
            let above = lines[..i].iter().rev().take(12);
            let said = line.contains("SAFETY:") || above.clone().any(|l| l.contains("SAFETY:"));
            assert!(said, "{}:{} says no SAFETY reason", source.path, i + 1);
        }
    }
}

#[test]
fn no_file_outgrows_its_screen() {
    let long = all_sources()
        .into_iter()
        .map(|s| (s.text.lines().count(), s.path))
        .filter(|(n, _)| *n > LONGEST);
    let long: Vec<_> = long.collect();
    assert!(
        long.is_empty(),
        "longer than {LONGEST} lines, make a folder of each: {long:?}"
    );
}

#[test]
fn nothing_is_left_to_be_done() {
    for source in all_sources() {
        for word in ["todo!", "unimplemented!", "dbg!("] {
            assert!(!source.text.contains(word), "{} holds {word}", source.path);
        }
    }
}

#[test]
fn no_test_is_ignored_without_a_reason() {
    let mut all = Vec::new();
    for folder in ["src", "kernels/src", "tests"] {
        files(
            &Path::new(env!("CARGO_MANIFEST_DIR")).join(folder),
            &mut all,
        );
    }
    for path in all {
        let text = fs::read_to_string(&path).expect("a source");
        // In two pieces, so that this line is none itself.
        let bare = text.lines().find(|l| l.trim() == concat!("#[", "ignore]"));
        assert_eq!(
            bare,
            None,
            "{}: say why, as in #[ignore = \"..\"]",
            path.display()
        );
    }
}

#[test]
fn the_reader_of_sources_reads() {
    let text = "use crate::{mesh::Mesh, trace::{Event, Trace}, DType};\n// crate::comment\n#[cfg(test)]\nmod tests {\n    use crate::reference;\n}\nfn f() -> crate::Result<()> {}\n#[cfg(test)]\nmod proof;\nuse mycrate::x;\n";
    let (text, modules) = built(text);
    assert_eq!(modules, ["proof"]);
    let found = imports(&Source {
        path: "spmd/x.rs".into(),
        text,
    });
    assert_eq!(
        found.into_iter().collect::<Vec<_>>(),
        ["dtype", "error", "mesh", "trace"]
    );
}
