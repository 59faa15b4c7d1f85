//! The 80 % interval around a price.
//!
//! Each class of work errs by itself: `half = sqrt(sum over classes of (step with the class slower by its residual / step - 1)^2 +
//! rest^2)`. A residual is what 80 % of the measurements lie within that the class was fitted to, or that were left out of the fit:
//! of products, sums over a layer's, because a step repeats whole layers; where nothing was measured it is [`UNMEASURED`]. What
//! nobody modelled makes a run slower, not faster: the upper half is half as wide again.

use crate::cluster::Machine;
use crate::error::Result;

/// Residual of a class that nobody measured.
const UNMEASURED: f64 = 0.2;

/// Share of a step by which the pipeline, the software and the machine's state lie beside the model, kernels and network apart.
const REST: f64 = 0.05;

/// Work that errs together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Products.
    Matmul,
    /// The core of attention in one kernel.
    Attention,
    /// Sums, dropout, softmax, losses, casts, optimizers.
    Elementwise,
    /// Norms.
    Norm,
    /// Activations.
    Activation,
    /// The host's launches.
    Launch,
    /// Collectives by a measured curve.
    Curves,
    /// Transfers by the rates of their links.
    Links,
}

impl Class {
    /// All of them.
    pub const ALL: [Class; 8] = [
        Class::Matmul,
        Class::Attention,
        Class::Elementwise,
        Class::Norm,
        Class::Activation,
        Class::Launch,
        Class::Curves,
        Class::Links,
    ];

    /// The share of its price by which it errs on `machine`.
    fn residual(self, machine: &Machine) -> f64 {
        let of_chip = |class: &str| {
            let own = machine.chip.find(&format!("kernel.{class}.residual"));
            own.or_else(|| machine.chip.find("kernel.residual"))
        };
        let found = match self {
            Class::Matmul => of_chip("matmul"),
            Class::Attention => machine.chip.find("kernel.attention.residual"),
            Class::Elementwise => of_chip("elementwise"),
            Class::Norm => of_chip("norm"),
            Class::Activation => of_chip("activation"),
            Class::Curves => machine.system.find("network.residual"),
            Class::Launch | Class::Links => None,
        };
        found.unwrap_or(UNMEASURED)
    }
}

/// A class that is slower than its price, or none.
#[derive(Clone, Copy, Debug)]
pub struct Slower {
    class: Option<Class>,
    by: f64,
}

impl Slower {
    /// Everything as it is priced.
    pub const NOTHING: Slower = Slower {
        class: None,
        by: 1.0,
    };

    /// One class slower by a factor.
    pub fn new(class: Class, by: f64) -> Slower {
        let class = Some(class);
        Slower { class, by }
    }

    /// The factor of a class.
    pub fn of(self, class: Class) -> f64 {
        if self.class == Some(class) {
            self.by
        } else {
            1.0
        }
    }
}

/// The interval around `seconds`, if `step` gives a step's seconds with a class of work slower.
///
/// # Errors
/// Those of `step`.
pub(super) fn around(
    machine: &Machine,
    seconds: f64,
    step: impl Fn(Slower) -> Result<f64>,
) -> Result<(f64, f64)> {
    let base = step(Slower::NOTHING)?;
    let mut squares = REST.powi(2);
    for class in Class::ALL {
        let slower = Slower::new(class, 1.0 + class.residual(machine));
        squares += (step(slower)? / base - 1.0).powi(2);
    }
    let half = squares.sqrt();
    Ok((
        seconds * (1.0 - half).max(0.0),
        seconds * (1.0 + 1.5 * half),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Classes of a made-up step err apart: the square root of the sum of their squares.
    #[test]
    fn classes_err_apart() {
        let mut machine = Machine::named("dgx-a100").unwrap();
        machine.set("kernel.matmul.residual", "0.1").unwrap();
        let step =
            |slower: Slower| Ok(3.0 * slower.of(Class::Matmul) + 1.0 * slower.of(Class::Links));
        let (low, high) = around(&machine, 4.0, step).unwrap();
        // Products are three quarters of the step, links a quarter, whose residual nobody measured.
        let half = (0.075f64.powi(2) + 0.05f64.powi(2) + 0.05f64.powi(2)).sqrt();
        assert!((low - 4.0 * (1.0 - half)).abs() <= 1e-12, "{low}");
        assert!((high - 4.0 * (1.0 + 1.5 * half)).abs() <= 1e-12, "{high}");
    }

    /// What slows one class slows no other.
    #[test]
    fn a_class_is_slower_alone() {
        use crate::forecast::kernel::Rates;
        use crate::forecast::work::{Rows, Work};
        let machine = Machine::named("dgx-a100").unwrap();
        let rates = Rates::of(&machine, "bf16").unwrap();
        let stream = |rows| Work::Stream { rows, bytes: 1e9 };
        let works = [
            (Class::Matmul, Work::matmul(4096, 4096, 4096)),
            (Class::Elementwise, stream(Rows::Elementwise)),
            (Class::Elementwise, stream(Rows::Softmax)),
            (Class::Elementwise, stream(Rows::Optimizer)),
            (Class::Norm, stream(Rows::Norm)),
            (Class::Activation, stream(Rows::Activation)),
            (Class::Activation, stream(Rows::Gelu)),
        ];
        for class in Class::ALL {
            let slow = rates.slowed(Slower::new(class, 1.5));
            for (own, work) in &works {
                let ratio = slow.seconds(work) / rates.seconds(work);
                let wants = if *own == class { 1.5 } else { 1.0 };
                assert!(
                    (ratio - wants).abs() <= 1e-12,
                    "{class:?} {work:?}: {ratio}"
                );
            }
        }
    }
}
