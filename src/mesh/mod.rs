//! Named axes of chips: how ranks become coordinates and groups.
//!
//! A mesh is a box of chips whose sides have names: `dp=2,tp=2` is four chips. Ranks are row-major: the last axis
//! varies fastest, so neighbours along the last axis are neighbours in rank and belong on the fastest links.
//! Everything here is arithmetic on strides; nothing grows with the number of chips, since a ghost mesh may have
//! half a million.

mod group;
mod shares;

pub use group::Group;

use crate::error::{Error, ErrorKind, Result};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::sync::Arc;

/// One side of a [`Mesh`]: a name, how many chips lie along it, and which share each has of what the axis cuts.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Axis {
    name: String,
    size: usize,
    /// In lowest terms, one for each chip; none where they are equal.
    shares: Option<Arc<[usize]>>,
}

impl Axis {
    /// The name, such as `dp` or `tp`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Chips along the axis, at least 1.
    pub fn size(&self) -> usize {
        self.size
    }
}

/// A box of chips with named sides. Cloning is cheap.
///
/// It prints as `dp=2,tp=2`, parses from that form, and is stored as that string; the mesh of one chip without
/// axes is `single`. Chips that take unlike shares along an axis are written with colons, `dp=3:1,tp=2`: see
/// [`Mesh::with_shares`].
///
/// ```
/// use supernode::mesh::Mesh;
/// let mesh = Mesh::new([("dp", 2), ("tp", 4)]);
/// assert_eq!(mesh.chips(), 8);
/// assert_eq!(mesh.coordinates(6).to_string(), "dp=1,tp=2");
/// assert_eq!(mesh.group(6, "tp").ranks().collect::<Vec<_>>(), [4, 5, 6, 7]);
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Mesh {
    axes: Arc<[Axis]>,
}

/// What [`Mesh::single`] prints as: a mesh without axes needs a word, or a trace would show nothing.
const SINGLE: &str = "single";

impl Mesh {
    /// A mesh of the given axes, outermost first.
    ///
    /// Panics if a name is empty, occurs twice, or holds `=`, `,` or a blank; if a size is 0; or if the number of
    /// chips overflows.
    #[track_caller]
    pub fn new<N: Into<String>>(axes: impl IntoIterator<Item = (N, usize)>) -> Self {
        let axes = axes.into_iter().map(|(name, size)| Axis {
            name: name.into(),
            size,
            shares: None,
        });
        match Self::checked(axes.collect()) {
            Ok(mesh) => mesh,
            Err(sentence) => panic!("{sentence}"),
        }
    }

    /// The mesh of one chip, without axes.
    pub fn single() -> Self {
        Mesh { axes: [].into() }
    }

    /// Reads `dp=2,tp=2`, `dp=3:1,tp=2` for two chips along `dp` of which the first takes three quarters, or `single` for one chip
    /// without axes. Blanks around names and numbers are ignored.
    pub fn parse(text: &str) -> Result<Self> {
        let wrong = |sentence: String| Error::new(ErrorKind::Mesh, sentence);
        if text.trim() == SINGLE {
            return Ok(Self::single());
        }
        if text.trim().is_empty() {
            return Err(wrong(
                "the mesh is empty; write axes with their sizes, such as dp=2,tp=2, or single for one chip".into(),
            ));
        }
        let mut axes = Vec::new();
        for part in text.split(',') {
            let Some((name, size)) = part.split_once('=') else {
                return Err(wrong(format!(
                    "mesh '{text}': '{part}' is no axis; write name=size, such as dp=2"
                )));
            };
            let (name, numbers) = (name.trim(), size.split(':').map(|n| n.trim().parse()));
            let numbers: Vec<usize> = numbers.collect::<Result<_, _>>().map_err(|_| {
                wrong(format!(
                    "mesh '{text}': '{}' is no number of chips for axis '{name}'; write a whole number from 1, or each chip's \
                     share, such as 3:1",
                    size.trim()
                ))
            })?;
            let (size, shares) = match numbers[..] {
                [size] => (size, None),
                _ => {
                    let shares = shares::lowest(name, &numbers);
                    let shares = shares.map_err(|why| wrong(format!("mesh '{text}': {why}")))?;
                    (numbers.len(), shares)
                }
            };
            let name = name.to_string();
            axes.push(Axis { name, size, shares });
        }
        Self::checked(axes).map_err(|sentence| wrong(format!("mesh '{text}': {sentence}")))
    }

    fn checked(axes: Vec<Axis>) -> Result<Self, String> {
        let mut chips = 1usize;
        for (i, Axis { name, size, .. }) in axes.iter().enumerate() {
            if name.is_empty() {
                return Err(format!("axis {i} has no name; give it one, such as dp"));
            }
            if name.contains(|c: char| c == '=' || c == ',' || c.is_whitespace()) {
                return Err(format!(
                    "axis name '{name}' holds '=', ',' or a blank; use letters and digits"
                ));
            }
            if axes[..i].iter().any(|other| other.name == *name) {
                return Err(format!(
                    "axis '{name}' is there twice; every axis needs its own name"
                ));
            }
            if *size == 0 {
                return Err(format!(
                    "axis '{name}' has size 0; an axis has at least 1 chip"
                ));
            }
            chips = chips.checked_mul(*size).ok_or_else(|| {
                format!(
                    "the axes up to '{name}' have more than {} chips",
                    usize::MAX
                )
            })?;
        }
        Ok(Mesh { axes: axes.into() })
    }

    /// The axes, outermost first.
    pub fn axes(&self) -> &[Axis] {
        &self.axes
    }

    /// The position of the axis called `name`. Panics with the names that there are if it is not one of them.
    #[track_caller]
    pub fn axis_index(&self, name: &str) -> usize {
        match self.axes.iter().position(|axis| axis.name == name) {
            Some(index) => index,
            None => panic!("the mesh has no axis '{name}'; its axes are {self}"),
        }
    }

    /// The axis called `name`, if there is one.
    pub fn axis(&self, name: &str) -> Option<&Axis> {
        self.axes.iter().find(|axis| axis.name == name)
    }

    /// True if an axis is called `name`.
    pub fn has(&self, name: &str) -> bool {
        self.axis(name).is_some()
    }

    /// Chips along the axis called `name`; 1 if the mesh has no such axis, so that a program written for `tp` runs
    /// on a mesh without it.
    pub fn size_of(&self, name: &str) -> usize {
        self.axis(name).map_or(1, Axis::size)
    }

    /// The number of chips: the product of the sizes.
    pub fn chips(&self) -> usize {
        self.axes.iter().map(Axis::size).product()
    }

    /// How far apart in rank neighbours along axis number `axis` are.
    fn stride(&self, axis: usize) -> usize {
        self.axes[axis + 1..].iter().map(Axis::size).product()
    }

    /// Where chip `rank` lies. Panics if the mesh has no such rank.
    #[track_caller]
    pub fn coordinates(&self, rank: usize) -> Coordinates {
        self.check(rank);
        let mut rest = rank;
        let mut index = vec![0; self.axes.len()];
        for (i, axis) in self.axes.iter().enumerate().rev() {
            index[i] = rest % axis.size;
            rest /= axis.size;
        }
        Coordinates {
            mesh: self.clone(),
            index,
        }
    }

    /// The rank at the given coordinates, one per axis: the inverse of [`Mesh::coordinates`]. Panics if there are
    /// more or fewer coordinates than axes, or one lies outside its axis.
    #[track_caller]
    pub fn rank_at(&self, coordinates: &[usize]) -> usize {
        assert_eq!(
            coordinates.len(),
            self.axes.len(),
            "coordinates {coordinates:?} for the mesh {self}: one per axis, please"
        );
        self.axes
            .iter()
            .zip(coordinates)
            .fold(0, |rank, (axis, &coordinate)| {
                assert!(
                    coordinate < axis.size,
                    "coordinate {coordinate} on axis '{}' of size {}",
                    axis.name,
                    axis.size
                );
                rank * axis.size + coordinate
            })
    }

    /// The chips that differ from `rank` only along the axis called `axis`, `rank` among them.
    ///
    /// Panics if the mesh has no such rank or axis.
    #[track_caller]
    pub fn group(&self, rank: usize, axis: &str) -> Group {
        let axis = self.axis_index(axis);
        self.group_along(rank, axis)
    }

    /// [`Mesh::group`] with the axis given by its position. Panics if the mesh has no such rank or axis.
    #[track_caller]
    pub fn group_along(&self, rank: usize, axis: usize) -> Group {
        self.check(rank);
        Group::around(rank, self.stride(axis), self.axes[axis].size)
    }

    /// The rank `offset` chips further along `axis`, cyclic: -1 is the chip before, and beyond the last is the
    /// first. Panics if the mesh has no such rank or axis.
    #[track_caller]
    pub fn peer(&self, rank: usize, axis: &str, offset: isize) -> usize {
        self.group(rank, axis).peer(offset)
    }

    #[track_caller]
    fn check(&self, rank: usize) {
        let chips = self.chips();
        assert!(
            rank < chips,
            "rank {rank} on the mesh {self} of {chips} chips"
        );
    }
}

impl fmt::Display for Mesh {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        pairs(f, &self.axes, self.axes.iter().map(Axis::extent))
    }
}

impl std::str::FromStr for Mesh {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Mesh::parse(text)
    }
}

impl TryFrom<String> for Mesh {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        Mesh::parse(&text)
    }
}

impl From<Mesh> for String {
    fn from(mesh: Mesh) -> String {
        mesh.to_string()
    }
}

/// Where a chip lies: one index per axis of its mesh, which it reads as through a slice. Prints as `dp=1,tp=0`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Coordinates {
    mesh: Mesh,
    index: Vec<usize>,
}

impl Coordinates {
    /// The index along the axis called `name`; 0 if the mesh has no such axis, as [`Mesh::size_of`] is 1 there.
    pub fn along(&self, name: &str) -> usize {
        let axis = self.mesh.axes.iter().position(|axis| axis.name == name);
        axis.map_or(0, |axis| self.index[axis])
    }
}

impl std::ops::Deref for Coordinates {
    type Target = [usize];

    fn deref(&self) -> &[usize] {
        &self.index
    }
}

impl fmt::Display for Coordinates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        pairs(f, &self.mesh.axes, self.index.iter().copied())
    }
}

/// Writes `name=number` pairs with commas between, or the word for no axes.
fn pairs(
    f: &mut fmt::Formatter<'_>,
    axes: &[Axis],
    numbers: impl Iterator<Item = impl fmt::Display>,
) -> fmt::Result {
    if axes.is_empty() {
        return f.pad(SINGLE);
    }
    let text: Vec<String> = axes
        .iter()
        .zip(numbers)
        .map(|(axis, number)| format!("{}={number}", axis.name))
        .collect();
    f.pad(&text.join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_are_row_major() {
        let mesh = Mesh::new([("dp", 2), ("tp", 3), ("pp", 4)]);
        assert_eq!(mesh.chips(), 24);
        assert_eq!(*mesh.coordinates(0), [0, 0, 0]);
        assert_eq!(*mesh.coordinates(1), [0, 0, 1]);
        assert_eq!(*mesh.coordinates(17), [1, 1, 1]);
        for rank in 0..24 {
            assert_eq!(mesh.rank_at(&mesh.coordinates(rank)), rank);
        }
        assert_eq!(mesh.coordinates(17).along("tp"), 1);
        assert_eq!(mesh.coordinates(17).along("ep"), 0);
        assert_eq!((mesh.size_of("tp"), mesh.size_of("ep")), (3, 1));
        assert!(mesh.has("pp") && !mesh.has("ep"));
    }

    #[test]
    fn half_a_million_chips_cost_nothing() {
        let mesh = Mesh::new([("dp", 8192), ("tp", 64)]);
        assert_eq!(mesh.chips(), 524_288);
        let group = mesh.group(524_287, "dp");
        assert_eq!(
            (group.start(), group.stride(), group.size()),
            (63, 64, 8192)
        );
        assert_eq!(group.peer(1), 63);
    }

    #[test]
    fn text_round_trips() {
        for text in ["dp=2,tp=2", "single", "tp=8"] {
            let mesh: Mesh = text.parse().unwrap();
            assert_eq!(mesh.to_string(), text);
            let json = serde_json::to_string(&mesh).unwrap();
            assert_eq!(json, format!("\"{text}\""));
            assert_eq!(serde_json::from_str::<Mesh>(&json).unwrap(), mesh);
        }
        assert_eq!(
            Mesh::parse(" dp = 2 , tp=3 ").unwrap().to_string(),
            "dp=2,tp=3"
        );
        assert_eq!(Mesh::single().chips(), 1);
        assert_eq!(Mesh::single().coordinates(0).to_string(), "single");
        assert!(serde_json::from_str::<Mesh>("\"dp=0\"").is_err());
    }

    #[test]
    fn bad_text_says_what_is_wrong() {
        for (text, part) in [
            ("", "is empty"),
            ("dp", "'dp' is no axis"),
            ("dp=2,", "'' is no axis"),
            ("dp=x", "'x' is no number"),
            ("dp=-1", "'-1' is no number"),
            ("dp=0", "size 0"),
            ("=2", "no name"),
            ("dp=2,dp=2", "twice"),
            ("d p=2", "a blank"),
            ("a=9999999999,b=9999999999", "more than"),
        ] {
            let error = Mesh::parse(text).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Mesh);
            assert!(error.to_string().contains(part), "{text}: {error}");
        }
    }

    #[test]
    #[should_panic(expected = "no axis 'pp'; its axes are dp=2,tp=2")]
    fn an_unknown_axis_names_the_others() {
        Mesh::new([("dp", 2), ("tp", 2)]).axis_index("pp");
    }

    #[test]
    #[should_panic(expected = "axis 'dp' is there twice")]
    fn duplicate_names_panic() {
        Mesh::new([("dp", 2), ("dp", 2)]);
    }

    #[test]
    #[should_panic(expected = "rank 4 on the mesh dp=2,tp=2 of 4 chips")]
    fn a_rank_outside_panics() {
        Mesh::new([("dp", 2), ("tp", 2)]).coordinates(4);
    }
}
