//! Saving and resuming a run: parameters and optimizer state are gathered and stored whole, so a checkpoint belongs to no
//! mesh. Resumed on the mesh that wrote it, a run goes on bit for bit.

use super::checkpoint::{self, Entry, Loaded, State};
use super::optimizer::Optimizer;
use super::shares;
use super::trainer::{Report, Training};
use crate::dtype::{DType, TensorType};
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
        let mut tensors = self.gathered(chip);
        if chip.size_of(STAGES) > 1 {
            collect(chip, &mut tensors);
        }
        if !writes {
            return;
        }
        let mut state = State {
            step,
            ..self.identity.clone()
        };
        shares::record(chip.mesh(), &mut state.other);
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

    /// Parameters and state of this chip's stage, whole, on the first chip of the stage.
    fn gathered(&self, chip: &Chip) -> Tensors {
        let keeps = is_first_of_stage(chip);
        let mut tensors = Tensors::new();
        let count = chip.parameters().len();
        for index in 0..count {
            let all = chip.parameters();
            let p = &all[index];
            let mut parts = vec![(p.name.to_string(), p.value.clone(), &p.placements)];
            let state = Optimizer::state_names(&p.name).into_iter().zip(&p.state);
            parts.extend(state.map(|(name, share)| (name, share.clone(), &p.kept)));
            for (name, share, placed) in parts {
                let whole = chip.whole(&share, placed, p);
                if keeps {
                    tensors.insert(name, (p.shape.clone(), whole));
                }
            }
        }
        tensors
    }
}

/// Whole tensors by name.
type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

/// The mesh axis of stages.
const STAGES: &str = "pp";

fn is_first_of_stage(chip: &Chip) -> bool {
    let axes = chip.mesh().axes().iter();
    let mut others = axes.filter(|a| a.name() != STAGES);
    others.all(|axis| chip.coordinate(axis.name()) == 0)
}

/// Brings every stage's tensors to the first stage: a list of names and shapes, then the contents one by one. What two stages
/// share is equal on both.
fn collect(chip: &Chip, tensors: &mut Tensors) {
    if !is_first_of_stage(chip) {
        return;
    }
    let here = chip.coordinate(STAGES);
    let input = |data: &[u32]| chip.input("list", [data.len()], chip.replicated(), data);
    if here > 0 {
        let to = -(here as isize);
        let list: Vec<(&String, &Vec<usize>)> = tensors.iter().map(|(n, (s, _))| (n, s)).collect();
        let list = serde_json::to_vec(&list).expect("names and numbers");
        let list: Vec<u32> = list.into_iter().map(u32::from).collect();
        chip.send(&input(&[list.len() as u32]), STAGES, to);
        chip.send(&input(&list), STAGES, to);
        for (_, data) in tensors.values() {
            let contents = chip.input("contents", [data.len()], chip.replicated(), data);
            chip.send(&contents, STAGES, to);
        }
        return;
    }
    for stage in 1..chip.size_of(STAGES) {
        let receive = |len: usize, dtype| {
            let ty = TensorType::new([len], dtype);
            chip.receive(&ty, STAGES, stage as isize).tensor().clone()
        };
        let words = |len| receive(len, DType::U32).slice().typed::<u32>().to_vec();
        let list = words(words(1)[0] as usize);
        let list: Vec<u8> = list.into_iter().map(|b| b as u8).collect();
        let list: Vec<(String, Vec<usize>)> =
            serde_json::from_slice(&list).expect("the list that the other stage wrote");
        for (name, shape) in list {
            let data = receive(shape.iter().product(), DType::F32);
            tensors.insert(name, (shape, data.slice().typed::<f32>().to_vec()));
        }
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
        other: with_separator(
            batches.separator(),
            json!({
                "batch": batches.rows(), "context": batches.context(), "dtype": model.dtype(),
                "optimizer": training.options.optimizer,
            }),
        ),
    }
}

/// Named only where rows hold documents: a checkpoint of rows that do not has no such entry.
fn with_separator(separator: Option<u32>, mut other: Value) -> Value {
    if let Some(token) = separator {
        other["documents end in token"] = json!(token);
    }
    other
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
        ("kind of run", &shares::without(&found.other), &run.other),
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
