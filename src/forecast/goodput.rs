//! How much of a long run is left after failures.

/// How often chips fail, and what a failure costs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Failures {
    /// Seconds until one chip, with its share of host, links and software, interrupts the run.
    pub chip_mtbf: f64,
    /// Seconds in which a checkpoint stops the run.
    pub checkpoint: f64,
    /// Seconds from a failure until the run goes on from its checkpoint.
    pub restart: f64,
}

impl Default for Failures {
    /// 2112 chip-days a failure: 419 unexpected interruptions of 16,384 H100 in 54 days (Llama 3, arXiv:2407.21783, table 5). A
    /// restart of 10 minutes: detection in MegaScale (arXiv:2402.15627). A checkpoint of 30 seconds is an assumption.
    fn default() -> Self {
        Failures {
            chip_mtbf: 2112.0 * 86_400.0,
            checkpoint: 30.0,
            restart: 600.0,
        }
    }
}

/// What failures leave.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Goodput {
    /// Seconds between failures of the whole machine.
    pub mtbf: f64,
    /// Best seconds between checkpoints, `sqrt(2 checkpoint mtbf)` (Young 1974, Daly 2006).
    pub interval: f64,
    /// Share of the time that counts: `1 - checkpoint / interval - (interval / 2 + restart) / mtbf`, at least 0.
    pub share: f64,
}

impl Failures {
    /// The goodput of `chips` chips.
    pub fn goodput(&self, chips: usize) -> Goodput {
        let mtbf = self.chip_mtbf / chips as f64;
        let interval = (2.0 * self.checkpoint * mtbf).sqrt();
        let lost = self.checkpoint / interval + (interval / 2.0 + self.restart) / mtbf;
        Goodput {
            mtbf,
            interval,
            share: (1.0 - lost).max(0.0),
        }
    }
}
