//! Which shapes products are cut into, by kind of adapter: data, in `tiles.toml` or a file of the user's.
//!
//! A choice follows from the table and the product's sizes alone, never from a clock: two runs with one table add in the same
//! order and give the same traces.

use super::adapter::Adapter;
use super::device::Device;
use crate::error::{Error, ErrorKind, Result};
use serde::Deserialize;
use std::fmt;
use std::path::Path;
use std::sync::Arc;

/// Kinds of adapters that want shapes of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Class {
    /// A processor that acts as an adapter.
    Software,
    /// A card with memory of its own.
    Discrete,
    /// Part of a processor's chip, or unknown.
    Integrated,
}

impl Class {
    pub(crate) fn of(adapter: &Adapter) -> Self {
        match adapter.kind {
            "software" => Class::Software,
            "discrete" => Class::Discrete,
            _ => Class::Integrated,
        }
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Class::Software => "software",
            Class::Discrete => "discrete",
            Class::Integrated => "integrated",
        }
    }
}

/// A tile through workgroup memory.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Tile {
    /// Invocations of a group, down and across.
    pub(crate) group: [u32; 2],
    /// Fours of sums of an invocation, down and across.
    pub(crate) each: [u32; 2],
    /// k that goes through workgroup memory at a time.
    pub(crate) depth: u32,
    pub(crate) rate: f64,
}

impl Tile {
    /// A sentence if no kernel can take it.
    pub(crate) fn check(&self) -> std::result::Result<(), String> {
        let wide = |i: usize| self.group[i] * self.each[i];
        let invocations = self.group[0] * self.group[1];
        let spread = |i: usize| (wide(i) * self.depth / 4).is_multiple_of(invocations.max(1));
        let side =
            |i: usize| (1..=4).contains(&self.each[i]) && wide(i).is_power_of_two() && spread(i);
        let deep = self.depth > 0 && self.depth.is_multiple_of(4);
        if side(0) && side(1) && deep && self.rate > 0.0 && self.rate.is_finite() {
            return Ok(());
        }
        let Tile {
            group,
            each,
            depth,
            rate,
        } = self;
        Err(format!(
            "group {group:?}, each {each:?}, depth {depth}, rate {rate}: fours along a side are a power of two, `depth` a \
             multiple of 4, and the group's invocations divide depth / 4 times the fours of each side; the rate is above 0"
        ))
    }
}

/// A tile of one subgroup.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Strip {
    /// Rows of sums by LANES.
    pub(crate) down: u32,
    /// Columns by 4 LANES.
    pub(crate) across: u32,
    pub(crate) rate: f64,
}

impl Strip {
    /// A sentence if no kernel can take it.
    pub(crate) fn check(&self) -> std::result::Result<(), String> {
        let known = matches!((self.down, self.across), (1 | 4, 1 | 2));
        if known && self.rate > 0.0 && self.rate.is_finite() {
            return Ok(());
        }
        let Strip { down, across, rate } = self;
        Err(format!(
            "down {down}, across {across}, rate {rate}: down is 1 or 4, across 1 or 2, the rate above 0"
        ))
    }
}

/// How products are cut up on one kind of adapter.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Tiles {
    /// Groups that keep the adapter busy.
    pub(crate) fill: usize,
    /// Least k of a part.
    pub(crate) part: usize,
    pub(crate) lanes: Vec<Strip>,
    pub(crate) tiles: Vec<Tile>,
}

/// The whole table.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Table {
    pub(crate) software: Tiles,
    pub(crate) discrete: Tiles,
    pub(crate) integrated: Tiles,
}

const BUILT_IN: &str = include_str!("tiles.toml");
/// The variable that names another table.
const FILE: &str = "SUPERNODE_TILES";

/// One way to cut up a product.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Shape {
    Tile(Tile),
    /// And the subgroup's size.
    Strip(Strip, u32),
}

impl Shape {
    /// Rows and columns of sums of a group.
    pub(crate) fn covers(&self) -> [usize; 2] {
        let [down, across] = match self {
            Shape::Tile(t) => [4 * t.each[0] * t.group[0], 4 * t.each[1] * t.group[1]],
            Shape::Strip(s, lanes) => [s.down * lanes, 4 * s.across * lanes],
        };
        [down as usize, across as usize]
    }

    pub(crate) fn rate(&self) -> f64 {
        match self {
            Shape::Tile(t) => t.rate,
            Shape::Strip(s, _) => s.rate,
        }
    }

    fn groups(&self, batch: usize, m: usize, n: usize) -> usize {
        let [down, across] = self.covers();
        batch * m.div_ceil(down) * n.div_ceil(across)
    }
}

/// How a product is done: its shape, and in how many parts its k.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Plan {
    pub(crate) shape: Shape,
    pub(crate) parts: usize,
}

impl Table {
    pub(crate) fn built_in() -> Self {
        Self::read(BUILT_IN).unwrap_or_else(|e| panic!("src/gpu/tiles.toml: {e}"))
    }

    pub(crate) fn class(&self, class: Class) -> &Tiles {
        match class {
            Class::Software => &self.software,
            Class::Discrete => &self.discrete,
            Class::Integrated => &self.integrated,
        }
    }

    pub(crate) fn class_mut(&mut self, class: Class) -> &mut Tiles {
        match class {
            Class::Software => &mut self.software,
            Class::Discrete => &mut self.discrete,
            Class::Integrated => &mut self.integrated,
        }
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, t) in [
            ("software", &self.software),
            ("discrete", &self.discrete),
            ("integrated", &self.integrated),
        ] {
            writeln!(
                f,
                "\n[{name}]\nfill = {}\npart = {}\nlanes = [",
                t.fill, t.part
            )?;
            for s in &t.lanes {
                let Strip { down, across, rate } = s;
                writeln!(
                    f,
                    "    {{ down = {down}, across = {across}, rate = {rate:?} }},"
                )?;
            }
            writeln!(f, "]\ntiles = [")?;
            for t in &t.tiles {
                writeln!(
                    f,
                    "    {{ group = {:?}, each = {:?}, depth = {}, rate = {:?} }},",
                    t.group, t.each, t.depth, t.rate
                )?;
            }
            writeln!(f, "]")?;
        }
        Ok(())
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [down, across] = self.covers();
        match self {
            Shape::Tile(t) => write!(
                f,
                "tile {down}x{across}, group {}x{}, depth {}",
                t.group[0], t.group[1], t.depth
            ),
            Shape::Strip(_, lanes) => write!(f, "strip {down}x{across} of {lanes} lanes"),
        }
    }
}

/// A table's part for one device, and where the table is written.
pub(super) struct Chosen {
    pub(super) tiles: Arc<Tiles>,
    pub(super) table: String,
}

impl Chosen {
    /// For a device: of the user's file, if a file is named.
    pub(super) fn of(device: &Device) -> Result<Self> {
        let class = Class::of(&device.about);
        match std::env::var_os(FILE) {
            None => Ok(Self::built_in(class)),
            Some(path) => Self::in_file(Path::new(&path), class),
        }
    }

    pub(super) fn built_in(class: Class) -> Self {
        Chosen {
            tiles: Arc::new(Table::built_in().class(class).clone()),
            table: "built in".into(),
        }
    }

    fn in_file(path: &Path, class: Class) -> Result<Self> {
        let wrong = |why: String| {
            let what = format!(
                "{FILE} names {}, which is no table of tiles: {why}; `supernode bench --backend gpu --tune` writes one",
                path.display()
            );
            Error::new(ErrorKind::Input, what)
        };
        let text = crate::files::read_text(path, crate::files::DESCRIPTION)
            .map_err(|e| wrong(e.to_string()))?;
        let table = Table::read(&text).map_err(wrong)?;
        Ok(Chosen {
            tiles: Arc::new(table.class(class).clone()),
            table: path.display().to_string(),
        })
    }
}

impl Tiles {
    #[cfg(test)]
    pub(crate) fn known(class: Class) -> Arc<Self> {
        Chosen::built_in(class).tiles
    }

    /// The shapes that a device can run: strips need subgroups of a known size, tiles room in workgroup memory.
    pub(crate) fn shapes(&self, device: &Device) -> Vec<Shape> {
        let lanes = device.lanes();
        let strips = self.lanes.iter().zip(std::iter::repeat(lanes));
        let strips = strips.filter_map(|(s, lanes)| lanes.map(|l| Shape::Strip(*s, l)));
        let fits = |t: &&Tile| {
            let fours: u32 = (0..2).map(|i| t.group[i] * t.each[i] * t.depth).sum();
            16 * fours <= device.limits.max_compute_workgroup_storage_size
                && t.group[0] * t.group[1] <= device.limits.max_compute_invocations_per_workgroup
        };
        let tiles = self.tiles.iter().filter(fits).map(|t| Shape::Tile(*t));
        strips.chain(tiles).collect()
    }

    /// The shape that takes the least time by the table's rates, groups running `fill` at a time; k is split where even so less
    /// than half of the adapter would be busy.
    pub(crate) fn plan(&self, shapes: &[Shape], batch: usize, [m, n, k]: [usize; 3]) -> Plan {
        let time = |s: &Shape| {
            let [down, across] = s.covers();
            let turns = s.groups(batch, m, n).div_ceil(self.fill);
            (turns * down * across) as f64 / s.rate()
        };
        let shape = *shapes
            .iter()
            .min_by(|a, b| time(a).total_cmp(&time(b)))
            .expect("every device runs the smallest tile");
        let groups = shape.groups(batch, m, n);
        let parts = if 2 * groups <= self.fill {
            (self.fill / groups.max(1)).min(k / self.part).max(1)
        } else {
            1
        };
        Plan { shape, parts }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shapes(tiles: &Tiles) -> Vec<Shape> {
        tiles.tiles.iter().map(|t| Shape::Tile(*t)).collect()
    }

    #[test]
    fn large_products_take_large_tiles_and_small_ones_fill_the_adapter() {
        let tiles = Tiles::known(Class::Discrete);
        let all = shapes(&tiles);
        let large = tiles.plan(&all, 1, [8192, 8192, 8192]);
        assert_eq!((large.shape.covers(), large.parts), ([128, 128], 1));
        let small = tiles.plan(&all, 1, [256, 256, 256]);
        assert_eq!((small.shape.covers(), small.parts), ([32, 32], 1));
        let deep = tiles.plan(&all, 1, [64, 64, 65536]);
        assert_eq!((deep.shape.covers(), deep.parts), ([32, 32], 66));
        assert_eq!(tiles.plan(&all, 0, [0, 0, 0]).parts, 1);
    }
}
