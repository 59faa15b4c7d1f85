//! Machines as data: chips, the systems that join them, and the software stacks that run on them.
//!
//! Every number stands in a file with unit, source and trust; what nobody published is named there. `chips/*.toml`,
//! `systems/*.toml` and `stacks/*.toml` are part of the crate; a file of one's own is named by its path.
//!
//! ```
//! use supernode::cluster::Machine;
//! let machine = Machine::named("cloudmatrix-384").unwrap();
//! assert_eq!(machine.chips(), 384);
//! assert_eq!(machine.chip.value("matmul.bf16").unwrap(), 707.8e12); // the Cube alone
//! assert!(machine.chip.value("matmul.fp8").is_err()); // there is none
//! ```

mod files;
mod quantity;
mod sheet;

pub use quantity::{Curve, Dimension, Number, Trust};
pub use sheet::Sheet;

use crate::error::{Error, ErrorKind, Result};
use files::{CHIPS, STACKS, SYSTEMS};
use sheet::{Field, Holds};

const STATUS: Field = (
    "status",
    Holds::Word(&["shipping", "announced", "reported"]),
);

static CHIP: [Field; 37] = {
    use Dimension::{Bandwidth, Bytes, Power, Pure, Rate};
    [
        STATUS,
        ("headline.bf16", Holds::Number(Rate)),
        ("headline.fp8", Holds::Number(Rate)),
        ("headline.fp4", Holds::Number(Rate)),
        ("headline.int8", Holds::Number(Rate)),
        ("headline.f32", Holds::Number(Rate)),
        ("matmul.bf16", Holds::Number(Rate)),
        ("matmul.fp8", Holds::Number(Rate)),
        ("matmul.fp4", Holds::Number(Rate)),
        ("matmul.int8", Holds::Number(Rate)),
        ("matmul.f32", Holds::Number(Rate)),
        ("vector.f32", Holds::Number(Rate)),
        ("memory.capacity", Holds::Number(Bytes)),
        ("memory.bandwidth", Holds::Number(Bandwidth)),
        ("link.up", Holds::Number(Bandwidth)),
        ("link.out", Holds::Number(Bandwidth)),
        ("power.tdp", Holds::Number(Power)),
        ("chip.cores", Holds::Number(Pure)),
        ("kernel.matmul.efficiency", Holds::Number(Pure)),
        ("kernel.matmul.memory", Holds::Number(Pure)),
        ("kernel.matmul.prologue", Holds::Number(Pure)),
        ("kernel.attention.efficiency", Holds::Number(Pure)),
        ("kernel.elementwise.memory", Holds::Number(Pure)),
        ("kernel.norm.memory", Holds::Number(Pure)),
        ("kernel.activation.memory", Holds::Number(Pure)),
        // Of products of narrow types, of attention's gradients, and of attention that reads a cache.
        ("kernel.matmul.narrow", Holds::Extra(Pure)),
        // Share of these that is left where products follow one another without end, and a chip meets its power limit.
        ("kernel.matmul.sustained", Holds::Extra(Pure)),
        ("kernel.attention.backward", Holds::Extra(Pure)),
        ("kernel.attention.memory", Holds::Extra(Pure)),
        // Within which 80 % of the measurements lie that a class was fitted to: of any product, of all of a layer's together, and
        // of the other classes.
        ("kernel.residual", Holds::Extra(Pure)),
        ("kernel.matmul.residual", Holds::Extra(Pure)),
        ("kernel.attention.residual", Holds::Extra(Pure)),
        ("kernel.elementwise.residual", Holds::Extra(Pure)),
        ("kernel.norm.residual", Holds::Extra(Pure)),
        ("kernel.activation.residual", Holds::Extra(Pure)),
        ("kernel.optimizer.memory", Holds::Extra(Pure)),
        ("kernel.softmax.memory", Holds::Extra(Pure)),
    ]
};

static SYSTEM: [Field; 21] = {
    use Dimension::{Bandwidth, Power, Pure, Time};
    [
        STATUS,
        ("system.chip", Holds::Text),
        ("system.stack", Holds::Text),
        ("system.grows", Holds::Word(&["yes", "no"])),
        ("system.chips", Holds::Number(Pure)),
        (
            "level.*.kind",
            Holds::Word(&["full-mesh", "switch", "clos", "torus"]),
        ),
        ("level.*.chips", Holds::Number(Pure)),
        ("level.*.bandwidth", Holds::Number(Bandwidth)),
        ("level.*.latency", Holds::Number(Time)),
        ("level.*.efficiency", Holds::Number(Pure)),
        ("level.*.oversubscription", Holds::Extra(Pure)),
        // Chips along each dimension of a torus or a full mesh, such as 8x8.
        ("level.*.shape", Holds::Note),
        // Whether its switches add.
        ("level.*.reduces", Holds::Option(&["yes", "no"])),
        // Whether it uses the same ports of a chip as the level below.
        ("level.*.ports", Holds::Option(&["own", "shared"])),
        ("exchange.share", Holds::Extra(Pure)),
        ("exchange.narrow.near", Holds::Extra(Bandwidth)),
        ("exchange.narrow.far", Holds::Extra(Bandwidth)),
        ("exchange.wide.near", Holds::Extra(Bandwidth)),
        ("exchange.wide.far", Holds::Extra(Bandwidth)),
        // The same of collectives by measured curves.
        ("network.residual", Holds::Extra(Pure)),
        ("power.total", Holds::Number(Power)),
    ]
};

static STACK: [Field; 27] = [
    ("stack.attention", Holds::Word(&["fused", "unfused"])),
    ("stack.dropout", Holds::Word(&["yes", "no"])),
    (
        "stack.tp_overlap",
        Holds::Word(&["none", "backward", "all"]),
    ),
    ("stack.dp_overlap", Holds::Word(&["yes", "no"])),
    ("stack.pp_overlap", Holds::Word(&["yes", "no"])),
    ("stack.gradient", Holds::Word(&["f32", "bf16"])),
    // Whether the product that gives a weight's gradient adds to the sum itself (if nothing is said), or a kernel does after it.
    ("stack.accumulation", Holds::Option(&["fused", "apart"])),
    // What selective recomputation makes again beside the core of unfused attention (with latent attention norms and up-projections if
    // nothing is said), and in what type inputs of narrow products are kept: see `forecast::Again`.
    ("stack.recompute_norms", Holds::Option(&["yes", "no"])),
    (
        "stack.recompute_up_projections",
        Holds::Option(&["yes", "no"]),
    ),
    (
        "stack.recompute_activations",
        Holds::Option(&["no", "experts", "all"]),
    ),
    ("stack.stored", Holds::Option(&["wide", "inputs", "narrow"])),
    // The optimizer's two moments; f32 if nothing is said.
    ("stack.moments", Holds::Option(&["f32", "bf16"])),
    ("stack.launch", Holds::Number(Dimension::Time)),
    // Whether the host runs ahead from one part of a layer to the next (if nothing is said), or each part begins on an idle chip and
    // is waited for, as where parts are timed alone.
    ("stack.parts", Holds::Option(&["joined", "alone"])),
    ("stack.allocator", Holds::Number(Dimension::Pure)),
    ("stack.interference", Holds::Number(Dimension::Pure)),
    // How tokens reach their experts, and whether other micro-batches compute meanwhile.
    (
        "stack.exchange",
        Holds::Word(&["all-to-all", "deduplicated"]),
    ),
    ("stack.exchange_overlap", Holds::Word(&["yes", "no"])),
    ("stack.reshard", Holds::Word(&["auto", "yes", "no"])),
    ("stack.imbalance", Holds::Number(Dimension::Pure)),
    // Share of nodes that are slow, and by how much.
    ("stack.stragglers", Holds::Number(Dimension::Pure)),
    ("stack.straggling", Holds::Number(Dimension::Pure)),
    ("stack.jitter", Holds::Number(Dimension::Pure)),
    // Seconds between one kernel and the next, of a step beside its passes, and of a message between stages beside its bytes.
    ("stack.gap", Holds::Extra(Dimension::Time)),
    ("stack.step", Holds::Extra(Dimension::Time)),
    ("stack.message", Holds::Extra(Dimension::Time)),
    // The host's seconds for a kernel in inference, where launches are recorded once and replayed; those of training if nothing is said.
    ("stack.replay", Holds::Extra(Dimension::Time)),
];

/// How the chips of a level are joined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wiring {
    /// Every chip has a link to every other: a group uses the links among its members only.
    FullMesh,
    /// Switches that give every chip its whole bandwidth to any other.
    Switch,
    /// A tree of switches.
    Clos,
    /// Neighbours in a ring along each dimension.
    Torus,
}

/// Chips, and the systems in which they are sold.
const HOMES: [(&str, &str); 10] = [
    ("a100", "dgx-a100"),
    ("h100", "dgx-h100"),
    ("h200", "dgx-h200"),
    ("h800", "dgx-h800"),
    ("gb200", "gb200-nvl72"),
    ("rubin", "vera-rubin-nvl144"),
    ("ascend-910b", "atlas-800t-a2"),
    ("ascend-910c", "cloudmatrix-384"),
    ("ascend-950dt", "atlas-950-superpod"),
    ("ascend-960", "atlas-960-superpod"),
];

/// More chips than anyone will join.
const ANY_NUMBER: usize = 1 << 30;

/// One level of a system's network.
#[derive(Clone, Debug)]
pub struct Level {
    /// Its name in the file.
    pub name: String,
    /// How its chips are joined.
    pub wiring: Wiring,
    /// Chips that it joins.
    pub chips: usize,
    /// Bytes a second that a chip can send through it, overheads and oversubscription taken off.
    pub bandwidth: f64,
    /// Seconds from chip to chip for a small message.
    pub latency: f64,
    /// Chips along each dimension of a torus or a full mesh.
    pub shape: Vec<usize>,
    /// Whether its switches add what passes them.
    pub reduces: bool,
    /// Whether it uses the same ports of a chip as the level below.
    pub shared: bool,
}

/// A chip, the network that joins many of it, and the software on it.
#[derive(Clone, Debug)]
pub struct Machine {
    /// The system's numbers.
    pub system: Sheet,
    /// The chip's.
    pub chip: Sheet,
    /// The software's.
    pub stack: Sheet,
}

impl Machine {
    /// A system of this crate by its name, or of a file by its path (one that ends in `.toml`). A grade of the chip is named
    /// behind a colon: `cloudmatrix-384:626`. A chip's name stands for the system that it is sold in.
    ///
    /// # Errors
    /// [`ErrorKind::Input`] with the names that there are, or with file, line and field; [`ErrorKind::Io`] for a file.
    pub fn named(name: &str) -> Result<Machine> {
        let (name, grade) = split_grade(name);
        // A chip's name means the system that it is sold in.
        let name = HOMES
            .iter()
            .find(|(chip, _)| *chip == name)
            .map_or(name, |(_, system)| *system);
        // A grade is one of the chip, and of the system where that differs too.
        let plain = read("system", name, &SYSTEMS, &SYSTEM, None)?;
        let graded = grade.and_then(|g| read("system", name, &SYSTEMS, &SYSTEM, Some(g)).ok());
        let system = graded.unwrap_or(plain);
        // Files that a file names lie beside it.
        let beside = |field: &str| -> String {
            let named = word(&system, field);
            let folder = std::path::Path::new(name).parent();
            match folder {
                Some(folder) if name.ends_with(".toml") && named.ends_with(".toml") => {
                    folder.join(named).to_string_lossy().into_owned()
                }
                _ => named.to_string(),
            }
        };
        let chip = read("chip", &beside("system.chip"), &CHIPS, &CHIP, grade)?;
        let stack = read("stack", &beside("system.stack"), &STACKS, &STACK, None)?;
        let machine = Machine {
            system,
            chip,
            stack,
        };
        machine.levels()?;
        Ok(machine)
    }

    /// The same machine with another stack, by name or by path.
    ///
    /// # Errors
    /// As [`Machine::named`].
    pub fn with_stack(mut self, name: &str) -> Result<Machine> {
        self.stack = read("stack", name, &STACKS, &STACK, None)?;
        Ok(self)
    }

    /// The names of the systems of this crate.
    pub fn names() -> impl Iterator<Item = &'static str> {
        SYSTEMS.iter().map(|(name, _)| *name)
    }

    /// The names of the chips of this crate.
    pub fn chip_names() -> impl Iterator<Item = &'static str> {
        CHIPS.iter().map(|(name, _)| *name)
    }

    /// A chip of this crate, `name` or `name:grade`.
    ///
    /// # Errors
    /// As [`Machine::named`].
    pub fn chip_named(name: &str) -> Result<Sheet> {
        let (name, grade) = split_grade(name);
        read("chip", name, &CHIPS, &CHIP, grade)
    }

    /// Chips of the system as it is sold.
    pub fn chips(&self) -> usize {
        self.system.find("system.chips").map_or(1, |c| c as usize)
    }

    /// The most chips that can be joined.
    pub fn most_chips(&self) -> usize {
        let levels = self.levels().unwrap_or_default();
        levels.last().map_or(1, |l| l.chips)
    }

    /// The levels of the network, the smallest first.
    ///
    /// # Errors
    /// If a number is missing, or the levels contradict each other.
    pub fn levels(&self) -> Result<Vec<Level>> {
        let mut levels = Vec::new();
        for name in self.system.parts("level") {
            let value = |part: &str| self.system.value(&format!("level.{name}.{part}"));
            let slower = value("oversubscription").unwrap_or(1.0);
            let wiring = match self.system.word(&format!("level.{name}.kind")) {
                Some("full-mesh") => Wiring::FullMesh,
                Some("switch") => Wiring::Switch,
                Some("torus") => Wiring::Torus,
                _ => Wiring::Clos,
            };
            let word = |part: &str| self.system.word(&format!("level.{name}.{part}"));
            let chips = value("chips")? as usize;
            levels.push(Level {
                wiring,
                chips,
                bandwidth: value("bandwidth")? * value("efficiency")? / slower,
                latency: value("latency")?,
                shape: self.shape(&name, word("shape"), chips)?,
                reduces: word("reduces") == Some("yes"),
                shared: word("ports") == Some("shared"),
                name,
            });
        }
        levels.sort_by_key(|l| l.chips);
        // A growing system's last level joins as many chips as one likes: its number is what was built.
        if let (Some(last), Some("yes")) = (levels.last_mut(), self.system.word("system.grows")) {
            last.chips = last.chips.max(ANY_NUMBER);
        }
        let wrong = |why: String| {
            let file = &self.system.file;
            Err(Error::new(
                ErrorKind::Input,
                format!("{file}: level: {why}"),
            ))
        };
        if levels.is_empty() {
            return wrong("there is none; a system has at least one level".into());
        }
        if let Some(l) = levels.iter().find(|l| l.chips < 2 || l.bandwidth <= 0.0) {
            return wrong(format!(
                "'{}' joins {} chips at {} B/s; it needs two and more, and a bandwidth",
                l.name, l.chips, l.bandwidth
            ));
        }
        if let Some(pair) = levels.windows(2).find(|p| p[1].chips <= p[0].chips) {
            return wrong(format!(
                "'{}' joins {} chips, no more than the {} of '{}'",
                pair[1].name, pair[1].chips, pair[0].chips, pair[0].name
            ));
        }
        Ok(levels)
    }

    /// Chips along each dimension of a level, `8x8` in the file; one dimension if nothing is said.
    fn shape(&self, level: &str, text: Option<&str>, chips: usize) -> Result<Vec<usize>> {
        let Some(text) = text else {
            return Ok(vec![chips]);
        };
        let parts: Option<Vec<usize>> = text.split('x').map(|p| p.parse().ok()).collect();
        let product =
            |parts: &Vec<usize>| parts.iter().try_fold(1usize, |all, p| all.checked_mul(*p));
        match parts {
            Some(parts) if product(&parts) == Some(chips) => Ok(parts),
            _ => {
                let file = &self.system.file;
                let why = format!(
                    "{file}: level.{level}.shape: '{text}' does not make {chips} chips; write it as 8x8"
                );
                Err(Error::new(ErrorKind::Input, why))
            }
        }
    }

    /// Sets a number or word of chip, system or stack, whichever has the field; numbers in SI.
    ///
    /// # Errors
    /// If none has it, or the value does not fit.
    pub fn set(&mut self, field: &str, value: &str) -> Result<()> {
        let first = field.split('.').next().unwrap_or("");
        match first {
            "stack" => self.stack.set(field, value),
            "system" | "level" | "exchange" => self.system.set(field, value),
            "power" if field == "power.total" => self.system.set(field, value),
            _ => self.chip.set(field, value),
        }
    }

    /// Numbers that nobody measured on this machine and that stand in for those that somebody should.
    pub fn assumed(&self) -> Vec<String> {
        let sheets = [&self.system, &self.chip, &self.stack];
        let all = sheets
            .iter()
            .flat_map(|s| s.numbers().map(|(k, n)| (&s.name, k, n)));
        all.filter(|(_, _, n)| n.trust == Trust::Assumed)
            .map(|(name, key, _)| format!("{name} {key}"))
            .collect()
    }
}

fn word<'a>(sheet: &'a Sheet, field: &str) -> &'a str {
    sheet
        .word(field)
        .expect("the reader checked that it is there")
}

/// A name, and the grade behind its last colon. A path may hold colons: what ends in `.toml` has no grade.
fn split_grade(name: &str) -> (&str, Option<&str>) {
    match name.rsplit_once(':') {
        Some((name, grade)) if !grade.ends_with(".toml") => (name, Some(grade)),
        _ => (name, None),
    }
}

fn read(
    what: &str,
    name: &str,
    shelf: &[(&str, &str)],
    fields: &'static [Field],
    grade: Option<&str>,
) -> Result<Sheet> {
    if name.ends_with(".toml") {
        let text =
            crate::files::read_text(name.as_ref(), crate::files::DESCRIPTION).map_err(|e| {
                Error::new(ErrorKind::Io, format!("cannot read the {what} {name}: {e}"))
            })?;
        return Sheet::read(name, name, &text, fields, grade);
    }
    match shelf.iter().find(|(known, _)| *known == name) {
        Some((_, text)) => Sheet::read(name, &format!("{what}s/{name}.toml"), text, fields, grade),
        None => {
            let names: Vec<_> = shelf.iter().map(|(n, _)| *n).collect();
            let chip = what == "system" && CHIPS.iter().any(|(chip, _)| *chip == name);
            let wrong = match chip {
                true => format!("'{name}' is a chip, and no system that joins it is described"),
                false => format!("there is no {what} '{name}'"),
            };
            let why = format!(
                "{wrong}; there are {}, or a file by its path",
                names.join(", ")
            );
            Err(Error::new(ErrorKind::Input, why))
        }
    }
}

#[cfg(test)]
mod tests;
