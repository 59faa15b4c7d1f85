//! What graphics processors this machine has, and opening one.

use super::device::Device;
use crate::error::{Error, ErrorKind, Result};
use serde::Serialize;
use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// What one adapter says of itself.
#[derive(Clone, Debug, Serialize)]
pub struct Adapter {
    /// Its number here: `gpu:0` is the first. Discrete ones come first, software last.
    pub index: usize,
    /// Its name, as the driver gives it.
    pub name: String,
    /// `discrete`, `integrated`, `virtual`, `software` or `other`.
    pub kind: &'static str,
    /// The interface: `vulkan`, `metal` or `dx12`.
    pub backend: String,
    /// The driver and its version.
    pub driver: String,
    /// Bytes of the largest buffer.
    pub largest_buffer: u64,
    /// Bytes of the largest buffer that a shader may see: the largest tensor.
    pub largest_tensor: u64,
    /// Bytes that the invocations of a group share.
    pub group_memory: u32,
    /// Most invocations of a group.
    pub group_size: u32,
    /// Smallest and largest number of invocations that run in step.
    pub subgroup: [u32; 2],
    /// Whether kernels can be timed on the device.
    pub timestamps: bool,
    /// Whether shaders may compute in f16.
    pub shader_f16: bool,
    /// Cooperative matrices, as `16x16x16 f16*f16+f32`.
    pub matrices: Vec<String>,
}

impl fmt::Display for Adapter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "gpu:{} {} ({}, {}, {})",
            self.index, self.name, self.kind, self.backend, self.driver
        )
    }
}

struct Found {
    adapter: wgpu::Adapter,
    told: Adapter,
}

/// All adapters, looked for once: drivers do not come and go while a process runs.
fn found() -> &'static [Found] {
    static FOUND: OnceLock<Vec<Found>> = OnceLock::new();
    FOUND.get_or_init(|| {
        let mut wanted = wgpu::InstanceDescriptor::new_without_display_handle();
        wanted.backends = wgpu::Backends::VULKAN | wgpu::Backends::METAL | wgpu::Backends::DX12;
        let instance = wgpu::Instance::new(wanted);
        let all = instance.enumerate_adapters(wgpu::Backends::all());
        let mut all = pollster::block_on(all);
        all.retain(|a| {
            let able = a.get_downlevel_capabilities().flags;
            able.contains(wgpu::DownlevelFlags::COMPUTE_SHADERS)
        });
        all.sort_by_key(|a| rank(a.get_info().device_type));
        let tell = |(index, adapter): (usize, wgpu::Adapter)| Found {
            told: told(index, &adapter),
            adapter,
        };
        all.into_iter().enumerate().map(tell).collect()
    })
}

fn rank(kind: wgpu::DeviceType) -> usize {
    match kind {
        wgpu::DeviceType::DiscreteGpu => 0,
        wgpu::DeviceType::IntegratedGpu => 1,
        wgpu::DeviceType::VirtualGpu => 2,
        wgpu::DeviceType::Other => 3,
        wgpu::DeviceType::Cpu => 4,
    }
}

fn told(index: usize, adapter: &wgpu::Adapter) -> Adapter {
    let (info, limits, features) = (adapter.get_info(), adapter.limits(), adapter.features());
    let matrix = |m: wgpu::wgt::CooperativeMatrixProperties| {
        format!(
            "{}x{}x{} {:?}*{:?}+{:?}",
            m.m_size, m.n_size, m.k_size, m.ab_type, m.ab_type, m.cr_type
        )
    };
    Adapter {
        index,
        name: info.name,
        kind: match info.device_type {
            wgpu::DeviceType::DiscreteGpu => "discrete",
            wgpu::DeviceType::IntegratedGpu => "integrated",
            wgpu::DeviceType::VirtualGpu => "virtual",
            wgpu::DeviceType::Cpu => "software",
            wgpu::DeviceType::Other => "other",
        },
        backend: info.backend.to_string(),
        driver: format!("{} {}", info.driver, info.driver_info)
            .trim()
            .to_string(),
        largest_buffer: limits.max_buffer_size,
        largest_tensor: limits
            .max_storage_buffer_binding_size
            .min(limits.max_buffer_size),
        group_memory: limits.max_compute_workgroup_storage_size,
        group_size: limits.max_compute_invocations_per_workgroup,
        subgroup: [info.subgroup_min_size, info.subgroup_max_size],
        timestamps: features.contains(wgpu::Features::TIMESTAMP_QUERY),
        shader_f16: features.contains(wgpu::Features::SHADER_F16),
        matrices: adapter
            .cooperative_matrix_properties()
            .into_iter()
            .map(matrix)
            .collect(),
    }
}

/// The adapters of this machine that kernels can run on.
pub fn adapters() -> Vec<Adapter> {
    found().iter().map(|f| f.told.clone()).collect()
}

/// What to do where no adapter is found, for the system that this was built for.
pub fn advice() -> &'static str {
    if cfg!(target_os = "linux") {
        "no Vulkan driver was found: install the one of your graphics card, or a software one (on Debian and Ubuntu \
         mesa-vulkan-drivers and libvulkan1)"
    } else if cfg!(target_os = "macos") {
        "Metal lists no device: this needs macOS on a machine or virtual machine with a graphics processor"
    } else {
        "neither DirectX 12 nor Vulkan lists a device: install the driver of your graphics card"
    }
}

/// Adapter `index`, opened once for the whole process, and again after it failed.
pub(crate) fn open(index: usize) -> Result<Arc<Device>> {
    static OPEN: OnceLock<Mutex<HashMap<usize, Arc<Device>>>> = OnceLock::new();
    let open = OPEN.get_or_init(Mutex::default);
    let mut open = open.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(device) = open.get(&index).filter(|d| d.failure().is_none()) {
        return Ok(device.clone());
    }
    let device = Arc::new(open_anew(index)?);
    open.insert(index, device.clone());
    Ok(device)
}

/// Adapter `index` as a device of its own.
pub(super) fn open_anew(index: usize) -> Result<Device> {
    let all = found();
    let Some(found) = all.get(index) else {
        let why = match all.len() {
            0 => advice().to_string(),
            1 => format!("this machine has one: {}", all[0].told),
            n => format!("this machine has {n}: gpu:0 to gpu:{}", n - 1),
        };
        return Err(Error::new(
            ErrorKind::Device,
            format!("there is no gpu:{index}; {why}"),
        ));
    };
    Device::open(&found.adapter, &found.told)
}
