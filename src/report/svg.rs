//! Drawings: a timeline, bars, and curves on logarithmic axes.

use super::escape;
use std::fmt::Write;

/// Colours that stay apart for most eyes (Okabe and Ito 2008).
const COLOURS: [&str; 8] = [
    "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#999999",
];

const WIDTH: f64 = 900.0;

/// A row of a timeline.
#[derive(Clone, Debug)]
pub struct Lane {
    /// Its name.
    pub name: String,
    /// Start, end, kind (a position in the legend), and what it says when pointed at.
    pub spans: Vec<(f64, f64, usize, String)>,
}

/// A bar.
#[derive(Clone, Debug)]
pub struct Bar {
    /// Its name.
    pub name: String,
    /// Its length.
    pub value: f64,
    /// The value as text.
    pub label: String,
}

/// A line through points.
#[derive(Clone, Debug)]
pub struct Curve {
    /// Its name.
    pub name: String,
    /// Positive coordinates.
    pub points: Vec<(f64, f64)>,
}

fn open(height: f64) -> String {
    format!("<svg viewBox=\"0 0 {WIDTH} {height}\" role=\"img\">\n")
}

fn legend(names: &[&str], y: f64) -> String {
    let mut out = String::new();
    for (i, name) in names.iter().enumerate() {
        let x = 80.0 + 150.0 * i as f64;
        let colour = COLOURS[i % COLOURS.len()];
        let _ = writeln!(
            out,
            "<rect x=\"{x}\" y=\"{}\" width=\"10\" height=\"10\" fill=\"{colour}\"/><text x=\"{}\" y=\"{y}\">{}</text>",
            y - 9.0,
            x + 14.0,
            escape(name)
        );
    }
    out
}

/// Lanes above each other, time to the right; `kinds` name the colours.
pub fn timeline(lanes: &[Lane], kinds: &[&str]) -> String {
    let (left, row) = (80.0, 18.0);
    let last = lanes
        .iter()
        .flat_map(|l| l.spans.iter().map(|s| s.1))
        .fold(0.0, f64::max);
    let scale = (WIDTH - left) / last.max(f64::MIN_POSITIVE);
    let height = row * lanes.len() as f64 + 40.0;
    let mut out = open(height);
    for (i, lane) in lanes.iter().enumerate() {
        let y = row * i as f64;
        let _ = writeln!(
            out,
            "<text x=\"0\" y=\"{}\">{}</text>",
            y + 12.0,
            escape(&lane.name)
        );
        for (start, end, kind, says) in &lane.spans {
            let _ = writeln!(
                out,
                "<rect x=\"{:.2}\" y=\"{y}\" width=\"{:.2}\" height=\"{}\" fill=\"{}\"><title>{}</title></rect>",
                left + start * scale,
                ((end - start) * scale).max(0.2),
                row - 3.0,
                COLOURS[kind % COLOURS.len()],
                escape(says)
            );
        }
    }
    let _ = writeln!(
        out,
        "<text x=\"{WIDTH}\" y=\"{}\" text-anchor=\"end\">{last:.3} s</text>",
        height - 22.0
    );
    out + &legend(kinds, height - 6.0) + "</svg>"
}

/// Horizontal bars, the largest as wide as the drawing.
pub fn bars(all: &[Bar]) -> String {
    let (left, row) = (150.0, 22.0);
    let most = all.iter().map(|b| b.value).fold(0.0, f64::max);
    let scale = (WIDTH - left - 190.0) / most.max(f64::MIN_POSITIVE);
    let mut out = open(row * all.len().max(1) as f64);
    for (i, bar) in all.iter().enumerate() {
        let (y, width) = (row * i as f64, bar.value.max(0.0) * scale);
        let _ = writeln!(
            out,
            "<text x=\"0\" y=\"{0}\">{1}</text><rect x=\"{left}\" y=\"{y}\" width=\"{width:.2}\" height=\"{2}\" fill=\"{3}\"/>\
             <text x=\"{4:.2}\" y=\"{0}\">{5}</text>",
            y + 14.0,
            escape(&bar.name),
            row - 4.0,
            COLOURS[0],
            left + width + 6.0,
            escape(&bar.label)
        );
    }
    out + "</svg>"
}

/// Curves over two logarithmic axes.
pub fn curves(all: &[Curve], across: &str, up: &str) -> String {
    let (left, top, width, height) = (90.0, 10.0, WIDTH - 100.0, 260.0);
    let points = || all.iter().flat_map(|c| c.points.iter());
    let range = |of: &dyn Fn(&(f64, f64)) -> f64| {
        let low = points().map(of).fold(f64::INFINITY, f64::min);
        let high = points().map(of).fold(0.0, f64::max);
        match low < high {
            true => (low, high),
            false => (low.min(1e300) / 2.0, high.max(1e-300) * 2.0),
        }
    };
    let (x_range, y_range) = (range(&|p| p.0), range(&|p| p.1));
    let at = |v: f64, (low, high): (f64, f64)| (v / low).ln() / (high / low).ln();
    let mut out = open(height + 70.0);
    for (i, curve) in all.iter().enumerate() {
        let colour = COLOURS[i % COLOURS.len()];
        let mut path = String::new();
        for (x, y) in &curve.points {
            let (x_at, y_at) = (
                left + width * at(*x, x_range),
                top + height * (1.0 - at(*y, y_range)),
            );
            let _ = write!(path, "{x_at:.1},{y_at:.1} ");
            let _ = writeln!(
                out,
                "<circle cx=\"{x_at:.1}\" cy=\"{y_at:.1}\" r=\"3\" fill=\"{colour}\"><title>{x}: {y:.4}</title></circle>"
            );
        }
        let _ = writeln!(
            out,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"1.5\"/>",
            path.trim_end()
        );
    }
    for (value, y) in [(y_range.1, top + 8.0), (y_range.0, top + height)] {
        let _ = writeln!(out, "<text x=\"0\" y=\"{y}\">{}</text>", short(value));
    }
    for (value, x, anchor) in [(x_range.0, left, "start"), (x_range.1, left + width, "end")] {
        let _ = writeln!(
            out,
            "<text x=\"{x}\" y=\"{}\" text-anchor=\"{anchor}\">{}</text>",
            top + height + 18.0,
            short(value)
        );
    }
    let _ = writeln!(
        out,
        "<text x=\"{}\" y=\"{}\" text-anchor=\"middle\">{} to the right, {} upwards</text>",
        left + width / 2.0,
        top + height + 18.0,
        escape(across),
        escape(up)
    );
    let names: Vec<&str> = all.iter().map(|c| c.name.as_str()).collect();
    out + &legend(&names, top + height + 45.0) + "</svg>"
}

fn short(value: f64) -> String {
    match value {
        v if v >= 1e15 => format!("{v:.2e}"),
        v if v >= 1e12 => format!("{:.4} T", v / 1e12),
        v if v >= 1e9 => format!("{:.4} G", v / 1e9),
        v if v >= 1e6 => format!("{:.4} M", v / 1e6),
        v => format!("{v:.4}"),
    }
}
