//! How a chip's products were cut up, where its device chooses: on a graphics processor, by a table of tiles.
//!
//! A choice follows from the table and a product's sizes alone, so that two runs with one table give the same trace; from the
//! trace it can be seen which table that was. On a processor there is nothing to choose that would change a bit, and nothing is
//! written.

use super::{ChipTrace, Event};
use serde::{Deserialize, Serialize};
use std::fmt::{self, Write};

/// What a chip's products are cut up by.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Tiles {
    /// The adapter.
    pub adapter: String,
    /// Its kind in the table: `software`, `discrete` or `integrated`.
    pub class: String,
    /// Where the table is written: `built in`, or the file that `SUPERNODE_TILES` named.
    pub table: String,
    /// Groups that keep the adapter busy.
    pub fill: usize,
    /// Least k of a part, in elements, where k is split because a product has too few groups.
    pub part: usize,
    /// The shapes that the adapter can run. Where there are strips, attention goes by blocks too.
    pub shapes: Vec<Shape>,
}

/// A shape of the table.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Shape {
    /// What a group does, such as `tile 128x128, group 16x16, depth 32`.
    pub tile: String,
    /// GFLOP/s on large products, or their proportion.
    pub rate: f64,
}

/// Products of one size, and how they were cut up.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Product {
    /// Products in one call.
    pub batch: usize,
    /// m, n and k: [m, k] by [k, n].
    pub sizes: [usize; 3],
    /// The tile that was chosen: one of [`Tiles::shapes`], or cooperative matrices.
    pub tile: String,
    /// Parts of k whose sums were added afterwards; 1 where k was not split.
    pub parts: usize,
    /// How often.
    pub calls: u64,
}

impl fmt::Display for Tiles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Tiles {
            adapter,
            class,
            table,
            ..
        } = self;
        write!(f, "{adapter}: products by table '{table}', {class}")
    }
}

impl Product {
    fn sizes(&self) -> String {
        let [m, n, k] = self.sizes;
        format!("{} of [{m}, {k}] [{k}, {n}]", self.batch)
    }

    fn cut(&self) -> String {
        match self.parts {
            1 => self.tile.clone(),
            parts => format!("{}, k in {parts} parts", self.tile),
        }
    }
}

impl fmt::Display for Product {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.sizes(), self.cut())
    }
}

impl ChipTrace {
    /// The products of an event, in order; none where the device does not choose how they are cut up.
    pub fn products_of<'a>(&'a self, event: &'a Event) -> impl Iterator<Item = &'a Product> {
        let ids = event.products.iter();
        ids.map(|&id| &self.products[id as usize])
    }

    /// How the products of two events were cut up, if both chips say so and it differs.
    pub(super) fn difference_of_tiles(
        &self,
        event: &Event,
        other: &ChipTrace,
        of_other: &Event,
    ) -> Option<String> {
        let (ours, theirs) = (self.tiles.as_ref()?, other.tiles.as_ref()?);
        let told = |t: &ChipTrace, e: &Event| -> Vec<String> {
            t.products_of(e).map(Product::to_string).collect()
        };
        let (a, b) = (told(self, event), told(other, of_other));
        (a != b).then(|| {
            format!(
                "the products of {} at {} were cut up as {a:?} ({ours}) and as {b:?} ({theirs})",
                event.op,
                self.site(event)
            )
        })
    }

    /// The table's rows on products, if there are any.
    pub(super) fn list_products(&self, out: &mut String) {
        let Some(tiles) = &self.tiles else { return };
        let _ = writeln!(out, "{tiles}");
        let mut products: Vec<&Product> = self.products.iter().collect();
        let work =
            |p: &Product| p.sizes.iter().product::<usize>() as u64 * p.batch as u64 * p.calls;
        products.sort_by_key(|p| std::cmp::Reverse(work(p)));
        if !products.is_empty() {
            let _ = writeln!(out, "{:<36}{:>8}  cut up as", "products (chip 0)", "calls");
        }
        for p in products {
            let _ = writeln!(out, "{:<36}{:>8}  {}", p.sizes(), p.calls, p.cut());
        }
    }
}
