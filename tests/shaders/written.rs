//! naga holds every shader valid, with every element type and every constant at both ends of its range, and writes it as
//! SPIR-V, as Metal's language and, but for cooperative matrices, which it does not have, as HLSL. No device is needed.

use naga::back::{hlsl, msl, spv};
use naga::valid::{Capabilities, ModuleInfo, ValidationFlags, Validator};
use std::process::Command;
use supernode::gpu::sources::{Source, every_source};

/// naga's, for what a shader may use and no more.
fn validator(source: &Source) -> Validator {
    let mut able = Capabilities::empty();
    if source.subgroups {
        able |= Capabilities::SUBGROUP;
    }
    if source.matrices.is_some() {
        able |= Capabilities::SHADER_FLOAT16 | Capabilities::COOPERATIVE_MATRIX;
    }
    let mut validator = Validator::new(ValidationFlags::all(), able);
    validator
        .subgroup_stages(naga::valid::ShaderStages::COMPUTE)
        .subgroup_operations(naga::valid::SubgroupOperationSet::all());
    validator
}

fn valid(source: &Source) -> (naga::Module, ModuleInfo) {
    let module = naga::front::wgsl::parse_str(&source.text)
        .unwrap_or_else(|e| panic!("{}: {}", source.name, e.emit_to_string(&source.text)));
    let info = validator(source)
        .validate(&module)
        .unwrap_or_else(|e| panic!("{}: {}", source.name, e.emit_to_string(&source.text)));
    (module, info)
}

fn as_spirv(module: &naga::Module, info: &ModuleInfo) -> Result<Vec<u32>, String> {
    let version = if info_has_matrices(module) {
        (1, 6)
    } else {
        (1, 3)
    };
    let options = spv::Options {
        lang_version: version,
        ..Default::default()
    };
    spv::write_vec(module, info, &options, None).map_err(|e| e.to_string())
}

fn info_has_matrices(module: &naga::Module) -> bool {
    let matrix =
        |(_, ty): (_, &naga::Type)| matches!(ty.inner, naga::TypeInner::CooperativeMatrix { .. });
    module.types.iter().any(matrix)
}

fn as_msl(module: &naga::Module, info: &ModuleInfo, version: (u8, u8)) -> Result<String, String> {
    let options = msl::Options {
        lang_version: version,
        fake_missing_bindings: true,
        ..Default::default()
    };
    let pipeline = msl::PipelineOptions::default();
    let (text, _) =
        msl::write_string(module, info, &options, &pipeline).map_err(|e| e.to_string())?;
    Ok(text)
}

fn as_hlsl(module: &naga::Module, info: &ModuleInfo) -> Result<String, String> {
    let options = hlsl::Options {
        shader_model: hlsl::ShaderModel::V6_0,
        fake_missing_bindings: true,
        ..Default::default()
    };
    let pipeline = hlsl::PipelineOptions::default();
    let mut text = String::new();
    hlsl::Writer::new(&mut text, &options, &pipeline)
        .write(module, info, None)
        .map_err(|e| e.to_string())?;
    Ok(text)
}

/// A writer that panics is a fault of the shader for us: no device of that kind could run it.
fn written<T>(source: &Source, language: &str, write: impl FnOnce() -> Result<T, String>) -> T {
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(write));
    result
        .unwrap_or_else(|_| panic!("{}: the writer of {language} panics", source.name))
        .unwrap_or_else(|e| panic!("{}: as {language}: {e}", source.name))
}

#[test]
fn every_shader_is_valid_and_written_in_every_language() {
    all_of_two(0);
}

/// The others, on another core.
#[test]
fn every_other_shader_is_valid_and_written_in_every_language() {
    all_of_two(1);
}

/// The shaders of even or of odd places.
fn all_of_two(odd: usize) {
    let all: Vec<Source> = every_source().into_iter().skip(odd).step_by(2).collect();
    assert!(all.len() > 500, "only {} shaders", all.len());
    // Types of operands change the lines that load and store alone, so each kernel is translated with some of them.
    let mut kernels = std::collections::BTreeMap::<String, usize>::new();
    for source in &all {
        let (module, info) = valid(source);
        let kernel = source.name.split(' ').next().expect("a name").to_string();
        let seen = kernels.entry(kernel).or_default();
        *seen += 1;
        if *seen > 12 && !seen.is_multiple_of(8) {
            continue;
        }
        let words = written(source, "SPIR-V", || as_spirv(&module, &info));
        assert_eq!(words[0], 0x0723_0203, "{}", source.name);
        // Metal has matrices of 8 by 8 alone, HLSL none.
        if source.matrices.is_none_or(|side| side == 8) {
            let text = written(source, "MSL", || as_msl(&module, &info, (2, 4)));
            assert!(text.contains("kernel"), "{text}");
        }
        if source.matrices.is_none() {
            let text = written(source, "HLSL", || as_hlsl(&module, &info));
            assert!(text.contains("numthreads"), "{text}");
        }
    }
    assert!(kernels.len() > 40, "only {} kernels", kernels.len());
}

#[test]
fn matrices_of_eight_are_metals() {
    let all = every_source();
    let mut types = [0; 2];
    for source in all.iter().filter(|s| s.matrices == Some(8)) {
        let (module, info) = valid(source);
        let half = source.text.contains("enable f16;");
        types[usize::from(half)] += 1;
        let text = written(source, "MSL", || as_msl(&module, &info, (2, 3)));
        let operand = if half {
            "simdgroup_half8x8"
        } else {
            "simdgroup_float8x8"
        };
        for word in [
            operand,
            "simdgroup_float8x8",
            "simdgroup_multiply_accumulate",
            "simdgroup_store",
        ] {
            assert!(text.contains(word), "no {word} in {text}");
        }
        as_msl(&module, &info, (2, 2)).expect_err("a language before 2.3 has none");
    }
    assert_eq!(types, [4, 4], "f32 and f16 in four layouts");
}

/// The Khronos validator, where it is installed (`apt-get install spirv-tools`), on one shader of each kernel and on every one of
/// cooperative matrices.
#[test]
fn spirv_val_finds_nothing() {
    if Command::new("spirv-val").arg("--version").output().is_err() {
        println!("skipped: spirv-val is not installed (Debian, Ubuntu: spirv-tools)");
        assert!(
            std::env::var_os("SUPERNODE_REQUIRE_SPIRV_VAL").is_none(),
            "SUPERNODE_REQUIRE_SPIRV_VAL is set and spirv-val is not installed"
        );
        return;
    }
    let dir = tempfile::tempdir().expect("a folder");
    let mut last = String::new();
    let mut count = 0;
    for source in every_source() {
        let kernel = source.name.split(' ').next().expect("a name").to_string();
        if kernel == last && source.matrices.is_none() {
            continue;
        }
        let (module, info) = valid(&source);
        let words = written(&source, "SPIR-V", || as_spirv(&module, &info));
        let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        let file = dir.path().join("shader.spv");
        std::fs::write(&file, bytes).expect("a file");
        let run = Command::new("spirv-val")
            .args(["--target-env", "vulkan1.3"])
            .arg(&file)
            .output()
            .expect("it ran before");
        // An older validator knows no cooperative matrices: it says that it does not know the capability.
        let said = String::from_utf8_lossy(&run.stderr).to_string();
        let unknown = source.matrices.is_some() && said.contains("Invalid capability");
        assert!(run.status.success() || unknown, "{}: {said}", source.name);
        (last, count) = (kernel, count + 1);
    }
    assert!(count > 40, "only {count} shaders");
}
