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
    /// Sums, dropout, softmax, casts, optimizers.
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
        let slower = Slower {
            class: Some(class),
            by: 1.0 + class.residual(machine),
        };
        squares += (step(slower)? / base - 1.0).powi(2);
    }
    let half = squares.sqrt();
    Ok((
        seconds * (1.0 - half).max(0.0),
        seconds * (1.0 + 1.5 * half),
    ))
}
