//! What is timed: cases from a file, a JSON object a line, or the default set.
//!
//! All cases are read and checked before the first one runs. Fields that no op knows are kept, to be printed back: a case
//! may carry a name or another library's result.

use super::measure::Measured;
use super::{attention::Heads, input, matmul::Product, train_step::Step};
use clap::ValueEnum;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde::ser::SerializeMap;
use serde::{Deserialize, Serialize, Serializer};
use serde_json::Value;
use std::fmt;
use std::io::Read;
use std::num::NonZeroUsize;
use std::path::Path;
use supernode::spmd::Chip;
use supernode::{DType, Error, ErrorKind, Result};

/// What can be timed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
pub(super) enum Op {
    Matmul,
    Attention,
    TrainStep,
}

/// What a case asks for.
#[derive(Debug, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub(super) enum Work {
    Matmul(Product),
    Attention(Heads),
    TrainStep(Step),
}

impl Work {
    pub(super) fn op(&self) -> Op {
        match self {
            Work::Matmul(_) => Op::Matmul,
            Work::Attention(_) => Op::Attention,
            Work::TrainStep(_) => Op::TrainStep,
        }
    }

    /// The sizes in short, for a table.
    pub(super) fn name(&self) -> String {
        match self {
            Work::Matmul(p) => format!("matmul {p}"),
            Work::Attention(h) => format!("attention {h}"),
            Work::TrainStep(s) => format!("train_step {s}"),
        }
    }
}

/// What every case says beside its sizes.
#[derive(Debug, Deserialize)]
struct Shared {
    dtype: DType,
    #[serde(default = "one")]
    threads: NonZeroUsize,
}

/// The default of what counts something.
pub(super) fn one() -> NonZeroUsize {
    NonZeroUsize::MIN
}

/// One case.
#[derive(Debug)]
pub(super) struct Case {
    /// Where it was read: `file:line`.
    pub(super) origin: String,
    /// The object as it was read.
    pub(super) fields: Fields,
    pub(super) work: Work,
    pub(super) dtype: DType,
    pub(super) threads: usize,
}

impl Case {
    /// More threads than this are a mistake.
    const MOST_THREADS: usize = 1024;

    fn parse(line: &str, origin: String) -> Result<Self> {
        let understood = Self::understand(line);
        let (fields, work, shared) =
            understood.map_err(|why| input(&format!("{origin}: {why}")))?;
        Ok(Case {
            origin,
            fields,
            work,
            dtype: shared.dtype,
            threads: shared.threads.get(),
        })
    }

    fn understand(line: &str) -> Result<(Fields, Work, Shared), String> {
        let fields: Fields = serde_json::from_str(line).map_err(|e| e.to_string())?;
        let object = fields.to_object();
        let work: Work = serde_json::from_value(object.clone()).map_err(|e| e.to_string())?;
        let shared: Shared = serde_json::from_value(object).map_err(|e| e.to_string())?;
        if !shared.dtype.is_float() {
            return Err(format!(
                "dtype {} does not compute; choose f32, bf16 or f16",
                shared.dtype
            ));
        }
        let threads = shared.threads.get();
        if threads > Self::MOST_THREADS {
            return Err(format!(
                "{threads} threads; at most {} can be asked for",
                Self::MOST_THREADS
            ));
        }
        match &work {
            Work::Matmul(p) => p.check(),
            Work::Attention(h) => h.check(),
            Work::TrainStep(s) => s.check(shared.dtype),
        }?;
        Ok((fields, work, shared))
    }

    /// Verifies and times the case on a chip.
    pub(super) fn run(&self, chip: &Chip) -> Measured {
        match &self.work {
            Work::Matmul(p) => p.run(chip, self.dtype),
            Work::Attention(h) => h.run(chip, self.dtype),
            Work::TrainStep(s) => s.run(chip, self.dtype),
        }
    }
}

/// Cases in order.
pub(super) struct Cases(pub(super) Vec<Case>);

impl Cases {
    /// Reads a file of cases, or standard input if it is called `-`. Empty lines are passed over.
    pub(super) fn read(path: &Path) -> Result<Self> {
        let (name, text) = if path == Path::new("-") {
            let mut text = String::new();
            let read = std::io::stdin().read_to_string(&mut text);
            ("standard input".to_string(), read.map(|_| text))
        } else {
            (
                path.display().to_string(),
                supernode::files::read_text(path, supernode::files::DESCRIPTION),
            )
        };
        let text =
            text.map_err(|e| Error::new(ErrorKind::Io, format!("cannot read {name}: {e}")))?;
        let lines = text
            .lines()
            .enumerate()
            .filter(|(_, l)| !l.trim().is_empty());
        let cases = lines.map(|(i, line)| Case::parse(line, format!("{name}:{}", i + 1)));
        let cases = cases.collect::<Result<Vec<Case>>>()?;
        if cases.is_empty() {
            return Err(input(&format!(
                "{name} holds no case; write one JSON object a line"
            )));
        }
        Ok(Cases(cases))
    }

    /// Kernels with one thread and with all cores, or with `threads`; a training step with the most of these.
    pub(super) fn default_set(threads: Option<usize>) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let mut counts = threads.map_or(vec![1, cores], |t| vec![t]);
        counts.dedup();
        let most = counts[counts.len() - 1];
        let mut cases = Vec::new();
        for (i, line) in DEFAULT_SET.lines().enumerate() {
            for &threads in &counts {
                let origin = format!("default case {}", i + 1);
                let line = format!("{{{line},\"threads\":{threads}}}");
                let case = Case::parse(&line, origin).expect("the default set is correct");
                if case.work.op() != Op::TrainStep || threads == most {
                    cases.push(case);
                }
            }
        }
        Cases(cases)
    }
}

/// Without braces and threads.
const DEFAULT_SET: &str = r#""op":"matmul","m":64,"k":64,"n":64,"layout":"nn","dtype":"f32"
"op":"matmul","m":512,"k":512,"n":512,"layout":"nn","dtype":"f32"
"op":"matmul","m":1024,"k":1024,"n":1024,"layout":"nn","dtype":"f32"
"op":"matmul","m":512,"k":768,"n":3072,"layout":"nt","dtype":"f32"
"op":"matmul","m":1,"k":4096,"n":4096,"layout":"nn","dtype":"f32"
"op":"matmul","batch":48,"m":256,"k":64,"n":256,"layout":"nt","dtype":"f32"
"op":"matmul","m":1024,"k":1024,"n":1024,"layout":"nn","dtype":"bf16"
"op":"matmul","m":512,"k":512,"n":512,"layout":"nn","dtype":"f16"
"op":"attention","batch":1,"heads":12,"kv_heads":12,"tokens":1024,"head_dim":64,"causal":true,"pass":"forward","dtype":"f32"
"op":"attention","batch":1,"heads":12,"kv_heads":12,"tokens":1024,"head_dim":64,"causal":true,"pass":"backward","dtype":"f32"
"op":"attention","batch":1,"heads":12,"kv_heads":12,"tokens":1024,"head_dim":64,"causal":true,"pass":"forward","dtype":"bf16"
"op":"attention","batch":1,"heads":12,"kv_heads":12,"tokens":1024,"head_dim":64,"causal":true,"pass":"backward","dtype":"bf16"
"op":"train_step","model":"char-6x384","batch":4,"tokens":256,"dtype":"f32"
"op":"train_step","model":"char-6x384","batch":4,"tokens":256,"dtype":"bf16""#;

/// An object's fields in the order in which they were written.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Fields(Vec<(String, Value)>);

impl Fields {
    /// Sets a field, at the end if it is new.
    pub(super) fn set(&mut self, name: &str, value: impl Into<Value>) {
        let value = value.into();
        match self.0.iter_mut().find(|(n, _)| n == name) {
            Some((_, old)) => *old = value,
            None => self.0.push((name.to_string(), value)),
        }
    }

    fn to_object(&self) -> Value {
        Value::Object(self.0.iter().cloned().collect())
    }
}

impl Serialize for Fields {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (name, value) in &self.0 {
            map.serialize_entry(name, value)?;
        }
        map.end()
    }
}

impl<'de> Deserialize<'de> for Fields {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Object;
        impl<'de> Visitor<'de> for Object {
            type Value = Fields;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a JSON object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Fields, A::Error> {
                let mut fields = Fields(Vec::new());
                while let Some((name, value)) = map.next_entry::<String, Value>()? {
                    if fields.0.iter().any(|(n, _)| *n == name) {
                        let twice = format!("the field `{name}` stands there twice");
                        return Err(serde::de::Error::custom(twice));
                    }
                    fields.0.push((name, value));
                }
                Ok(fields)
            }
        }
        deserializer.deserialize_map(Object)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_keep_their_order_and_new_ones_follow() {
        let text = r#"{"z":1,"a":[2.5,null],"m":"x"}"#;
        let mut fields: Fields = serde_json::from_str(text).unwrap();
        assert_eq!(serde_json::to_string(&fields).unwrap(), text);
        fields.set("a", 3);
        fields.set("b", "y");
        assert_eq!(
            serde_json::to_string(&fields).unwrap(),
            r#"{"z":1,"a":3,"m":"x","b":"y"}"#
        );
    }

    #[test]
    fn the_default_set_is_made_for_the_threads() {
        let three = Cases::default_set(Some(3)).0;
        assert!(three.iter().all(|c| c.threads == 3));
        assert_eq!(three.len(), DEFAULT_SET.lines().count());
        let any = Cases::default_set(None).0;
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let steps: Vec<usize> = any
            .iter()
            .filter(|c| c.work.op() == Op::TrainStep)
            .map(|c| c.threads)
            .collect();
        assert_eq!(steps, [cores, cores]);
    }

    #[test]
    fn what_is_wrong_is_said_with_its_place() {
        let refused = |line: &str, says: &str| {
            let why = Case::parse(line, "f:7".into()).unwrap_err().to_string();
            assert!(
                why.starts_with("f:7: ") && why.contains(says),
                "{line}: {why}"
            );
        };
        refused("[]", "JSON object");
        refused(r#"{"op":"matmul""#, "EOF");
        refused(r#"{"m":1}"#, "op");
        refused(r#"{"op":"sort"}"#, "sort");
        refused(r#"{"op":"matmul","m":1,"n":1,"dtype":"f32"}"#, "`k`");
        refused(
            r#"{"op":"matmul","m":1,"n":0,"k":1,"dtype":"f32"}"#,
            "nonzero",
        );
        refused(
            r#"{"op":"matmul","m":1,"m":2,"n":1,"k":1,"dtype":"f32"}"#,
            "`m` stands there twice",
        );
        refused(r#"{"op":"matmul","m":1,"n":1,"k":1}"#, "`dtype`");
        refused(r#"{"op":"matmul","m":1,"n":1,"k":1,"dtype":"f64"}"#, "f64");
        refused(r#"{"op":"matmul","m":1,"n":1,"k":1,"dtype":"u32"}"#, "u32");
        refused(
            r#"{"op":"matmul","m":1,"n":1,"k":1,"dtype":"f32","layout":"xy"}"#,
            "xy",
        );
        refused(
            r#"{"op":"matmul","m":1,"n":1,"k":1,"dtype":"f32","threads":0}"#,
            "nonzero",
        );
        refused(
            r#"{"op":"matmul","m":1,"n":1,"k":1,"dtype":"f32","threads":5000}"#,
            "5000",
        );
        refused(
            r#"{"op":"matmul","m":4000000000,"n":4000000000,"k":1,"dtype":"f32"}"#,
            "too large",
        );
        let heads = |h: usize, g: usize, d: usize| {
            format!(
                r#"{{"op":"attention","batch":1,"heads":{h},"kv_heads":{g},"tokens":4,"head_dim":{d},"causal":true,"pass":"forward","dtype":"f32"}}"#
            )
        };
        refused(&heads(4, 3, 8), "3 key heads");
        refused(&heads(4, 2, 257), "257");
        refused(&heads(4, 2, 8).replace("forward", "sideways"), "sideways");
        let step =
            r#"{"op":"train_step","model":"char-6x384","batch":1,"tokens":257,"dtype":"f32"}"#;
        refused(step, "257");
        refused(&step.replace("257", "8").replace("f32", "f16"), "f16");
        refused(&step.replace("char", "word"), "word-6x384");
    }
}
