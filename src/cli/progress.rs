//! What a run says while it goes on, and at its end.

use super::output::{print_text, tell};
use super::shares::{Chosen, Why, with_commas};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::{Value, json};
use std::io::IsTerminal;
use std::sync::{Mutex, PoisonError};
use supernode::model::Config;
use supernode::spmd::Run;
use supernode::trace::{CollectiveTotal, Trace};
use supernode::train::data::Vocabulary;
use supernode::train::{ExpertLoads, Finished, Layout, Report, Training};

/// Without a terminal, a line after so many steps is enough.
const LINE_EVERY: u64 = 50;

/// Tells a run's progress.
pub(super) struct Progress {
    json: bool,
    bar: Option<ProgressBar>,
    steps: u64,
    labels_per_step: f64,
    parameters: u64,
    vocabulary: Vocabulary,
    seen: Mutex<Seen>,
}

#[derive(Default)]
struct Seen {
    ms: Vec<f64>,
    stopped: bool,
}

impl Progress {
    pub(super) fn new(training: &Training, json: bool) -> Self {
        let steps = training.options.steps;
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::with_draw_target(Some(steps), ProgressDrawTarget::stderr());
            let style = ProgressStyle::with_template("{pos}/{len} [{bar:24}] {msg} {eta}");
            bar.set_style(
                style
                    .unwrap_or_else(|_| ProgressStyle::default_bar())
                    .progress_chars("=> "),
            );
            bar
        });
        Progress {
            json,
            bar,
            steps,
            labels_per_step: (training.batches.rows() * training.batches.context()) as f64,
            parameters: training.model.config().parameters(),
            vocabulary: training.batches.tokens().vocabulary().clone(),
            seen: Mutex::default(),
        }
    }

    pub(super) fn begin(&self, training: &Training, chosen: &Chosen, threads: usize) {
        let mesh = &chosen.mesh;
        let chips = mesh.chips();
        self.say(&format!(
            "{} parameters, {chips} chip(s) ({mesh}), {threads} thread(s) each, {} steps of {} tokens",
            self.parameters, self.steps, self.labels_per_step
        ));
        self.tell_shares(chosen);
        if mesh.size_of("cp") > 1 {
            self.say(&format!(
                "attention over cp: {}",
                training.model.context_method(mesh)
            ));
        }
    }

    /// Shares over dp that the mesh did not name.
    fn tell_shares(&self, chosen: &Chosen) {
        let (shares, why, seconds) = match &chosen.why {
            Why::Given => return,
            Why::Recorded(shares) => (shares, "recorded", None),
            Why::Measured(speeds) => (&speeds.shares, "measured", Some(&speeds.seconds)),
        };
        let ms: Option<Vec<f64>> = seconds.map(|all| all.iter().map(|s| s * 1e3).collect());
        let taking = ms.iter().map(|ms| {
            let words: Vec<String> = ms.iter().map(|ms| format!("{ms:.2}")).collect();
            format!(", where a sequence takes {} ms", words.join(" and "))
        });
        self.say(&format!(
            "shares of the batch over dp: {} ({why}{})",
            with_commas(shares),
            taking.collect::<String>()
        ));
        if self.json {
            let mut line = json!({"mesh": chosen.mesh.to_string(), "shares": shares, "from": why});
            if let Some(ms) = ms {
                line["ms_per_sequence"] = json!(ms);
            }
            print_line(&line);
        }
    }

    /// A line on standard error, above the bar.
    fn say(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.println(line),
            None => tell(line),
        }
    }

    pub(super) fn tell(&self, report: &Report) {
        match report {
            Report::Step {
                step,
                loss,
                gradient_norm,
                lr,
                ms,
                peak_bytes,
                experts,
            } => {
                self.lock().ms.push(*ms);
                if self.json {
                    let mut line = json!({
                        "step": step, "loss": loss, "ms": ms, "gradient_norm": finite(*gradient_norm), "lr": lr,
                    });
                    if let Some(e) = experts {
                        line["dropped"] = json!(dropped(e));
                        line["busiest_expert"] = json!(e.busiest);
                        line["close_choices"] = json!(e.close);
                    }
                    print_line(&line);
                }
                if !gradient_norm.is_finite() {
                    self.say(&format!("step {step}: the gradient norm is {gradient_norm}; this update was left out"));
                }
                let rate = self.labels_per_step / ms * 1e3;
                let of_experts = experts.as_ref().map_or(String::new(), |e| {
                    format!(
                        "  {:.1} % dropped, busiest expert {:.2}",
                        100.0 * dropped(e),
                        e.busiest
                    )
                });
                let message = format!(
                    "loss {loss:.4}  {rate:.0} tokens/s  {:.0} MB{of_experts}",
                    *peak_bytes as f64 / 1e6
                );
                match &self.bar {
                    Some(bar) => {
                        bar.set_position(*step);
                        bar.set_message(message);
                    }
                    None if step % LINE_EVERY == 0 || *step == 1 => {
                        tell(&format!("step {step}: {message}"))
                    }
                    None => {}
                }
            }
            Report::Validation { step, loss } => {
                if self.json {
                    print_line(&json!({"step": step, "val_loss": loss}));
                }
                self.say(&format!("step {step}: validation loss {loss:.4}"));
            }
            Report::Resumed { step } => self.say(&format!("resumed after step {step}")),
            Report::Saved { step, path } => {
                self.say(&format!("saved step {step} in {}", path.display()))
            }
            Report::Stopping { step } => {
                self.lock().stopped = true;
                self.say(&format!("stopped after step {step}"));
            }
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the bar away.
    pub(super) fn end(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }

    /// The last words on a run that succeeded. True if it was stopped before its end.
    pub(super) fn done(&self, run: &Run<Finished>) -> bool {
        let seen = self.lock();
        let finished = &run.outputs()[0];
        if !finished.sample.is_empty() {
            let text = self.vocabulary.decode(&finished.sample);
            match self.json {
                true => print_line(&json!({"sample": text})),
                false => print_text(&format!("{text}\n")),
            }
        }
        let total: f64 = seen.ms.iter().sum();
        let rate = (!seen.ms.is_empty())
            .then(|| self.labels_per_step * seen.ms.len() as f64 / total * 1e3);
        if self.json {
            let mut done = json!({
                "done": true, "steps": finished.steps, "stopped": seen.stopped, "loss": finished.loss,
                "val_loss": finished.val_loss, "tokens_per_second": rate, "ms_per_step_median": median(&seen.ms),
                "peak_bytes_per_chip": run.trace().peak_bytes(), "collectives": totals(run.trace().collectives()),
            });
            if let Some(copies) = run.trace().chip(0).host {
                done["through_host_memory"] = json!(copies);
            }
            print_line(&done);
        } else {
            print_text(&run.trace().summary());
            let number = |x: Option<f64>| x.map_or("none".to_string(), |x| format!("{x:.4}"));
            print_text(&format!(
                "{} steps, loss {}, validation loss {}, {} tokens/s\n",
                finished.steps,
                number(finished.loss),
                number(finished.val_loss),
                rate.map_or("no".to_string(), |r| format!("{r:.0}")),
            ));
        }
        seen.stopped
    }
}

/// What lives where and what moves when.
pub(super) fn print_layout(layout: &Layout, json: bool) {
    match json {
        true => print_line(&json!({ "layout": layout })),
        false => print_text(&format!("{layout}\n")),
    }
}

/// What a ghost of one step found.
pub(super) fn print_ghost(trace: &Trace, config: &Config, json: bool) {
    // A mesh of half a million chips has few classes; a list by chip would only repeat them.
    const LISTED: usize = 4096;
    let chips = trace.mesh.chips();
    if !json {
        print_text(&format!(
            "{} parameters; one training step\n{}",
            config.parameters(),
            trace.summary()
        ));
        return;
    }
    let class = |c: &supernode::trace::Class| json!({"pattern": c.pattern, "peak_bytes": c.chip.peak_bytes});
    let mut done = json!({
        "done": true, "ghost": true, "mesh": trace.mesh.to_string(), "chips": chips, "parameters": config.parameters(),
        "classes": trace.classes.iter().map(class).collect::<Vec<_>>(), "collectives": totals(trace.collectives()),
    });
    if let Some(copies) = trace.chip(0).host {
        done["through_host_memory"] = json!(copies);
    }
    if chips <= LISTED {
        done["peak_bytes_per_chip"] = json!(trace.peak_bytes());
    }
    print_line(&done);
}

fn totals(collectives: &[CollectiveTotal]) -> Vec<Value> {
    let one = |c: &CollectiveTotal| json!({"op": &*c.op, "axis": c.axis, "calls": c.calls, "bytes": c.bytes});
    collectives.iter().map(one).collect()
}

/// The share of a mixture's assignments that were dropped.
fn dropped(loads: &ExpertLoads) -> f64 {
    loads.dropped as f64 / (loads.asked as f64).max(1.0)
}

fn finite(x: f64) -> Option<f64> {
    x.is_finite().then_some(x)
}

fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => None,
        n if n % 2 == 1 => Some(sorted[middle]),
        _ => Some((sorted[middle - 1] + sorted[middle]) / 2.0),
    }
}

/// Prints one object on a line. Whoever closed the pipe has read enough.
fn print_line(value: &Value) {
    print_text(&format!("{value}\n"));
}
