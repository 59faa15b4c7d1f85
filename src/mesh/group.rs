//! The chips along one axis of a mesh.

/// The chips along one axis, seen from one of them: `start, start + stride, ...`, `size` of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Group {
    start: usize,
    stride: usize,
    size: usize,
    index: usize,
    /// The last member is the first.
    reversed: bool,
}

impl Group {
    /// The `size` chips, `stride` ranks apart, among which `rank` is.
    pub(super) fn around(rank: usize, stride: usize, size: usize) -> Group {
        let index = rank / stride % size;
        Group {
            start: rank - index * stride,
            stride,
            size,
            index,
            reversed: false,
        }
    }

    /// The lowest rank of a member.
    pub fn start(&self) -> usize {
        self.start
    }

    /// Ranks between one member and the next, in either order.
    pub fn stride(&self) -> usize {
        self.stride
    }

    /// The same members in the opposite order: what goes to the next of them goes to the one before.
    pub fn reversed(&self) -> Group {
        Group {
            index: self.size - 1 - self.index,
            reversed: !self.reversed,
            ..*self
        }
    }

    /// Place of member `index` among the ranks.
    fn place(&self, index: usize) -> usize {
        match self.reversed {
            true => self.size - 1 - index,
            false => index,
        }
    }

    /// Number of members, at least 1.
    pub fn size(&self) -> usize {
        self.size
    }

    /// The position of the chip that asked, `0..size`.
    pub fn index(&self) -> usize {
        self.index
    }

    /// Rank of member `index`. Panics if there is no such member.
    #[track_caller]
    pub fn rank(&self, index: usize) -> usize {
        assert!(
            index < self.size,
            "member {index} of a group of {}",
            self.size
        );
        self.start + self.place(index) * self.stride
    }

    /// The members' ranks in order.
    pub fn ranks(&self) -> impl ExactSizeIterator<Item = usize> + DoubleEndedIterator + Clone {
        let group = *self;
        (0..group.size).map(move |index| group.start + group.place(index) * group.stride)
    }

    /// The members that lie with the chip that asked in one block of `size` neighbours. Panics unless `size` divides the group.
    #[track_caller]
    pub fn block(&self, size: usize) -> Group {
        self.check_part(size);
        let index = self.index % size;
        let first = self.index - index;
        Group {
            // The lowest rank is the last member's where the order is the opposite one.
            start: self.rank(first).min(self.rank(first + size - 1)),
            stride: self.stride,
            size,
            index,
            reversed: self.reversed,
        }
    }

    /// The members at the same place as the chip that asked in the blocks of `size` neighbours. Panics unless `size` divides
    /// the group.
    #[track_caller]
    pub fn across(&self, size: usize) -> Group {
        self.check_part(size);
        let (first, last) = (self.index % size, self.size - size + self.index % size);
        Group {
            start: self.rank(first).min(self.rank(last)),
            stride: self.stride * size,
            size: self.size / size,
            index: self.index / size,
            reversed: self.reversed,
        }
    }

    #[track_caller]
    fn check_part(&self, size: usize) {
        assert!(
            size > 0 && self.size.is_multiple_of(size),
            "blocks of {size} in a group of {}",
            self.size
        );
    }

    /// Rank of the member `offset` places further on, cyclic.
    pub fn peer(&self, offset: isize) -> usize {
        let size = self.size as i128;
        let index = (self.index as i128 + offset as i128).rem_euclid(size);
        self.start + self.place(index as usize) * self.stride
    }
}

#[cfg(test)]
mod tests {
    use crate::mesh::Mesh;

    #[test]
    fn groups_partition_the_mesh() {
        let mesh = Mesh::new([("dp", 2), ("tp", 3), ("pp", 4)]);
        for (axis, name) in [(0, "dp"), (1, "tp"), (2, "pp")] {
            for rank in 0..24 {
                let group = mesh.group(rank, name);
                let here = mesh.coordinates(rank);
                let expected: Vec<usize> = (0..24)
                    .filter(|&other| {
                        let there = mesh.coordinates(other);
                        (0..3).all(|i| i == axis || there[i] == here[i])
                    })
                    .collect();
                assert_eq!(group.ranks().collect::<Vec<_>>(), expected);
                assert_eq!(group.rank(group.index()), rank);
                assert_eq!(group.index(), here[axis]);
                assert_eq!(group, mesh.group_along(rank, axis));
            }
        }
    }

    #[test]
    fn a_reversed_group_has_the_same_members_in_the_opposite_order() {
        let mesh = Mesh::new([("dp", 2), ("tp", 6), ("pp", 4)]);
        for rank in 0..48 {
            let group = mesh.group(rank, "tp");
            for group in [group, group.block(3), group.across(2)] {
                let back = group.reversed();
                let mut ranks: Vec<usize> = group.ranks().collect();
                ranks.reverse();
                assert_eq!(back.ranks().collect::<Vec<_>>(), ranks);
                assert_eq!(back.rank(back.index()), rank);
                assert_eq!(back.peer(1), group.peer(-1));
                assert_eq!(back.start(), group.start());
                assert_eq!(back.reversed(), group);
            }
            for part in [group.reversed().block(2), group.reversed().across(3)] {
                assert_eq!(part.rank(part.index()), rank);
                assert!(part.ranks().rev().is_sorted());
            }
        }
    }

    #[test]
    fn peers_are_cyclic() {
        let mesh = Mesh::new([("dp", 2), ("tp", 3)]);
        assert_eq!(mesh.peer(3, "tp", 1), 4);
        assert_eq!(mesh.peer(3, "tp", -1), 5);
        assert_eq!(mesh.peer(3, "tp", -7), 5);
        assert_eq!(mesh.peer(3, "dp", 5), 0);
        assert_eq!(mesh.peer(3, "tp", isize::MIN), {
            let steps = (isize::MIN as i128).rem_euclid(3) as usize;
            3 + steps
        });
    }

    #[test]
    fn groups_have_blocks_and_rows_across_them() {
        let mesh = Mesh::new([("cp", 6), ("tp", 2)]);
        let group = mesh.group(9, "cp");
        assert_eq!((group.index(), group.rank(4)), (4, 9));
        let (block, across) = (group.block(2), group.across(2));
        assert_eq!(
            (block.ranks().collect::<Vec<_>>(), block.index()),
            (vec![9, 11], 0)
        );
        assert_eq!(
            (across.ranks().collect::<Vec<_>>(), across.index()),
            (vec![1, 5, 9], 2)
        );
    }
}
