//! Saving and resuming a run: parameters and optimizer state are gathered and stored whole, so a checkpoint belongs to no
//! mesh. Resumed on the mesh that wrote it, a run goes on bit for bit.

use super::checkpoint::{self, Entry, Loaded, State};
use super::optimizer::Optimizer;
use super::trainer::{Report, Training};
use crate::dtype::DType;
use crate::error::{Error, ErrorKind, Result};
use crate::spmd::{Chip, Threads};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// A run's checkpoints.
pub(super) struct Persist {
    dir: Option<PathBuf>,
    loaded: Option<Arc<Loaded>>,
    identity: State,
    /// The step of the newest checkpoint, plus one; 0 for none.
    newest: AtomicU64,
}

impl Persist {
    /// Opens the checkpoint that the run resumes from, if it does, and checks that it belongs to this run.
    pub(super) fn open(training: &Training, world: &Threads) -> Result<Self> {
        let dir = training.options.checkpoint.clone();
        let identity = identity(training, world.seed());
        let loaded = match (&dir, training.options.resume) {
            (Some(dir), true) => {
                let loaded = checkpoint::load(dir)?;
                belongs(&loaded.state, &identity, dir)?;
                Some(Arc::new(loaded))
            }
            (None, true) => {
                return Err(Error::new(
                    ErrorKind::Input,
                    "to resume, name the checkpoint's directory with --checkpoint",
                ));
            }
            (Some(dir), false) => {
                // Found now rather than after an hour of training.
                if let Some(old) = checkpoint::peek(dir)? {
                    return Err(Error::new(
                        ErrorKind::Checkpoint,
                        format!(
                            "{} already holds a checkpoint of step {}; go on from it with --resume, or name another directory",
                            dir.display(),
                            old.step
                        ),
                    ));
                }
                None
            }
            (None, false) => None,
        };
        let newest = loaded.as_ref().map_or(0, |l| l.state.step + 1);
        Ok(Persist {
            dir,
            loaded,
            identity,
            newest: AtomicU64::new(newest),
        })
    }

    pub(super) fn resumes(&self) -> bool {
        self.loaded.is_some()
    }

    /// Lets the chip take parameters and state from the checkpoint as it first uses them. Returns the steps done.
    pub(super) fn restore(&self, chip: &Chip) -> u64 {
        let Some(loaded) = &self.loaded else { return 0 };
        let source = loaded.clone();
        chip.restore_from(move |name, shape| {
            let bytes = source.expect(name, DType::F32, shape)?;
            // The file is little endian, and nothing says that it is aligned.
            let number = |b: &[u8]| f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
            Ok(Some(bytes.chunks_exact(4).map(number).collect()))
        });
        loaded.state.step
    }

    /// After a step has used the whole model: a tensor in the checkpoint that nobody asked for is a mistake.
    pub(super) fn check_all_used(&self, chip: &Chip) {
        if let Some(loaded) = &self.loaded {
            loaded.finish().unwrap_or_else(|e| chip.fail(e));
        }
    }

    /// A sentence about the newest checkpoint.
    pub(super) fn last(&self) -> String {
        match (self.newest.load(Relaxed), &self.dir) {
            (0, _) | (_, None) => {
                "no checkpoint was written; lower the learning rate or clip harder".into()
            }
            (step, Some(dir)) => format!(
                "the checkpoint of step {} in {} is kept",
                step - 1,
                dir.display()
            ),
        }
    }

    /// Gathers everything and writes it, on one chip; all chips take part in the gathering.
    pub(super) fn save(&self, chip: &Chip, step: u64, tell: &impl Fn(Report)) {
        let Some(dir) = &self.dir else { return };
        let writes = chip.is_first();
        let mut tensors: BTreeMap<String, (Vec<usize>, Vec<f32>)> = BTreeMap::new();
        let count = chip.parameters().len();
        for index in 0..count {
            let all = chip.parameters();
            let p = &all[index];
            let mut parts = vec![(p.name.to_string(), p.value.clone(), &p.placements)];
            let state = Optimizer::state_names(&p.name).into_iter().zip(&p.state);
            parts.extend(state.map(|(name, share)| (name, share.clone(), &p.kept)));
            for (name, share, placed) in parts {
                let whole = chip.whole(&share, placed, p);
                if writes {
                    tensors.insert(name, (p.shape.clone(), whole));
                }
            }
        }
        if !writes {
            return;
        }
        let state = State {
            step,
            ..self.identity.clone()
        };
        const {
            assert!(
                cfg!(target_endian = "little"),
                "checkpoints are little endian"
            )
        };
        let entries = tensors.iter().map(|(name, (shape, data))| Entry {
            name,
            dtype: DType::F32,
            shape,
            bytes: bytemuck::cast_slice(data),
        });
        checkpoint::save(dir, &state, entries).unwrap_or_else(|e| chip.fail(e));
        self.newest.store(step + 1, Relaxed);
        tell(Report::Saved {
            step,
            path: dir.clone(),
        });
    }
}

/// What a checkpoint must agree with to be this run's.
fn identity(training: &Training, seed: u64) -> State {
    let (batches, model) = (&training.batches, &training.model);
    let tokens = batches.tokens();
    State {
        step: 0,
        seed,
        model: serde_json::to_value(model.config()).unwrap_or(Value::Null),
        data: json!({
            "fingerprint": tokens.fingerprint(), "tokens": tokens.len(), "split": batches.split(),
            "vocabulary": tokens.vocabulary(),
        }),
        other: json!({
            "batch": batches.rows(), "context": batches.context(), "dtype": model.dtype(),
            "optimizer": training.options.optimizer,
        }),
    }
}

fn belongs(found: &State, run: &State, dir: &std::path::Path) -> Result<()> {
    let differ = |what: &str, a: &Value, b: &Value| {
        let (key, a, b) = first_difference(a, b);
        Error::new(
            ErrorKind::Checkpoint,
            format!(
                "the checkpoint in {} is of another {what}: {key}{a} there, {b} in this run",
                dir.display()
            ),
        )
    };
    if found.seed != run.seed {
        return Err(differ("seed", &json!(found.seed), &json!(run.seed)));
    }
    let pairs = [
        ("model", &found.model, &run.model),
        ("text", &found.data, &run.data),
        ("kind of run", &found.other, &run.other),
    ];
    match pairs.into_iter().find(|(_, a, b)| a != b) {
        Some((what, a, b)) => Err(differ(what, a, b)),
        None => Ok(()),
    }
}

/// The first key whose values differ, with both.
fn first_difference(a: &Value, b: &Value) -> (String, String, String) {
    if let (Value::Object(x), Value::Object(y)) = (a, b) {
        let keys = x.keys().chain(y.keys());
        for key in keys {
            let (p, q) = (
                x.get(key).unwrap_or(&Value::Null),
                y.get(key).unwrap_or(&Value::Null),
            );
            if p != q {
                let (rest, p, q) = first_difference(p, q);
                return (format!("{key} {rest}"), p, q);
            }
        }
    }
    let short = |v: &Value| {
        let text = v.to_string();
        if text.chars().count() > 60 {
            format!("{}...", text.chars().take(57).collect::<String>())
        } else {
            text
        }
    };
    (String::new(), short(a), short(b))
}
