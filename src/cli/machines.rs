//! `supernode machines`.

use super::output::print_text;
use serde_json::{Map, Value, json};
use supernode::Result;
use supernode::cluster::{Machine, Sheet};

/// Arguments of `supernode machines`.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// Systems or chips, by name, NAME:GRADE or file; without one, all of them. Of several, each is compared with the last
    #[arg(value_name = "NAME")]
    names: Vec<String>,
    /// Print one JSON object a line
    #[arg(long)]
    json: bool,
}

/// A line of the comparison: name, value of the whole system in the unit, unit.
const ROWS: [(&str, &str, &str, f64); 9] = [
    ("bf16 headline", "headline.bf16", "PFLOP/s", 1e15),
    ("bf16 matmul", "matmul.bf16", "PFLOP/s", 1e15),
    ("fp8 matmul", "matmul.fp8", "PFLOP/s", 1e15),
    ("fp4 matmul", "matmul.fp4", "PFLOP/s", 1e15),
    ("int8 matmul", "matmul.int8", "PFLOP/s", 1e15),
    ("memory", "memory.capacity", "TB", 1e12),
    ("memory bandwidth", "memory.bandwidth", "TB/s", 1e12),
    ("scale-up, one way", "link.up", "TB/s", 1e12),
    ("power", "power.total", "kW", 1e3),
];

/// A system, or a chip by itself.
struct Described {
    name: String,
    chip: Sheet,
    machine: Option<Machine>,
}

impl Described {
    fn named(name: &str) -> Result<Self> {
        let plain = name.split(':').next().unwrap_or(name);
        if Machine::chip_names().any(|chip| chip == plain) {
            let chip = Machine::chip_named(name)?;
            return Ok(Described {
                name: name.into(),
                chip,
                machine: None,
            });
        }
        let machine = Machine::named(name)?;
        Ok(Described {
            name: name.into(),
            chip: machine.chip.clone(),
            machine: Some(machine),
        })
    }

    fn chips(&self) -> f64 {
        self.machine.as_ref().map_or(1.0, |m| m.chips() as f64)
    }

    /// The whole system's value in SI, or why there is none.
    fn value(&self, field: &str) -> Result<f64> {
        match (&self.machine, field) {
            (Some(machine), "power.total") => machine.system.value(field),
            (None, "power.total") => self.chip.value("power.tdp"),
            _ => Ok(self.chips() * self.chip.value(field)?),
        }
    }

    fn status(&self) -> &str {
        let sheet = self.machine.as_ref().map_or(&self.chip, |m| &m.system);
        sheet.word("status").unwrap_or("")
    }

    fn title(&self) -> &str {
        self.machine
            .as_ref()
            .map_or(&self.chip.title, |m| &m.system.title)
    }
}

/// Runs the command.
pub(super) fn run(a: &Arguments) -> Result<()> {
    let all = Machine::names()
        .chain(Machine::chip_names())
        .map(String::from);
    let names: Vec<String> = if a.names.is_empty() {
        all.collect()
    } else {
        a.names.clone()
    };
    let described: Vec<_> = names
        .iter()
        .map(|n| Described::named(n))
        .collect::<Result<_>>()?;
    if a.json {
        described.iter().for_each(print_json);
    } else if a.names.is_empty() {
        print_list(&described);
    } else {
        print_comparison(&described);
    }
    Ok(())
}

fn print_list(all: &[Described]) {
    print_text(&format!(
        "{:<24} {:>8} {:>10} {:>10} {:>10} {:>9} {:<10} {}\n",
        "name", "chips", "bf16 PF/s", "fp8 PF/s", "memory TB", "kW", "status", "what it is"
    ));
    for d in all {
        let cell = |field: &str, scale: f64| match d.value(field) {
            Ok(v) => short(v / scale),
            Err(_) => "-".into(),
        };
        print_text(&format!(
            "{:<24} {:>8} {:>10} {:>10} {:>10} {:>9} {:<10} {}\n",
            d.name,
            d.chips(),
            cell("matmul.bf16", 1e15),
            cell("matmul.fp8", 1e15),
            cell("memory.capacity", 1e12),
            cell("power.total", 1e3),
            d.status(),
            d.title()
        ));
    }
    print_text(
        "dense rates of matrix units; - where nobody published a number or the machine has no such unit\n",
    );
}

fn print_comparison(all: &[Described]) {
    for d in all {
        print_text(&format!("{}: {} ({})\n", d.name, d.title(), d.status()));
    }
    let (last, others) = all.split_last().expect("clap gave a name");
    let mut head = format!("{:<26}", "of the whole system");
    all.iter().for_each(|d| head += &format!(" {:>26}", d.name));
    others
        .iter()
        .for_each(|d| head += &format!(" {:>26}", format!("{} / last", d.name)));
    print_text(&(head + "\n"));
    let mut chips = format!("{:<26}", "chips");
    all.iter()
        .for_each(|d| chips += &format!(" {:>26}", d.chips()));
    others
        .iter()
        .for_each(|d| chips += &format!(" {:>26.2}", d.chips() / last.chips()));
    print_text(&(chips + "\n"));
    for (name, field, unit, scale) in ROWS {
        let mut line = format!("{:<26}", format!("{name}, {unit}"));
        let cell = |v: Result<f64>, scale: f64| v.map_or("-".into(), |v| short(v / scale));
        all.iter()
            .for_each(|d| line += &format!(" {:>26}", cell(d.value(field), scale)));
        for d in others {
            let ratio = match (d.value(field), last.value(field)) {
                (Ok(a), Ok(b)) => format!("{:.2}", a / b),
                _ => "-".into(),
            };
            line += &format!(" {ratio:>26}");
        }
        print_text(&(line + "\n"));
    }
    for d in all {
        let worst = d
            .chip
            .numbers()
            .chain(d.machine.iter().flat_map(|m| m.system.numbers()));
        let assumed: Vec<_> = worst
            .filter(|(_, n)| n.trust >= supernode::cluster::Trust::Press)
            .map(|(key, n)| format!("{key} ({})", n.trust))
            .collect();
        if !assumed.is_empty() {
            print_text(&format!(
                "{}: not measured or not official: {}\n",
                d.name,
                assumed.join(", ")
            ));
        }
    }
}

fn print_json(d: &Described) {
    let mut fields = Map::new();
    fields.insert("name".into(), json!(d.name));
    fields.insert("title".into(), json!(d.title()));
    fields.insert("status".into(), json!(d.status()));
    fields.insert("chips".into(), json!(d.chips() as u64));
    let mut numbers = Map::new();
    for sheet in std::iter::once(&d.chip).chain(d.machine.iter().map(|m| &m.system)) {
        for (key, n) in sheet.numbers() {
            let entry = json!({"value": n.value, "source": n.source, "trust": n.trust.to_string()});
            numbers.insert(key.into(), entry);
        }
        for key in sheet.unknown() {
            numbers.insert(key.into(), Value::Null);
        }
    }
    fields.insert("numbers_si".into(), Value::Object(numbers));
    print_text(&format!("{}\n", Value::Object(fields)));
}

/// Three digits.
fn short(v: f64) -> String {
    match v {
        v if v >= 99.95 => format!("{v:.0}"),
        v if v >= 9.995 => format!("{v:.1}"),
        v if v >= 0.9995 => format!("{v:.2}"),
        v => format!("{v:.3}"),
    }
}
