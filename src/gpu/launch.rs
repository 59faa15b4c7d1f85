//! Running a kernel: which tensors stand in its slots, its numbers, and how many groups.

use super::chip::{Block, Chip, Held, SLOT, fail};
use super::shader::{Bound, Entry, Interface, Kernel, Variant, interface};
use crate::dtype::DType;
use crate::error::{Error, ErrorKind};
use std::sync::Arc;

/// A tensor as a kernel sees it.
#[derive(Clone)]
pub struct Operand {
    pub(crate) chip: Chip,
    pub(super) buffer: Held,
    pub(crate) dtype: DType,
    pub(crate) elements: usize,
    /// Working memory, which goes back to the pool when the last launch that uses it is recorded: whoever takes it next
    /// records later, and so runs later.
    held: Option<Arc<Block>>,
}

impl Operand {
    /// A block of its own, as elements of `dtype`.
    pub(crate) fn holding(chip: &Chip, block: Block, dtype: DType, elements: usize) -> Self {
        let mut operand = Operand::new(chip, &block, dtype, elements);
        operand.held = Some(Arc::new(block));
        operand
    }

    /// The whole block as elements of `dtype`.
    pub(crate) fn new(chip: &Chip, block: &Block, dtype: DType, elements: usize) -> Self {
        Operand {
            chip: chip.clone(),
            buffer: block.buffer.clone(),
            dtype,
            elements,
            held: None,
        }
    }

    /// f32 working memory on the same chip.
    pub(crate) fn scratch(&self, elements: usize) -> Operand {
        self.scratch_of(DType::F32, elements)
    }

    /// Working memory of any type on the same chip.
    pub(crate) fn scratch_of(&self, dtype: DType, elements: usize) -> Operand {
        let bytes = (elements * dtype.size()) as u64;
        let block = self.chip.allocate(bytes).unwrap_or_else(|e| fail(e));
        Operand::holding(&self.chip, block, dtype, elements)
    }
}

/// A table of this crate's numbers on the chip.
pub(crate) fn table<T: bytemuck::Pod>(chip: &Chip, dtype: DType, contents: &[T]) -> Operand {
    let bytes: &[u8] = bytemuck::cast_slice(contents);
    let block = chip
        .allocate(bytes.len() as u64)
        .unwrap_or_else(|e| fail(e));
    chip.write(&block, bytes);
    Operand::holding(chip, block, dtype, contents.len())
}

impl std::fmt::Debug for Operand {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}[{}] on {:?}", self.dtype, self.elements, self.chip)
    }
}

/// A scalar given to a kernel.
#[derive(Clone, Copy, Debug)]
pub enum Number {
    /// A whole number.
    U32(u32),
    /// A float.
    F32(f32),
}

impl From<usize> for Number {
    /// # Panics
    /// If the number needs more than 32 bits, as indices in WGSL do not have.
    fn from(n: usize) -> Self {
        Number::U32(u32::try_from(n).unwrap_or_else(|_| {
            panic!("{n} is more than a shader's 32 bits count; split the tensor")
        }))
    }
}

impl From<u32> for Number {
    fn from(n: u32) -> Self {
        Number::U32(n)
    }
}

impl From<f32> for Number {
    fn from(x: f32) -> Self {
        Number::F32(x)
    }
}

/// A kernel about to run. Every slot, number and constant of its interface is given by name.
#[derive(Debug)]
pub struct Launch {
    kernel: Kernel,
    face: Arc<Interface>,
    operands: Vec<Option<Operand>>,
    numbers: Vec<Option<Number>>,
    constants: Vec<Option<u32>>,
    /// Slots of which four elements are one access.
    fours: Vec<bool>,
    group: Option<u32>,
    proven: bool,
}

impl Launch {
    /// Begins a launch.
    pub fn new(kernel: &Kernel) -> Self {
        let face = interface(kernel);
        Launch {
            kernel: *kernel,
            operands: vec![None; face.slots.len()],
            numbers: vec![None; face.numbers.len()],
            constants: vec![None; face.constants.len()],
            fours: vec![false; face.slots.len()],
            group: None,
            proven: false,
            face,
        }
    }

    fn at<T>(&self, all: &[T], name: &str, of: impl Fn(&T) -> &str) -> usize {
        let at = all.iter().position(|x| of(x) == name);
        at.unwrap_or_else(|| panic!("shader '{}' has no '{name}'", self.kernel.name))
    }

    /// Puts a tensor into the slot `name`.
    pub fn operand(mut self, name: &str, operand: Operand) -> Self {
        let at = self.at(&self.face.slots, name, |s| &s.name);
        let wants = self.face.slots[at].dtype;
        assert!(
            wants.is_none_or(|d| d == operand.dtype),
            "shader '{}' wants '{name}' in {}, got {}",
            self.kernel.name,
            wants.map_or("any type", DType::name),
            operand.dtype
        );
        self.operands[at] = Some(operand);
        self
    }

    /// The slot `name` is read and written four elements at a time, from multiples of four on, if `yes`: one access then moves
    /// them.
    pub(crate) fn by_fours(mut self, name: &str, yes: bool) -> Self {
        let at = self.at(&self.face.slots, name, |s| &s.name);
        self.fours[at] = yes;
        self
    }

    /// The caller has held every index that the kernel can form against the operands' sizes, if `yes`: the driver's checks are
    /// left out.
    pub(crate) fn proven(mut self, yes: bool) -> Self {
        self.proven = yes;
        self
    }

    /// Puts a tensor into the optional slot `name`, or nothing.
    pub fn optional(self, name: &str, operand: Option<Operand>) -> Self {
        match operand {
            Some(operand) => self.operand(name, operand),
            None => self,
        }
    }

    /// Gives the number `name`.
    pub fn number(mut self, name: &str, number: impl Into<Number>) -> Self {
        let at = self.at(&self.face.numbers, name, |n| &n.name);
        let number = number.into();
        let fits = self.face.numbers[at].float == matches!(number, Number::F32(_));
        assert!(
            fits,
            "shader '{}': '{name}' is {number:?}",
            self.kernel.name
        );
        self.numbers[at] = Some(number);
        self
    }

    /// Gives the constant `name`: another one is another pipeline.
    pub fn constant(mut self, name: &str, value: u32) -> Self {
        let at = self.at(&self.face.constants, name, String::as_str);
        self.constants[at] = Some(value);
        self
    }

    /// Invocations of a group; by default what suits the adapter.
    pub fn group(mut self, invocations: u32) -> Self {
        self.group = Some(invocations);
        self
    }

    /// Runs once for each of `count` elements or rows, as the body's entry says. Nothing happens for 0.
    ///
    /// # Panics
    /// If the body is of tiles, or the launch lacks a part of its interface.
    pub fn run(self, count: usize) {
        assert!(
            !matches!(
                self.face.entry,
                Entry::Tiles | Entry::Lanes | Entry::Matrices
            ),
            "'{}' runs over tiles",
            self.kernel.name
        );
        if count == 0 {
            return;
        }
        let software = self.chip().device().is_software();
        let group = self.group.unwrap_or(match (&self.face.entry, software) {
            // One vector of a processor: its barriers cost nothing.
            (Entry::Rows, true) => 8,
            _ => 64,
        });
        let per_invocation = match self.face.entry {
            Entry::Map
                if self.operands[0]
                    .as_ref()
                    .is_some_and(|y| y.dtype.size() == 2) =>
            {
                2
            }
            _ => 1,
        };
        let groups = match self.face.entry {
            Entry::Rows => count,
            _ => count.div_ceil(group as usize * per_invocation),
        };
        // More groups than one axis carries are folded over two.
        let most = self
            .chip()
            .device()
            .limits
            .max_compute_workgroups_per_dimension as usize;
        let y = groups.div_ceil(most);
        let x = groups.div_ceil(y);
        self.dispatch(group, count, [x, y, 1]);
    }

    /// Runs `groups` groups of `group` invocations.
    ///
    /// # Panics
    /// If the launch lacks a part of its interface, or the adapter cannot run as many groups along an axis.
    pub fn run_tiles(self, group: u32, groups: [usize; 3]) {
        if groups.contains(&0) {
            return;
        }
        self.dispatch(group, 0, groups);
    }

    fn chip(&self) -> Chip {
        let given = self.operands.iter().flatten().next();
        let given = given.unwrap_or_else(|| panic!("shader '{}' has no operand", self.kernel.name));
        given.chip.clone()
    }

    /// Commands of two chips have no order between them, so a kernel's operands are of one chip.
    fn check_chips(&self, chip: &Chip) {
        for (slot, operand) in self.face.slots.iter().zip(&self.operands) {
            assert!(
                operand.as_ref().is_none_or(|o| o.chip.is(chip)),
                "shader '{}': '{}' is on another chip; send it over the mesh",
                self.kernel.name,
                slot.name
            );
        }
    }

    /// The variant of the shader that this launch needs.
    fn variant(&self, group: u32) -> Variant {
        let name = self.kernel.name;
        let results = |b: &Held| {
            let mut slots = self.face.slots.iter().zip(&self.operands);
            slots.position(|(s, o)| {
                s.written && o.as_ref().is_some_and(|o| Arc::ptr_eq(&o.buffer, b))
            })
        };
        let bound = self.face.slots.iter().zip(&self.operands).enumerate();
        let bound = bound.map(|(i, (slot, operand))| match operand {
            None => {
                assert!(slot.optional, "shader '{name}' lacks '{}'", slot.name);
                Bound::Absent
            }
            // A tensor cannot be read and written through two bindings.
            Some(operand) => match results(&operand.buffer) {
                Some(result) if result != i => Bound::Same(result),
                _ if self.fours[i] => Bound::Fours(operand.dtype),
                _ if self.face.entry == Entry::Matrices && operand.dtype == DType::F16 => {
                    Bound::Halves
                }
                _ => Bound::Own(operand.dtype),
            },
        });
        let given = |(i, c): (usize, &Option<u32>)| {
            c.unwrap_or_else(|| panic!("shader '{name}' lacks '{}'", self.face.constants[i]))
        };
        Variant {
            bound: bound.collect(),
            constants: self.constants.iter().enumerate().map(given).collect(),
            group,
            proven: self.proven,
        }
    }

    fn dispatch(self, group: u32, count: usize, groups: [usize; 3]) {
        let chip = self.chip();
        self.check_chips(&chip);
        let device = chip.device();
        let most = device.limits.max_compute_workgroups_per_dimension as usize;
        if groups.iter().any(|&g| g > most) {
            fail(Error::new(
                ErrorKind::Memory,
                format!(
                    "'{}' needs {groups:?} groups and {} runs at most {most} along an axis; split the work over more chips",
                    self.kernel.name, device.about
                ),
            ));
        }
        let variant = self.variant(group);
        let pipeline = device.pipeline(&self.kernel, &variant);
        let bytes = self.bytes(count);
        chip.note(self.kernel.name);
        chip.record(|encoder, numbers| {
            let slot = numbers.len();
            numbers.extend(&bytes);
            numbers.resize(slot + SLOT, 0);
            let mut entries = vec![wgpu::BindGroupEntry {
                binding: 0,
                resource: wgpu::BindingResource::Buffer(wgpu::BufferBinding {
                    buffer: &chip.inner().numbers,
                    offset: slot as u64,
                    size: std::num::NonZeroU64::new(SLOT as u64),
                }),
            }];
            for (i, (operand, bound)) in self.operands.iter().zip(&variant.bound).enumerate() {
                if let (Some(operand), Bound::Own(_) | Bound::Fours(_) | Bound::Halves) =
                    (operand, bound)
                {
                    entries.push(wgpu::BindGroupEntry {
                        binding: i as u32 + 1,
                        resource: operand.buffer.seen().as_entire_binding(),
                    });
                }
            }
            let bind = device.device.create_bind_group(&wgpu::BindGroupDescriptor {
                label: Some(self.kernel.name),
                layout: &pipeline.layout,
                entries: &entries,
            });
            let stamps = chip.stamps(self.kernel.name);
            let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor {
                label: Some(self.kernel.name),
                timestamp_writes: stamps.as_ref().map(|s| wgpu::ComputePassTimestampWrites {
                    query_set: &s.set,
                    beginning_of_pass_write_index: Some(s.first),
                    end_of_pass_write_index: Some(s.first + 1),
                }),
            });
            pass.set_pipeline(&pipeline.pipeline);
            pass.set_bind_group(0, &bind, &[]);
            let [x, y, z] = groups.map(|g| g as u32);
            pass.dispatch_workgroups(x, y, z);
        });
        if let Some(error) = device.failure() {
            fail(error);
        }
    }

    /// The numbers as the shader's struct lays them out.
    fn bytes(&self, count: usize) -> Vec<u8> {
        let Number::U32(count) = Number::from(count) else {
            unreachable!("counts are whole")
        };
        let mut words = vec![count, f32::INFINITY.to_bits()];
        for (number, described) in self.numbers.iter().zip(&self.face.numbers) {
            words.push(match number {
                Some(Number::U32(n)) => *n,
                Some(Number::F32(x)) => x.to_bits(),
                None => panic!("shader '{}' lacks '{}'", self.kernel.name, described.name),
            });
        }
        assert!(
            words.len() * 4 <= SLOT,
            "'{}' has {} numbers",
            self.kernel.name,
            words.len()
        );
        words.iter().flat_map(|w| w.to_ne_bytes()).collect()
    }
}

/// A launch that writes all of y, its first slot, and how many elements that has.
pub(super) fn map(kernel: &Kernel, y: Operand) -> (Launch, usize) {
    let n = y.elements;
    let name = interface(kernel).slots[0].name.clone();
    (Launch::new(kernel).operand(&name, y), n)
}
