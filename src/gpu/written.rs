//! A table of tiles as a file has it: read, checked, and what is wrong told with its line and field.

use super::tiles::{Strip, Table, Tile, Tiles};
use serde::Deserialize;
use std::ops::Range;
use toml::Spanned;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Classes {
    software: Class,
    discrete: Class,
    integrated: Class,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Class {
    fill: Spanned<usize>,
    part: Spanned<usize>,
    lanes: Vec<Spanned<Strip>>,
    tiles: Spanned<Vec<Spanned<Tile>>>,
}

impl Table {
    /// A table from a file's text.
    ///
    /// # Errors
    /// One sentence with line, field, and what is wrong there.
    pub(crate) fn read(text: &str) -> Result<Self, String> {
        let classes: Classes = toml::from_str(text).map_err(|e| {
            let why = e.message().replace('\n', ", ");
            match e.span() {
                Some(at) => told(text, &at, field(text, at.start), &why),
                None => why,
            }
        })?;
        Ok(Table {
            software: classes.software.checked(text)?,
            discrete: classes.discrete.checked(text)?,
            integrated: classes.integrated.checked(text)?,
        })
    }
}

impl Class {
    fn checked(self, text: &str) -> Result<Tiles, String> {
        let wrong = |at: Range<usize>, field: &str, why: &str| told(text, &at, Some(field), why);
        let (fill, part) = (*self.fill.get_ref(), *self.part.get_ref());
        if fill == 0 {
            return Err(wrong(
                self.fill.span(),
                "fill",
                "0 groups, at least 1 is needed",
            ));
        }
        if part == 0 || !part.is_multiple_of(4) {
            let why = format!("{part} is no multiple of 4, or 0");
            return Err(wrong(self.part.span(), "part", &why));
        }
        for strip in &self.lanes {
            let why = strip.get_ref().check();
            why.map_err(|why| wrong(strip.span(), "lanes", &why))?;
        }
        if self.tiles.get_ref().is_empty() {
            return Err(wrong(
                self.tiles.span(),
                "tiles",
                "at least one tile is needed",
            ));
        }
        for tile in self.tiles.get_ref() {
            let why = tile.get_ref().check();
            why.map_err(|why| wrong(tile.span(), "tiles", &why))?;
        }
        Ok(Tiles {
            fill,
            part,
            lanes: self.lanes.into_iter().map(Spanned::into_inner).collect(),
            tiles: self
                .tiles
                .into_inner()
                .into_iter()
                .map(Spanned::into_inner)
                .collect(),
        })
    }
}

fn told(text: &str, at: &Range<usize>, field: Option<&str>, why: &str) -> String {
    let line = 1 + text[..at.start.min(text.len())].matches('\n').count();
    match field {
        Some(field) => format!("line {line}, field '{field}': {why}"),
        None => format!("line {line}: {why}"),
    }
}

/// The name at this place of a text, or the last one before it that has a value on the same line.
fn field(text: &str, at: usize) -> Option<&str> {
    let of_name = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    let (before, behind) = text.split_at_checked(at)?;
    let end = behind.find(|c| !of_name(c)).unwrap_or(behind.len());
    if end > 0 && behind[end..].trim_start().starts_with('=') {
        return Some(&behind[..end]);
    }
    let line = &before[before.rfind('\n').map_or(0, |n| n + 1)..];
    let name = line[..line.rfind('=')?].trim_end();
    let begin = name.rfind(|c| !of_name(c)).map_or(0, |n| n + 1);
    (begin < name.len()).then(|| &name[begin..])
}

#[cfg(test)]
mod tests {
    use super::*;

    const BUILT_IN: &str = include_str!("tiles.toml");

    #[test]
    fn a_table_that_no_kernel_can_follow_is_refused_with_line_and_field() {
        let wrong = |from: &str, to: &str, field: &str, says: &str| {
            let at = BUILT_IN.find(from).unwrap_or_else(|| panic!("no {from}"));
            let line = 1 + BUILT_IN[..at].matches('\n').count();
            let why = Table::read(&BUILT_IN.replacen(from, to, 1)).expect_err(to);
            let begins = format!("line {line}, field '{field}': ");
            assert!(why.starts_with(&begins), "{begins} is not in: {why}");
            assert!(why.contains(says) && !why.contains('\n'), "{why}");
        };
        wrong("fill = 4", "fill = 0", "fill", "at least 1");
        wrong("fill = 4", "fill = -4", "fill", "-4");
        wrong("fill = 4", "fil = 4", "fil", "unknown field");
        wrong(
            "part = 512",
            "part = 511",
            "part",
            "511 is no multiple of 4",
        );
        wrong("part = 512", "part = \"many\"", "part", "string \"many\"");
        wrong("{ down = 4", "{ down = 3", "lanes", "down is 1 or 4");
        wrong(
            "{ group = [8, 8]",
            "{ group = [6, 8]",
            "tiles",
            "power of two",
        );
        wrong(
            "{ group = [8, 8]",
            "{ group = [8]",
            "group",
            "invalid length 1",
        );
        wrong(
            "{ group = [2, 4]",
            "{ grup = [2, 4]",
            "grup",
            "unknown field",
        );
        let at = BUILT_IN.find("tiles = [").expect("tiles");
        let end = at + BUILT_IN[at..].find("\n]").expect("their end") + 2;
        wrong(&BUILT_IN[at..end], "tiles = []", "tiles", "at least one");
    }

    #[test]
    fn what_is_missing_or_no_table_is_told() {
        let why = Table::read("[software]\n").expect_err("empty");
        assert!(why.starts_with("line 1") && why.contains("fill"), "{why}");
        let why = Table::read("\n\nfill: 4\n").expect_err("no TOML");
        assert!(why.starts_with("line 3"), "{why}");
    }
}
