//! What goes wrong on a device is an error that says so, and leaves the rest of the process alone.

use crate::dtype::DType;
use crate::error::ErrorKind;
use crate::gpu::{Chip, Operand, fill};

/// A chip on a device of its own, which may be lost without harm to other tests.
fn alone() -> Option<Chip> {
    match Chip::open_alone(0) {
        Ok(chip) => Some(chip),
        Err(why) => {
            let required = std::env::var_os("SUPERNODE_REQUIRE_GPU").is_some();
            assert!(!required, "SUPERNODE_REQUIRE_GPU is set, but {why}");
            eprintln!("ignored: {why}");
            None
        }
    }
}

fn numbers(chip: &Chip, n: usize) -> Operand {
    let block = chip.allocate(4 * n as u64).expect("a small block");
    Operand::holding(chip, block, DType::F32, n)
}

#[test]
#[cfg_attr(
    no_adapter,
    ignore = "no Vulkan driver is installed; mesa-vulkan-drivers brings a software one"
)]
fn a_lost_device_is_an_error_and_another_is_opened() {
    let Some(chip) = alone() else { return };
    fill(1.0, None, numbers(&chip, 100));
    chip.finish().expect("the device is there");
    chip.lose();
    let block = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        fill(2.0, None, numbers(&chip, 100));
        chip.finish().expect_err("the device is lost")
    }));
    // The program of a chip ends by unwinding with the error.
    let error = block.unwrap_or_else(|payload| {
        *payload
            .downcast::<crate::Error>()
            .unwrap_or_else(|other| std::panic::resume_unwind(other))
    });
    assert_eq!(error.kind(), ErrorKind::Device, "{error}");
    let another = alone().expect("the adapter is still there");
    fill(3.0, None, numbers(&another, 100));
    another.finish().expect("a new device");
}

#[test]
#[cfg_attr(
    no_adapter,
    ignore = "no Vulkan driver is installed; mesa-vulkan-drivers brings a software one"
)]
fn a_tensor_beyond_what_a_shader_sees_is_refused_with_both_numbers() {
    let Some(chip) = alone() else { return };
    let most = chip.adapter().largest_tensor;
    let refused = chip.allocate(most + 64).err().expect("too large");
    assert_eq!(refused.kind(), ErrorKind::Memory);
    let why = refused.to_string();
    assert!(
        why.contains(&most.to_string()) && why.contains(&(most + 64).to_string()),
        "{why}"
    );
}

#[test]
#[cfg_attr(
    no_adapter,
    ignore = "no Vulkan driver is installed; mesa-vulkan-drivers brings a software one"
)]
fn kernels_are_timed_one_by_one() {
    let Some(chip) = alone() else { return };
    if !chip.adapter().timestamps {
        return;
    }
    let y = numbers(&chip, 1 << 16);
    let ((), times) = chip
        .timed(|| (0..3).for_each(|_| fill(2.0, None, y.clone())))
        .expect("timestamps");
    assert_eq!(times.len(), 1, "{times:?}");
    assert_eq!((times[0].kernel, times[0].launches), ("fill", 3));
    assert!(times[0].seconds > 0.0, "{times:?}");
}
