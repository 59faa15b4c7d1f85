//! Whether a mesh can carry a training: what stands in the way, and the nearest that works.

use super::stages::Stages;
use super::trainer::Training;
use crate::error::{Error, ErrorKind, Result};
use crate::mesh::Mesh;
use crate::model::nearest_divisor;
use crate::spmd::Zero;

impl Training {
    /// Checks that the mesh can carry the batch.
    ///
    /// # Errors
    /// [`ErrorKind::Mesh`] or [`ErrorKind::Input`]: which number stands in the way, and the nearest that works.
    pub fn check(&self, mesh: &Mesh) -> Result<()> {
        self.model.check(mesh)?;
        let known = |name: &str| matches!(name, "dp" | "fsdp" | "ep" | "cp" | "tp" | "pp");
        if let Some(axis) = mesh
            .axes()
            .iter()
            .find(|a| !known(a.name()) && a.size() > 1)
        {
            return Err(Error::new(
                ErrorKind::Mesh,
                format!(
                    "the training loop splits over dp, fsdp, ep, cp, tp and pp; it does not know mesh axis {}={}",
                    axis.name(),
                    axis.size()
                ),
            ));
        }
        if self.model.is_sequence_parallel() && mesh.size_of("tp") == 1 {
            return Err(Error::new(
                ErrorKind::Mesh,
                format!(
                    "sequence parallelism splits tokens over the chips of tp, and the mesh {mesh} has none; leave it out, or \
                     name a mesh with tp=2"
                ),
            ));
        }
        self.check_collective_matmul(mesh)?;
        self.check_batch(mesh)?;
        self.check_zero(mesh, false)?;
        let (share, micro) = (self.batches.rows() / replicas(mesh), self.micro_batch(mesh));
        if micro == 0 || share % micro != 0 {
            let of = match mesh.units_of("dp") == mesh.size_of("dp") {
                true => String::new(),
                false => format!(" for each of the shares {}", mesh.written("dp")),
            };
            return Err(Error::new(
                ErrorKind::Input,
                format!(
                    "a micro-batch of {micro} sequences does not divide a chip's share of {share}{of}; {} does",
                    nearest_divisor(share, micro.max(1))
                ),
            ));
        }
        if self.batches.context() > self.model.config().context {
            return Err(Error::new(
                ErrorKind::Input,
                format!(
                    "rows of {} tokens are longer than the model's context of {}",
                    self.batches.context(),
                    self.model.config().context
                ),
            ));
        }
        Stages::new(self, mesh).map(drop)
    }

    /// Checks what is split of parameters, on a mesh whose shares over dp are still to be measured if so said.
    pub(super) fn check_zero(&self, mesh: &Mesh, measured: bool) -> Result<()> {
        let (zero, axis) = self.zero(mesh);
        let split = match zero {
            Zero::Nothing => return Ok(()),
            Zero::State => "the optimizer's state is",
            Zero::Gradients => "the optimizer's state and gradients are",
            Zero::Parameters => "parameters, gradients and the optimizer's state are",
        };
        if self.options.zero.is_some() && mesh.size_of(axis) == 1 {
            return Err(Error::new(
                ErrorKind::Mesh,
                format!(
                    "{split} to be split over the chips of fsdp or dp, and the mesh {mesh} has neither; a mesh with \
                     fsdp=2 would do"
                ),
            ));
        }
        let why = format!(
            "{split} to be cut along it too, and a faster chip has no more memory for that"
        );
        if measured && axis == "dp" {
            return Err(Error::new(
                ErrorKind::Mesh,
                format!(
                    "mesh axis dp cannot have shares by speed: {why}; leave out ZeRO, or the shares"
                ),
            ));
        }
        mesh.refuse_shares(axis, &why)
    }

    fn check_collective_matmul(&self, mesh: &Mesh) -> Result<()> {
        if !self.model.is_collective_matmul() {
            return Ok(());
        }
        let refuse = |why: String| Err(Error::new(ErrorKind::Mesh, why));
        let (tp, tokens) = (mesh.size_of("tp"), self.batches.context());
        if !self.model.is_sequence_parallel() {
            return refuse(
                "a collective matmul runs beside the transfers of sequence parallelism; give --sequence-parallel too".into(),
            );
        }
        if mesh.size_of("cp") > 1 {
            return refuse(format!(
                "a collective matmul cuts a chip's tokens into one chunk for each chip of tp, and mesh axis cp={} cuts them too; \
                 leave one of the two out",
                mesh.size_of("cp")
            ));
        }
        if !tokens.is_multiple_of(tp) {
            return refuse(format!(
                "mesh axis tp={tp} does not divide the {tokens} tokens of a sequence, as a collective matmul has to; tp={} does",
                nearest_divisor(tokens, tp)
            ));
        }
        Ok(())
    }

    pub(super) fn micro_batch(&self, mesh: &Mesh) -> usize {
        let all = self.batches.rows() / replicas(mesh);
        let several = mesh.size_of("pp") > 1;
        let usual = if several { 1 } else { all };
        self.options.micro_batch.unwrap_or(usual)
    }

    fn check_batch(&self, mesh: &Mesh) -> Result<()> {
        let mut left = self.batches.rows();
        let mut before: Vec<&str> = Vec::new();
        for axis in REPLICAS {
            let (size, batch) = (mesh.units_of(axis), self.batches.rows());
            if size != mesh.size_of(axis) && !left.is_multiple_of(size) {
                let all = replicas(mesh);
                let nearest = ((batch + all / 2) / all).max(1) * all;
                return Err(Error::new(
                    ErrorKind::Mesh,
                    format!(
                        "a batch of {batch} sequences does not divide into the {size} shares of mesh axis {}, whole sequences for \
                         each; a batch of {nearest} does",
                        mesh.written(axis)
                    ),
                ));
            }
            if !left.is_multiple_of(size) {
                let others = match (&before[..], left == batch) {
                    (_, true) | ([], _) => String::new(),
                    ([one], _) => format!("the {left} that {one} leaves of "),
                    (several, _) => format!("the {left} that {} leave of ", several.join(" and ")),
                };
                return Err(Error::new(
                    ErrorKind::Mesh,
                    format!(
                        "mesh axis {axis}={size} does not divide {others}a batch of {batch} sequences; {axis}={} does, or a \
                         batch of {}",
                        nearest_divisor(left, size),
                        batch.next_multiple_of(replicas(mesh))
                    ),
                ));
            }
            left /= size;
            if size > 1 {
                before.push(axis);
            }
        }
        Ok(())
    }
}

/// Into how many parts the mesh splits the sequences of a batch: one for each chip along its axes, or for each of its shares.
pub(super) fn replicas(mesh: &Mesh) -> usize {
    REPLICAS.iter().map(|axis| mesh.units_of(axis)).product()
}

/// The axes that split the sequences of a batch.
const REPLICAS: [&str; 3] = ["dp", "fsdp", "ep"];
