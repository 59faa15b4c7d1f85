//! Numbers with what makes them believable: unit, source and trust.

use std::fmt;

/// What a number measures. Everything is stored in SI: floating-point operations, bytes, seconds, watts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dimension {
    /// Operations a second.
    Rate,
    /// Bytes.
    Bytes,
    /// Bytes a second, one direction.
    Bandwidth,
    /// Seconds.
    Time,
    /// Watts.
    Power,
    /// A pure number, a share or a count.
    Pure,
}

const UNITS: [(&str, Dimension, f64); 26] = [
    ("GFLOP/s", Dimension::Rate, 1e9),
    ("TFLOP/s", Dimension::Rate, 1e12),
    ("PFLOP/s", Dimension::Rate, 1e15),
    ("TOP/s", Dimension::Rate, 1e12),
    ("B", Dimension::Bytes, 1.0),
    ("KiB", Dimension::Bytes, 1024.0),
    ("MiB", Dimension::Bytes, 1_048_576.0),
    ("GiB", Dimension::Bytes, 1_073_741_824.0),
    ("MB", Dimension::Bytes, 1e6),
    ("GB", Dimension::Bytes, 1e9),
    ("TB", Dimension::Bytes, 1e12),
    ("B/s", Dimension::Bandwidth, 1.0),
    ("MB/s", Dimension::Bandwidth, 1e6),
    ("GB/s", Dimension::Bandwidth, 1e9),
    ("TB/s", Dimension::Bandwidth, 1e12),
    ("Gb/s", Dimension::Bandwidth, 0.125e9),
    ("ns", Dimension::Time, 1e-9),
    ("us", Dimension::Time, 1e-6),
    ("ms", Dimension::Time, 1e-3),
    ("s", Dimension::Time, 1.0),
    ("h", Dimension::Time, 3600.0),
    ("W", Dimension::Power, 1.0),
    ("kW", Dimension::Power, 1e3),
    ("MW", Dimension::Power, 1e6),
    ("1", Dimension::Pure, 1.0),
    ("chips", Dimension::Pure, 1.0),
];

impl Dimension {
    /// What one of the unit called `unit` is in SI, if it measures this.
    pub fn scale(self, unit: &str) -> Option<f64> {
        let found = UNITS
            .iter()
            .find(|(name, d, _)| *name == unit && *d == self);
        found.map(|(_, _, scale)| *scale)
    }

    /// Whether times are work over such a number, which then cannot be 0.
    pub(super) fn divides(self) -> bool {
        matches!(self, Dimension::Rate | Dimension::Bandwidth)
    }

    /// The units that may stand beside such a number.
    pub fn units(self) -> String {
        let names = UNITS.iter().filter(|(_, d, _)| *d == self);
        names.map(|(n, ..)| *n).collect::<Vec<_>>().join(", ")
    }
}

/// What is wrong with the value of a field in SI, if it lies where no machine's does: shares above 1 are faster than the hardware,
/// and half a core is none.
pub(super) fn outside(field: &str, value: f64) -> Option<&'static str> {
    let last = field.rsplit('.').next().unwrap_or(field);
    let (kernel, level) = (field.starts_with("kernel."), field.starts_with("level."));
    let share = field == "exchange.share"
        || level && last == "efficiency"
        || kernel && ["efficiency", "memory", "narrow", "backward", "sustained"].contains(&last);
    let count = ["chip.cores", "system.chips"].contains(&field) || level && last == "chips";
    let (fine, why) = match field {
        "stack.interference" => (
            value < 1.0,
            "it is a share of a chip, at least 0 and below 1",
        ),
        "stack.stragglers" => (value <= 1.0, "it is a share of the nodes, from 0 to 1"),
        "stack.imbalance" => (
            value >= 1.0,
            "the busiest expert has at least the mean one's tokens: 1 or more",
        ),
        _ if last == "oversubscription" => (value >= 1.0, "ports above for one below: 1 or more"),
        _ if share => (
            value > 0.0 && value <= 1.0,
            "it is a share of the hardware's rate, above 0 and up to 1",
        ),
        _ if count => (
            value >= 1.0 && value.fract() == 0.0,
            "it is a number of things: whole, at least 1",
        ),
        _ => (true, ""),
    };
    (!fine).then_some(why)
}

/// How far a number is to be believed, from best to worst.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Trust {
    /// The maker's data sheet.
    Official,
    /// A paper, read in text.
    Paper,
    /// An official repository.
    Code,
    /// Fitted to a measured curve.
    Fitted,
    /// Computed from such numbers.
    Derived,
    /// A newspaper.
    Press,
    /// An analyst.
    Estimate,
    /// Well known, but nobody looked it up again.
    Recalled,
    /// Nobody measured it: another machine's number stands in.
    Assumed,
}

impl Trust {
    pub(super) const ALL: [(&'static str, Trust); 9] = [
        ("official", Trust::Official),
        ("paper", Trust::Paper),
        ("code", Trust::Code),
        ("fitted", Trust::Fitted),
        ("derived", Trust::Derived),
        ("press", Trust::Press),
        ("estimate", Trust::Estimate),
        ("recalled", Trust::Recalled),
        ("assumed", Trust::Assumed),
    ];
}

impl fmt::Display for Trust {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let named = Trust::ALL.iter().find(|(_, t)| t == self);
        f.pad(named.map_or("", |(name, _)| name))
    }
}

/// A number of a machine.
#[derive(Clone, Debug, PartialEq)]
pub struct Number {
    /// In SI.
    pub value: f64,
    /// Where it comes from, in words.
    pub source: String,
    /// How far to believe it.
    pub trust: Trust,
}

/// Measured points (size, value), sizes ascending; values between them follow a straight line on logarithmic axes.
#[derive(Clone, Debug, PartialEq)]
pub struct Curve {
    /// The kernel or collective that was measured.
    pub kernel: String,
    /// Chips of the group, for a collective.
    pub group: usize,
    /// Bytes and seconds.
    pub points: Vec<(f64, f64)>,
    /// Where it comes from.
    pub source: String,
    /// How far to believe it.
    pub trust: Trust,
}

impl Curve {
    /// The value at `x`: on logarithmic axes a straight line between the two points beside it. Below the first point the
    /// first value (a latency); beyond the last one the last value grows in proportion (a bandwidth). Never more than what was
    /// measured of something larger: measurements scatter, prices must not.
    pub fn at(&self, x: f64) -> f64 {
        let larger = self.points.iter().filter(|p| p.0 >= x);
        larger.map(|p| p.1).fold(self.between(x), f64::min)
    }

    fn between(&self, x: f64) -> f64 {
        let (first, last) = (self.points[0], self.points[self.points.len() - 1]);
        if x <= first.0 {
            return first.1;
        }
        if x >= last.0 {
            return last.1 * x / last.0;
        }
        let above = self.points.partition_point(|p| p.0 < x);
        let ((x0, y0), (x1, y1)) = (self.points[above - 1], self.points[above]);
        let share = (x / x0).ln() / (x1 / x0).ln();
        y0 * (y1 / y0).powf(share)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_si() {
        assert_eq!(Dimension::Bandwidth.scale("Gb/s"), Some(0.125e9));
        assert_eq!(Dimension::Bytes.scale("GB/s"), None);
        assert_eq!(Dimension::Time.units(), "ns, us, ms, s, h");
    }

    #[test]
    fn a_curve_goes_through_its_points() {
        let points = vec![(1e6, 2e-5), (4e6, 4e-5), (1e9, 1e-2)];
        let (source, trust) = (String::new(), Trust::Fitted);
        let curve = Curve {
            kernel: "all-reduce".into(),
            group: 2,
            points,
            source,
            trust,
        };
        assert_eq!(curve.at(10.0), 2e-5);
        assert!((curve.at(2e6) / (2e-5 * 2f64.sqrt()) - 1.0).abs() <= 1e-12);
        assert_eq!(curve.at(4e6), 4e-5);
        assert_eq!(curve.at(4e9), 4e-2);
    }
}
