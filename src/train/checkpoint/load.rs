//! Reading a checkpoint back, with a sentence for each way in which it can be damaged or another model's.

use super::State;
use super::manifest::{Absent, Described, FILE, Manifest};
use crate::dtype::DType;
use crate::error::{Error, ErrorKind, Result};
use crate::files;
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, Metadata};
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

/// A checkpoint whose every byte was verified. Its tensors are read where the file lies in memory.
#[derive(Debug)]
pub struct Loaded {
    /// What was saved beside the tensors.
    pub state: State,
    weights: PathBuf,
    bytes: Vec<u8>,
    tensors: BTreeMap<String, Tensor>,
    asked: Mutex<std::collections::BTreeSet<String>>,
}

#[derive(Debug)]
struct Tensor {
    dtype: DType,
    shape: Vec<usize>,
    bytes: Range<usize>,
}

/// The state of the checkpoint in `dir`, without its tensors; `None` if there is none. An error if `checkpoint.json` is
/// damaged or of a newer format.
pub fn peek(dir: &Path) -> Result<Option<State>> {
    match Manifest::read(dir) {
        Ok(manifest) => Ok(Some(manifest.state)),
        Err(Absent::Missing) => Ok(None),
        Err(Absent::Newer(e) | Absent::Broken(e)) => Err(e),
    }
}

/// Reads the checkpoint in `dir`: verifies `checkpoint.json`, then length and CRC-32 of the weights, then their header.
///
/// The weights are read whole and stay in memory while the [`Loaded`] lives.
pub fn load(dir: &Path) -> Result<Loaded> {
    let manifest = match Manifest::read(dir) {
        Ok(manifest) => manifest,
        Err(Absent::Missing) => {
            return Err(damage(format!(
                "there is no checkpoint in {}: {FILE} is not there; train without resuming, or name another directory",
                dir.display()
            )));
        }
        Err(Absent::Newer(e) | Absent::Broken(e)) => return Err(e),
    };
    let path = dir.join(&manifest.weights.file);
    let bytes = read_weights(&path, &manifest)?;
    let (header, metadata) = SafeTensors::read_metadata(&bytes).map_err(|e| {
        let path = path.display();
        damage(format!("the header of the weights {path} is invalid: {e}"))
    })?;
    let tensors = place(&metadata, header + 8, &manifest.tensors)
        .map_err(|e| e.within(format!("the weights {}", path.display())))?;
    Ok(Loaded {
        state: manifest.state,
        weights: path,
        bytes,
        tensors,
        asked: Mutex::default(),
    })
}

/// Reads the weights, of the length and CRC-32 that the manifest says.
fn read_weights(path: &Path, manifest: &Manifest) -> Result<Vec<u8>> {
    let said = &manifest.weights;
    let shown = path.display();
    let unreadable = |e: std::io::Error| {
        let kind = match e.kind() {
            std::io::ErrorKind::NotFound => ErrorKind::Checkpoint,
            _ => ErrorKind::Io,
        };
        let sentence = format!("cannot read the weights {shown} that {FILE} names: {e}");
        Error::new(kind, sentence)
    };
    let there = std::fs::metadata(path).map_err(unreadable)?.len();
    if there != said.bytes {
        let what = if there < said.bytes {
            "are cut short"
        } else {
            "are too long"
        };
        return Err(damage(format!(
            "the weights {shown} {what}: {there} bytes are there, {FILE} says {}; restore them from a copy",
            said.bytes
        )));
    }
    let bytes = files::read(path, said.bytes).map_err(unreadable)?;
    let computed = crc32fast::hash(&bytes);
    if computed != said.crc32 {
        return Err(damage(format!(
            "the weights {shown} are damaged: their CRC-32 is {computed:08x}, {FILE} says {:08x}; restore them from a copy",
            said.crc32
        )));
    }
    Ok(bytes)
}

/// Where each tensor lies in the file, after comparing header and manifest. `start` is where the data begin.
fn place(
    metadata: &Metadata,
    start: usize,
    described: &[Described],
) -> Result<BTreeMap<String, Tensor>> {
    let mut header = metadata.tensors();
    let mut tensors = BTreeMap::new();
    for d in described {
        let says = format!("{FILE} says {}", describe(&d.name, d.dtype, &d.shape));
        let Some(info) = header.remove(&d.name) else {
            return Err(damage(format!("lack a tensor: {says}")));
        };
        if dtype_of(info.dtype) != Some(d.dtype) || info.shape != d.shape {
            return Err(damage(format!(
                "hold '{}' as {} {:?}, {says}",
                d.name,
                info.dtype.to_string().to_lowercase(),
                info.shape
            )));
        }
        let (from, to) = info.data_offsets;
        let bytes = start + from..start + to;
        if bytes.start % d.dtype.size() != 0 {
            return Err(damage(format!(
                "hold '{}' at byte {}, which is no multiple of the {} bytes of an element",
                d.name,
                bytes.start,
                d.dtype.size()
            )));
        }
        let tensor = Tensor {
            dtype: d.dtype,
            shape: d.shape.clone(),
            bytes,
        };
        tensors.insert(d.name.clone(), tensor);
    }
    match header.keys().min() {
        Some(name) => Err(damage(format!(
            "hold a tensor '{name}' of which {FILE} says nothing"
        ))),
        None => Ok(tensors),
    }
}

impl Loaded {
    /// The elements of tensor `name`, row-major and little endian, aligned to their size. An error that names both sides if
    /// the checkpoint lacks it or holds it with another type or shape. May be asked from several threads, and again.
    pub fn expect(&self, name: &str, dtype: DType, shape: &[usize]) -> Result<&[u8]> {
        let wanted = describe(name, dtype, shape);
        let step = self.state.step;
        let file = self.weights.display();
        let Some(tensor) = self.tensors.get(name) else {
            return Err(damage(format!(
                "the checkpoint of step {step} in {file} lacks the tensor {wanted}; it is of another model"
            )));
        };
        if tensor.dtype != dtype || tensor.shape != shape {
            let (d, s) = (tensor.dtype, &tensor.shape);
            return Err(damage(format!(
                "the checkpoint of step {step} in {file} holds '{name}' as {d} {s:?}, the model asks for {dtype} {shape:?}; it is of another model"
            )));
        }
        let mut asked = self.asked.lock().unwrap_or_else(|e| e.into_inner());
        asked.insert(name.to_owned());
        Ok(&self.bytes[tensor.bytes.clone()])
    }

    /// An error if the checkpoint holds a tensor that was never asked for with [`expect`](Self::expect).
    pub fn finish(&self) -> Result<()> {
        let asked = self.asked.lock().unwrap_or_else(|e| e.into_inner());
        let left = || self.tensors.iter().filter(|(n, _)| !asked.contains(*n));
        match left().next() {
            None => Ok(()),
            Some((name, t)) => Err(damage(format!(
                "the checkpoint of step {} in {} holds {} that the model has no place for ({} in all); it is of another model",
                self.state.step,
                self.weights.display(),
                describe(name, t.dtype, &t.shape),
                left().count()
            ))),
        }
    }

    /// Name, type and shape of each tensor, by name.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, DType, &[usize])> {
        let each = self.tensors.iter();
        each.map(|(name, t)| (name.as_str(), t.dtype, t.shape.as_slice()))
    }
}

/// safetensors' name of an element type.
pub(super) fn dtype_to(dtype: DType) -> Dtype {
    match dtype {
        DType::F32 => Dtype::F32,
        DType::Bf16 => Dtype::BF16,
        DType::F16 => Dtype::F16,
        DType::U32 => Dtype::U32,
    }
}

fn dtype_of(dtype: Dtype) -> Option<DType> {
    [DType::F32, DType::Bf16, DType::F16, DType::U32]
        .into_iter()
        .find(|&d| dtype_to(d) == dtype)
}

fn describe(name: &str, dtype: DType, shape: &[usize]) -> String {
    format!("'{name}' ({dtype} {shape:?})")
}

fn damage(sentence: String) -> Error {
    Error::new(ErrorKind::Checkpoint, sentence)
}
