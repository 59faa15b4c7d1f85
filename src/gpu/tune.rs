//! Finding out which shapes products should be cut into on a device: each one that its kernels can take is timed on a large
//! product, and of those that cover as many sums the fastest is kept.

use super::chip::Chip;
use super::products::{After, Matrix, matmul_as};
use super::tiles::{Class, Plan, Shape, Strip, Table, Tile, Tiles};
use crate::error::Result;
use std::time::Instant;

/// Times of a shape, of which the best counts.
const RUNS: usize = 3;
/// A first run this many times slower than the best shape's is not repeated.
const HOPELESS: f64 = 3.0;

impl Chip {
    /// Times every shape of products on this device, tells `progress` of each (its name and GFLOP/s), and returns the text of
    /// a table for `SUPERNODE_TILES` in which the device's class has the best ones.
    ///
    /// # Errors
    /// As [`Chip::finish`].
    pub fn tune(&self, size: usize, mut progress: impl FnMut(&str, f64)) -> Result<String> {
        let class = Class::of(self.adapter());
        let mut table = Table::built_in();
        let known = table.class(class).clone();
        let candidates = Tiles {
            lanes: candidate_strips(),
            tiles: candidate_tiles(),
            ..known.clone()
        };
        let mut best: Vec<(Shape, f64)> = Vec::new();
        let mut fastest = f64::INFINITY;
        for shape in candidates.shapes(self.device()) {
            let seconds = self.time(shape, size, fastest)?;
            fastest = fastest.min(seconds);
            let rate = 2e-9 * (size * size * size) as f64 / seconds;
            progress(&shape.to_string(), rate);
            let area = |s: &Shape| s.covers()[0] * s.covers()[1];
            match best.iter_mut().find(|(s, _)| area(s) == area(&shape)) {
                Some(kept) if kept.1 < rate => *kept = (shape, rate),
                Some(_) => {}
                None => best.push((shape, rate)),
            }
        }
        let mut found = Tiles {
            lanes: Vec::new(),
            tiles: Vec::new(),
            ..known.clone()
        };
        for (shape, rate) in best {
            match shape {
                Shape::Strip(s, _) => found.lanes.push(Strip { rate, ..s }),
                Shape::Tile(t) => found.tiles.push(Tile { rate, ..t }),
            }
        }
        if found.tiles.is_empty() {
            found.tiles = known.tiles;
        }
        *table.class_mut(class) = found;
        Ok(format!(
            "# Shapes of products as they were timed on {}, f32, {size} x {size} x {size}.\n{table}",
            self.adapter()
        ))
    }

    fn time(&self, shape: Shape, size: usize, fastest: f64) -> Result<f64> {
        let operand = || self.working(size * size);
        let (a, b, c) = (operand()?, operand()?, operand()?);
        super::fill(0.5, None, a.clone());
        super::fill(0.25, None, b.clone());
        let square = |data: &super::Operand| Matrix {
            data: data.clone(),
            row: size,
            column: 1,
            batch: size * size,
        };
        let run = || {
            let plan = Plan { shape, parts: 1 };
            let (a, b) = (square(&a), square(&b));
            matmul_as(plan, 1, [size; 3], a, b, c.clone(), false, After::default());
        };
        run();
        self.finish()?;
        let mut best = f64::INFINITY;
        for _ in 0..RUNS {
            let began = Instant::now();
            run();
            self.finish()?;
            best = best.min(began.elapsed().as_secs_f64());
            if best > HOPELESS * fastest {
                break;
            }
        }
        Ok(best)
    }
}

fn candidate_strips() -> Vec<Strip> {
    let one = |(down, across)| Strip {
        down,
        across,
        rate: 1.0,
    };
    [(4, 2), (4, 1), (1, 2), (1, 1)].map(one).to_vec()
}

fn candidate_tiles() -> Vec<Tile> {
    let mut all = Vec::new();
    for group in [[16, 16], [8, 16], [8, 8], [4, 8]] {
        for each in [[2, 2], [1, 2], [2, 1], [1, 1]] {
            for depth in [8, 16, 32] {
                let tile = Tile {
                    group,
                    each,
                    depth,
                    rate: 1.0,
                };
                if tile.check().is_ok() {
                    all.push(tile);
                }
            }
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg_attr(
        no_adapter,
        ignore = "no Vulkan driver is installed; mesa-vulkan-drivers brings a software one"
    )]
    fn a_tuned_table_is_read_again() {
        let Ok(chip) = Chip::open(0) else { return };
        let mut told = 0;
        let text = chip.tune(32, |_, rate| {
            assert!(rate > 0.0);
            told += 1;
        });
        let text = text.unwrap();
        let table = Table::read(&text).unwrap_or_else(|e| panic!("{e}\n{text}"));
        let found = table.class(Class::of(chip.adapter()));
        assert!(told >= found.lanes.len() + found.tiles.len());
        assert!(!found.tiles.is_empty(), "{text}");
    }
}
