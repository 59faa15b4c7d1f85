//! Reading a machine's file, strictly.
//!
//! A sheet is TOML. A number is written `{ value = 80, unit = "GB", source = "S10", trust = "official" }`, where the source
//! is a key of the file's `[sources]`. What nobody published is named in `unknown = ["power.tdp"]`, what the machine does not
//! have in `absent`. Every field of the kind of file must stand in exactly one of these places; anything else is refused with
//! file, line and field, because a silently ignored number is a wrong forecast.

use super::quantity::{Curve, Dimension, Number, Trust, outside};
use crate::error::{Error, ErrorKind, Result};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// What a field of a sheet is.
#[derive(Clone, Copy, Debug)]
pub(super) enum Holds {
    /// A number that must be there, or be named unknown or absent.
    Number(Dimension),
    /// A number that may be left out.
    Extra(Dimension),
    /// One of these words.
    Word(&'static [&'static str]),
    /// One of these words, or nothing.
    Option(&'static [&'static str]),
    /// Any text.
    Text,
    /// Any text, or nothing.
    Note,
}

/// A field: its name with dots, `*` for any one part, and what it holds.
pub(super) type Field = (&'static str, Holds);

/// A file of numbers, read and checked against the fields of its kind.
#[derive(Clone, Debug)]
pub struct Sheet {
    /// The name under which it is asked for.
    pub name: String,
    /// The file.
    pub file: String,
    /// What people call it.
    pub title: String,
    numbers: BTreeMap<String, Number>,
    words: BTreeMap<String, String>,
    curves: Vec<Curve>,
    unknown: BTreeSet<String>,
    absent: BTreeSet<String>,
    fields: &'static [Field],
}

impl Sheet {
    /// The number called `field`.
    ///
    /// # Errors
    /// If nobody published it, the machine does not have it, or no such field exists; with name and field.
    pub fn number(&self, field: &str) -> Result<&Number> {
        self.numbers.get(field).ok_or_else(|| {
            let why = if self.absent.contains(field) {
                "the machine does not have it"
            } else if self.unknown.contains(field) {
                "nobody published it"
            } else {
                "the file does not give it"
            };
            let (name, file) = (&self.name, &self.file);
            Error::new(
                ErrorKind::Input,
                format!("{name} has no {field}: {why} ({file}); give it with --set {field}=VALUE"),
            )
        })
    }

    /// [`Sheet::number`]'s value in SI.
    ///
    /// # Errors
    /// As [`Sheet::number`].
    pub fn value(&self, field: &str) -> Result<f64> {
        Ok(self.number(field)?.value)
    }

    /// The value, if the file gives one.
    pub fn find(&self, field: &str) -> Option<f64> {
        self.numbers.get(field).map(|n| n.value)
    }

    /// The word called `field`, if the file gives one.
    pub fn word(&self, field: &str) -> Option<&str> {
        self.words.get(field).map(String::as_str)
    }

    /// All numbers by name.
    pub fn numbers(&self) -> impl Iterator<Item = (&str, &Number)> {
        self.numbers.iter().map(|(k, n)| (k.as_str(), n))
    }

    /// What nobody published.
    pub fn unknown(&self) -> impl Iterator<Item = &str> {
        self.unknown.iter().map(String::as_str)
    }

    /// The measured curves.
    pub fn curves(&self) -> &[Curve] {
        &self.curves
    }

    /// Parts called `prefix.NAME.` of the file, by name.
    pub(super) fn parts(&self, prefix: &str) -> BTreeSet<String> {
        let names = self.numbers.keys().chain(self.words.keys());
        names
            .filter_map(|key| {
                key.strip_prefix(prefix)?
                    .strip_prefix('.')?
                    .split('.')
                    .next()
            })
            .map(String::from)
            .collect()
    }

    /// Changes one number or word, as `--set` does; a number is in SI.
    ///
    /// # Errors
    /// If the sheet has no such field, or the value is no number.
    pub fn set(&mut self, field: &str, value: &str) -> Result<()> {
        let wrong = |why: String| Err(Error::new(ErrorKind::Input, why));
        let part = |key: &str| key.split('.').take(2).map(String::from).collect::<Vec<_>>();
        let stars = |pattern: &str| pattern.contains('*');
        let found = self.fields.iter().find(|(p, _)| fits(p, field));
        let there = found.is_some_and(|(p, _)| {
            let mut keys = self.numbers.keys().chain(self.words.keys());
            !stars(p) || keys.any(|k| part(k) == part(field))
        });
        let Some((_, holds)) = found.filter(|_| there) else {
            let names: Vec<&str> = self.fields.iter().map(|f| f.0).collect();
            return wrong(format!(
                "{} has no field '{field}'; there are {}",
                self.name,
                names.join(", ")
            ));
        };
        match holds {
            Holds::Word(words) | Holds::Option(words) if !words.contains(&value) => {
                return wrong(format!(
                    "{field}={value}: '{value}' is none of {}",
                    words.join(", ")
                ));
            }
            Holds::Word(_) | Holds::Option(_) | Holds::Text | Holds::Note => {
                self.words.insert(field.into(), value.into());
                return Ok(());
            }
            Holds::Number(_) | Holds::Extra(_) => {}
        }
        let number: Option<f64> = value.parse().ok();
        let Some(value) = number.filter(|v| v.is_finite() && *v >= 0.0) else {
            return wrong(format!(
                "{field}={value}: '{value}' is no number of at least 0; write one in SI units"
            ));
        };
        if let Holds::Number(d) | Holds::Extra(d) = holds
            && value == 0.0
            && d.divides()
        {
            return wrong(format!(
                "{field}={value}: nothing would ever be done; a rate is more than 0"
            ));
        }
        if let Some(why) = outside(field, value) {
            return wrong(format!("{field}={value}: {why}"));
        }
        self.unknown.remove(field);
        self.absent.remove(field);
        let number = Number {
            value,
            source: "--set".to_string(),
            trust: Trust::Assumed,
        };
        self.numbers.insert(field.into(), number);
        Ok(())
    }

    /// Reads a sheet. `variant` names a `[variant.NAME]` whose numbers replace those of the file.
    ///
    /// # Errors
    /// [`ErrorKind::Input`] with file, line and field.
    pub(super) fn read(
        name: &str,
        file: &str,
        text: &str,
        fields: &'static [Field],
        variant: Option<&str>,
    ) -> Result<Sheet> {
        let mut reader = Reader {
            file,
            text,
            fields,
            sources: BTreeMap::new(),
        };
        let root = DeTable::parse(text)
            .map_err(|e| reader.wrong(e.span().unwrap_or(0..0), "syntax", e.message()))?;
        let sheet = Sheet {
            name: name.into(),
            file: file.into(),
            title: String::new(),
            numbers: BTreeMap::new(),
            words: BTreeMap::new(),
            curves: Vec::new(),
            unknown: BTreeSet::new(),
            absent: BTreeSet::new(),
            fields,
        };
        reader.sheet(sheet, root.get_ref(), variant)
    }
}

/// Whether `key` is one that `pattern` means.
fn fits(pattern: &str, key: &str) -> bool {
    let (mut a, mut b) = (pattern.split('.'), key.split('.'));
    loop {
        match (a.next(), b.next()) {
            (None, None) => return true,
            (Some(p), Some(k)) if p == "*" || p == k => {}
            _ => return false,
        }
    }
}

struct Reader<'a> {
    file: &'a str,
    text: &'a str,
    fields: &'static [Field],
    sources: BTreeMap<String, String>,
}

impl Reader<'_> {
    fn wrong(&self, at: Range<usize>, field: &str, why: impl std::fmt::Display) -> Error {
        let before = &self.text[..at.start.min(self.text.len())];
        let line = before.matches('\n').count() + 1;
        Error::new(
            ErrorKind::Input,
            format!("{}:{line}: {field}: {why}", self.file),
        )
    }

    fn holds(&self, key: &str) -> Option<Holds> {
        let found = self.fields.iter().find(|(p, _)| fits(p, key));
        found.map(|(_, h)| *h)
    }

    fn sheet(
        &mut self,
        mut sheet: Sheet,
        root: &DeTable<'_>,
        variant: Option<&str>,
    ) -> Result<Sheet> {
        if let Some(sources) = root.get("sources") {
            for (key, value) in self.table(sources, "sources")?.iter() {
                let text = self.text(value, "sources")?;
                self.sources.insert(key.get_ref().to_string(), text);
            }
        }
        for (key, value) in root.iter() {
            match key.get_ref().as_ref() {
                "sources" | "variant" => {}
                "title" => sheet.title = self.text(value, "title")?,
                "unknown" => sheet.unknown = self.names(value, "unknown")?,
                "absent" => sheet.absent = self.names(value, "absent")?,
                "curve" => sheet.curves = self.curves(value)?,
                name => self.entry(&mut sheet, name.to_string(), value)?,
            }
        }
        let both = sheet
            .unknown
            .iter()
            .chain(&sheet.absent)
            .find(|k| sheet.numbers.contains_key(*k));
        if let Some(key) = both {
            let why = "given, and named unknown or absent too; it can be one of them";
            return Err(self.wrong(self.place(key), key, why));
        }
        if let Some(wanted) = variant {
            self.variant(&mut sheet, root, wanted)?;
        }
        self.complete(&sheet)?;
        Ok(sheet)
    }

    /// Where the list of unknown fields names `key`, for a message.
    fn place(&self, key: &str) -> Range<usize> {
        let at = self.text.find(&format!("\"{key}\"")).unwrap_or(0);
        at..at
    }

    fn variant(&self, sheet: &mut Sheet, root: &DeTable<'_>, wanted: &str) -> Result<()> {
        let variants = match root.get("variant") {
            Some(v) => self.table(v, "variant")?,
            None => return Err(self.wrong(0..0, "variant", format!("there is no '{wanted}'"))),
        };
        let Some(chosen) = variants.get(wanted) else {
            let names: Vec<_> = variants.keys().map(|k| k.get_ref().to_string()).collect();
            let why = format!("there is no '{wanted}'; there are {}", names.join(", "));
            return Err(self.wrong(0..0, "variant", why));
        };
        for (key, value) in self.table(chosen, wanted)?.iter() {
            self.entry(sheet, key.get_ref().to_string(), value)?;
        }
        let given: Vec<String> = sheet.numbers.keys().cloned().collect();
        sheet.unknown.retain(|k| !given.contains(k));
        sheet.absent.retain(|k| !given.contains(k));
        Ok(())
    }

    fn complete(&self, sheet: &Sheet) -> Result<()> {
        for (pattern, holds) in self.fields {
            let keys: Vec<String> = match pattern.split_once(".*.") {
                None => vec![pattern.to_string()],
                Some((head, tail)) => {
                    let parts = sheet.parts(head);
                    parts.iter().map(|p| format!("{head}.{p}.{tail}")).collect()
                }
            };
            for key in keys {
                let there = match holds {
                    Holds::Extra(_) | Holds::Option(_) | Holds::Note => true,
                    Holds::Number(_) => {
                        sheet.numbers.contains_key(&key)
                            || sheet.unknown.contains(&key)
                            || sheet.absent.contains(&key)
                    }
                    Holds::Word(_) | Holds::Text => sheet.words.contains_key(&key),
                };
                if !there {
                    let why = "missing; give it, or name it in unknown = [..] or absent = [..]";
                    return Err(self.wrong(0..0, &key, why));
                }
            }
        }
        if sheet.title.is_empty() {
            return Err(self.wrong(0..0, "title", "missing"));
        }
        Ok(())
    }

    fn entry(&self, sheet: &mut Sheet, key: String, value: &Spanned<DeValue<'_>>) -> Result<()> {
        match (self.holds(&key), value.get_ref()) {
            (Some(Holds::Number(d) | Holds::Extra(d)), _) => {
                let number = self.number(&key, value, d)?;
                sheet.numbers.insert(key, number);
            }
            (Some(Holds::Text | Holds::Note), _) => {
                let text = self.text(value, &key)?;
                sheet.words.insert(key, text);
            }
            (Some(Holds::Word(words) | Holds::Option(words)), _) => {
                let text = self.text(value, &key)?;
                if !words.contains(&text.as_str()) {
                    let why = format!("'{text}' is none of {}", words.join(", "));
                    return Err(self.wrong(value.span(), &key, why));
                }
                sheet.words.insert(key, text);
            }
            (None, DeValue::Table(table)) => {
                for (name, inner) in table.iter() {
                    self.entry(sheet, format!("{key}.{}", name.get_ref()), inner)?;
                }
            }
            (None, _) => {
                let why = "no such field in this kind of file";
                return Err(self.wrong(value.span(), &key, why));
            }
        }
        Ok(())
    }

    fn number(&self, key: &str, value: &Spanned<DeValue<'_>>, d: Dimension) -> Result<Number> {
        let table = self.table(value, key)?;
        let part = |name: &str| {
            table
                .get(name)
                .ok_or_else(|| self.wrong(value.span(), key, format!("has no {name}")))
        };
        let extra = table
            .keys()
            .find(|k| !["value", "unit", "source", "trust"].contains(&k.get_ref().as_ref()));
        if let Some(name) = extra {
            let why = format!("'{}' is no part of a number", name.get_ref());
            return Err(self.wrong(name.span(), key, why));
        }
        let unit = self.text(part("unit")?, key)?;
        let scale = d.scale(&unit).ok_or_else(|| {
            let why = format!("unit '{unit}' does not fit; one of {} does", d.units());
            self.wrong(value.span(), key, why)
        })?;
        let plain = self.float(part("value")?, key)?;
        if plain < 0.0 {
            return Err(self.wrong(value.span(), key, format!("{plain} is negative")));
        }
        if plain == 0.0 && d.divides() {
            let why = "0: nothing would ever be done; what nobody knows stands in `unknown`";
            return Err(self.wrong(value.span(), key, why));
        }
        if let Some(why) = outside(key, plain * scale) {
            return Err(self.wrong(value.span(), key, format!("{plain}: {why}")));
        }
        let (source, trust) = self.believed(table, value.span(), key)?;
        Ok(Number {
            value: plain * scale,
            source,
            trust,
        })
    }

    fn believed(
        &self,
        table: &DeTable<'_>,
        at: Range<usize>,
        key: &str,
    ) -> Result<(String, Trust)> {
        let part = |name: &str| {
            let found = table.get(name);
            found.ok_or_else(|| self.wrong(at.clone(), key, format!("has no {name}")))
        };
        let short = self.text(part("source")?, key)?;
        let source = self.sources.get(&short).cloned().ok_or_else(|| {
            self.wrong(
                at.clone(),
                key,
                format!("source '{short}' is not in [sources]"),
            )
        })?;
        let word = self.text(part("trust")?, key)?;
        let trust = Trust::ALL
            .iter()
            .find(|(name, _)| *name == word)
            .ok_or_else(|| {
                let all: Vec<_> = Trust::ALL.iter().map(|(n, _)| *n).collect();
                let why = format!("trust '{word}' is none of {}", all.join(", "));
                self.wrong(at.clone(), key, why)
            })?;
        Ok((source, trust.1))
    }

    fn curves(&self, value: &Spanned<DeValue<'_>>) -> Result<Vec<Curve>> {
        let key = "curve";
        let list = value.get_ref().as_array();
        let list = list.ok_or_else(|| self.wrong(value.span(), key, "write it as [[curve]]"))?;
        list.iter().map(|entry| self.curve(entry, key)).collect()
    }

    fn curve(&self, entry: &Spanned<DeValue<'_>>, key: &str) -> Result<Curve> {
        let table = self.table(entry, key)?;
        let known = ["kernel", "group", "source", "trust", "points"];
        if let Some(name) = table
            .keys()
            .find(|k| !known.contains(&k.get_ref().as_ref()))
        {
            let why = format!("'{}' is no part of a curve", name.get_ref());
            return Err(self.wrong(name.span(), key, why));
        }
        let part = |name: &str| {
            let found = table.get(name);
            found.ok_or_else(|| self.wrong(entry.span(), key, format!("has no {name}")))
        };
        let kernel = self.text(part("kernel")?, key)?;
        let group = self.float(part("group")?, key)? as usize;
        let (source, trust) = self.believed(table, entry.span(), key)?;
        let written = part("points")?;
        let mut points = Vec::new();
        for pair in written
            .get_ref()
            .as_array()
            .into_iter()
            .flat_map(|a| a.iter())
        {
            match pair
                .get_ref()
                .as_array()
                .map(|p| p.iter().collect::<Vec<_>>())
            {
                Some(p) if p.len() == 2 => {
                    points.push((self.float(p[0], key)?, self.float(p[1], key)?))
                }
                _ => return Err(self.wrong(pair.span(), key, "a point is [bytes, seconds]")),
            }
        }
        let good = points.iter().all(|p| p.0 > 0.0 && p.1 > 0.0)
            && points.windows(2).all(|w| w[0].0 < w[1].0)
            && points.len() > 1;
        if !good {
            let why = "points must be positive, at least two, sizes ascending";
            return Err(self.wrong(written.span(), key, why));
        }
        Ok(Curve {
            kernel,
            group,
            points,
            source,
            trust,
        })
    }

    fn names(&self, value: &Spanned<DeValue<'_>>, key: &str) -> Result<BTreeSet<String>> {
        let list = value.get_ref().as_array();
        let list = list.ok_or_else(|| self.wrong(value.span(), key, "is no list of fields"))?;
        let mut names = BTreeSet::new();
        for entry in list.iter() {
            let name = self.text(entry, key)?;
            if !matches!(self.holds(&name), Some(Holds::Number(_) | Holds::Extra(_))) {
                let why = format!("'{name}' is no number of this kind of file");
                return Err(self.wrong(entry.span(), key, why));
            }
            names.insert(name);
        }
        Ok(names)
    }

    fn table<'t, 'i>(&self, value: &'t Spanned<DeValue<'i>>, key: &str) -> Result<&'t DeTable<'i>> {
        let table = value.get_ref().as_table();
        table.ok_or_else(|| {
            let why = "a number is written { value = .., unit = .., source = .., trust = .. }";
            self.wrong(value.span(), key, why)
        })
    }

    fn text(&self, value: &Spanned<DeValue<'_>>, key: &str) -> Result<String> {
        let text = value.get_ref().as_str();
        text.map(String::from)
            .ok_or_else(|| self.wrong(value.span(), key, "is no text"))
    }

    fn float(&self, value: &Spanned<DeValue<'_>>, key: &str) -> Result<f64> {
        let text = match value.get_ref() {
            DeValue::Integer(i) => i.as_str().replace('_', ""),
            DeValue::Float(f) => f.as_str().replace('_', ""),
            _ => return Err(self.wrong(value.span(), key, "is no number")),
        };
        let number: Option<f64> = text.parse().ok().filter(|v: &f64| v.is_finite());
        number.ok_or_else(|| self.wrong(value.span(), key, format!("'{text}' is no finite number")))
    }
}
