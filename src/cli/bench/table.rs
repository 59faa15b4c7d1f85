//! Results as they are printed: a row of a table, or an object a line.

use super::cases::Case;
use super::measure::Measured;
use crate::cli::output::print_text;

const NAME: usize = 46;

/// The table's head.
pub(super) fn print_header() {
    let [dtype, threads] = ["type", "threads"];
    print_text(&format!(
        "{:<NAME$} {dtype:>5} {threads:>7} {:>11} {:>9} {:>7}  bound\n",
        "case", "ms", "GFLOP/s", "of peak"
    ));
}

/// A row, as soon as it is known.
pub(super) fn print_row(case: &Case, measured: &Measured) {
    print_text(&format!(
        "{:<NAME$} {:>5} {:>7} {:>11.4} {:>9.1} {:>6.1}%  {}\n",
        case.work.name(),
        case.dtype,
        case.threads,
        measured.seconds * 1e3,
        measured.gflops,
        measured.fraction_of_peak * 100.0,
        measured.bound.name()
    ));
    #[cfg(feature = "gpu")]
    for one in &measured.kernels {
        print_text(&format!(
            "  {:<NAME$} {:>11} x {:>11.4}\n",
            one.kernel,
            one.launches,
            one.seconds * 1e3
        ));
    }
}

/// The case's object with the results in it, on a line.
pub(super) fn print_line(case: Case, backend: &str, measured: &Measured) {
    let mut fields = case.fields;
    fields.set("backend", backend);
    fields.set("seconds", measured.seconds);
    fields.set("gflops", measured.gflops);
    fields.set("fraction_of_peak", measured.fraction_of_peak);
    fields.set("bound", measured.bound.name());
    #[cfg(feature = "gpu")]
    if !measured.kernels.is_empty() {
        let kernels = serde_json::to_value(&measured.kernels);
        fields.set(
            "kernels",
            kernels.expect("names are text and numbers are finite"),
        );
    }
    let line = serde_json::to_string(&fields).expect("names are text and numbers are finite");
    print_text(&format!("{line}\n"));
}
