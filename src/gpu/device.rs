//! An open adapter: its pipelines, each compiled once, and the first thing that went wrong on it.

use super::adapter::Adapter;
use super::kept::Kept;
use super::library::MATMUL_MATRICES;
use super::matrices::{self, FORMS, Form};
use super::shader::{self, Kernel, Variant, interface};
use super::trial;
use crate::dtype::DType;
use crate::error::{Error, ErrorKind, Result};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

/// A device that has not answered for so long is given up: drivers reset a hanging kernel within seconds, but a software
/// device may compute for minutes.
pub(crate) const PATIENCE: Duration = Duration::from_secs(600);

/// What is asked for where an adapter has it.
const WANTED: wgpu::Features = wgpu::Features::TIMESTAMP_QUERY
    .union(wgpu::Features::TIMESTAMP_QUERY_INSIDE_ENCODERS)
    .union(wgpu::Features::SUBGROUP)
    .union(wgpu::Features::PIPELINE_CACHE);

/// What cooperative matrices need beside; those of f16 also its arithmetic.
const MATRICES: wgpu::Features =
    wgpu::Features::SUBGROUP.union(wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX);

/// A pipeline, or its place until it is compiled.
type Compiled = Arc<OnceLock<Arc<Pipeline>>>;

pub(crate) struct Device {
    pub(crate) about: Adapter,
    pub(crate) device: wgpu::Device,
    pub(crate) queue: wgpu::Queue,
    pub(crate) limits: wgpu::Limits,
    pipelines: Mutex<HashMap<(Kernel, Variant), Compiled>>,
    kept: Option<Kept>,
    /// Whether cooperative matrices were found to be right, by form; not yet asked where it is empty.
    matrices: [OnceLock<bool>; FORMS.len()],
    failure: Arc<Mutex<Option<Error>>>,
}

pub(crate) struct Pipeline {
    pub(crate) pipeline: wgpu::ComputePipeline,
    pub(crate) layout: wgpu::BindGroupLayout,
}

impl Device {
    pub(crate) fn open(adapter: &wgpu::Adapter, about: &Adapter) -> Result<Self> {
        // The adapter's own limits: the defaults stop at 128 MiB a tensor.
        let limits = adapter.limits();
        let mut wanted = wgpu::DeviceDescriptor {
            label: Some("supernode"),
            required_features: adapter.features() & WANTED,
            required_limits: limits.clone(),
            memory_hints: wgpu::MemoryHints::Performance,
            ..Default::default()
        };
        let plain = wanted.clone();
        if FORMS.iter().any(|form| is_listed(about, form)) && adapter.features().contains(MATRICES)
        {
            let halves = adapter.features() & wgpu::Features::SHADER_F16;
            wanted.required_features |= MATRICES | halves;
            // SAFETY: what is experimental here is cooperative matrices; their kernel is this crate's own, reads and writes
            // inside of its operands, and is used only where a first product came out right.
            #[allow(unsafe_code)]
            let enabled = unsafe { wgpu::ExperimentalFeatures::enabled() };
            wanted.experimental_features = enabled;
        }
        let open = |wanted| pollster::block_on(adapter.request_device(wanted));
        let (device, queue) = open(&wanted)
            .or_else(|_| open(&plain))
            .map_err(|e| Error::new(ErrorKind::Device, format!("{about} cannot be opened: {e}")))?;
        let failure = Arc::new(Mutex::new(None));
        let (kept, name) = (failure.clone(), about.to_string());
        device.on_uncaptured_error(Arc::new(move |e| keep(&kept, of_wgpu(&name, e))));
        let (kept, name) = (failure.clone(), about.to_string());
        device.set_device_lost_callback(move |reason, why| {
            if reason != wgpu::DeviceLostReason::Destroyed {
                let what = format!(
                    "{name} was lost ({why}); the last checkpoint is whole: resume from it, on another device if this one fails again"
                );
                keep(&kept, Error::new(ErrorKind::Device, what));
            }
        });
        Ok(Device {
            about: about.clone(),
            kept: Kept::open(&device, &adapter.get_info()),
            device,
            queue,
            limits,
            pipelines: Mutex::default(),
            matrices: Default::default(),
            failure,
        })
    }

    /// Invocations of a subgroup, where cooperative matrices of this form may be used: the first time this multiplies.
    pub(super) fn matrices(&self, form: &Form) -> Option<u32> {
        let features = self.device.features();
        let halves = form.operands != DType::F16 || features.contains(wgpu::Features::SHADER_F16);
        if !is_listed(&self.about, form) || !features.contains(MATRICES) || !halves {
            return None;
        }
        let subgroup = self.subgroup_of_matrices()?;
        let number = FORMS.iter().position(|f| f == form)?;
        let right = self.matrices[number].get_or_init(|| {
            let shader = format!("{} for {}", MATMUL_MATRICES.name, form.listed);
            trial::passes(&self.about, &shader, |chip| {
                matrices::are_right(*form, chip, subgroup)
            })
        });
        right.then_some(subgroup)
    }

    fn subgroup_of_matrices(&self) -> Option<u32> {
        let [least, most] = self.about.subgroup;
        match least == most {
            true => Some(least),
            // wgpu tells the bounds of all of Metal's devices; those that list matrices run 32 invocations, and a product that
            // counts on it comes out wrong on any other.
            false => (self.about.backend == wgpu::Backend::Metal.to_string()).then_some(32),
        }
    }

    /// The first failure, if there was one.
    pub(crate) fn failure(&self) -> Option<Error> {
        self.failure
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// True where invocations are a processor's vector lanes.
    pub(crate) fn is_software(&self) -> bool {
        self.about.kind == "software"
    }

    /// Invocations of a subgroup, where a processor runs it as one vector and kernels may count on its size.
    pub(crate) fn lanes(&self) -> Option<u32> {
        let [least, most] = self.about.subgroup;
        let fits = self.is_software() && least == most && [4, 8, 16].contains(&least);
        (fits && self.device.features().contains(wgpu::Features::SUBGROUP)).then_some(least)
    }

    /// Writes what was compiled since the device was opened to where the next process finds it.
    pub(crate) fn keep_pipelines(&self) {
        if let Some(kept) = &self.kept {
            kept.save();
        }
    }

    /// The compiled variant of a kernel.
    pub(crate) fn pipeline(&self, kernel: &Kernel, variant: &Variant) -> Arc<Pipeline> {
        let key = (*kernel, variant.clone());
        let cell = {
            let all = self.pipelines.lock();
            let mut all = all.unwrap_or_else(PoisonError::into_inner);
            all.entry(key).or_default().clone()
        };
        // Not under the lock: other chips of the adapter compile others meanwhile.
        cell.get_or_init(|| Arc::new(self.compile(kernel, variant)))
            .clone()
    }

    fn compile(&self, kernel: &Kernel, variant: &Variant) -> Pipeline {
        let source = shader::source(kernel, variant);
        let module = self.module(kernel, variant, source);
        let visible = |binding: u32, ty: wgpu::BufferBindingType| wgpu::BindGroupLayoutEntry {
            binding,
            visibility: wgpu::ShaderStages::COMPUTE,
            ty: wgpu::BindingType::Buffer {
                ty,
                has_dynamic_offset: false,
                min_binding_size: None,
            },
            count: None,
        };
        let mut entries = vec![visible(0, wgpu::BufferBindingType::Uniform)];
        let face = interface(kernel);
        for (i, (slot, bound)) in face.slots.iter().zip(&variant.bound).enumerate() {
            if *bound != shader::Bound::Absent && !matches!(bound, shader::Bound::Same(_)) {
                let ty = wgpu::BufferBindingType::Storage {
                    read_only: !slot.written,
                };
                entries.push(visible(i as u32 + 1, ty));
            }
        }
        let layout = self
            .device
            .create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor {
                label: Some(kernel.name),
                entries: &entries,
            });
        let whole = self
            .device
            .create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
                label: Some(kernel.name),
                bind_group_layouts: &[Some(&layout)],
                immediate_size: 0,
            });
        let pipeline = self
            .device
            .create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
                label: Some(kernel.name),
                layout: Some(&whole),
                module: &module,
                entry_point: Some("main"),
                compilation_options: wgpu::PipelineCompilationOptions {
                    // Every kernel writes what it reads of shared memory.
                    zero_initialize_workgroup_memory: false,
                    ..Default::default()
                },
                cache: self.kept.as_ref().map(Kept::cache),
            });
        if let Some(kept) = &self.kept {
            kept.grew();
        }
        Pipeline { pipeline, layout }
    }

    fn module(&self, kernel: &Kernel, variant: &Variant, source: String) -> wgpu::ShaderModule {
        let described = wgpu::ShaderModuleDescriptor {
            label: Some(kernel.name),
            source: wgpu::ShaderSource::Wgsl(source.into()),
        };
        if !variant.proven {
            return self.device.create_shader_module(described);
        }
        // SAFETY: only launches of this crate's own kernels are proven: the launch held the largest index that each operand
        // sees against its size, and the loops of these kernels end with numbers of the launch.
        #[allow(unsafe_code)]
        unsafe {
            self.device
                .create_shader_module_trusted(described, wgpu::ShaderRuntimeChecks::unchecked())
        }
    }

    /// Waits until all that was submitted is done.
    pub(crate) fn wait(&self, submission: wgpu::SubmissionIndex) -> Result<()> {
        let wait = wgpu::PollType::Wait {
            submission_index: Some(submission),
            timeout: Some(PATIENCE),
        };
        let waited = self.device.poll(wait);
        if let Some(error) = self.failure() {
            return Err(error);
        }
        waited.map(drop).map_err(|e| {
            let what = format!(
                "{} did not answer within {} s ({e}); make the step smaller, or use another device",
                self.about,
                PATIENCE.as_secs()
            );
            Error::new(ErrorKind::Device, what)
        })
    }
}

fn is_listed(about: &Adapter, form: &Form) -> bool {
    about.matrices.iter().any(|m| m == form.listed)
}

fn keep(failure: &Mutex<Option<Error>>, error: Error) {
    failure
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .get_or_insert(error);
}

fn of_wgpu(name: &str, error: wgpu::Error) -> Error {
    match error {
        wgpu::Error::OutOfMemory { .. } => Error::new(
            ErrorKind::Memory,
            format!(
                "{name} has no memory left; use a smaller micro-batch, recompute blocks, or split over more chips"
            ),
        ),
        other => Error::new(ErrorKind::Device, format!("{name}: {other}")),
    }
}
