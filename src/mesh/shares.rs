//! Uneven shares: chips along one axis that take unlike parts of what the axis cuts.

use super::{Axis, Mesh};
use crate::error::{Error, ErrorKind, Result};
use std::sync::Arc;

impl Axis {
    /// The chips' shares in lowest terms, `[3, 1]` for `dp=3:1`; none where all have the same.
    pub fn shares(&self) -> Option<&[usize]> {
        self.shares.as_deref()
    }

    /// The sum of the shares, of which each chip has its own: 4 for `dp=3:1`, 2 for `dp=2`. A length that divides by it is cut
    /// without a rest.
    pub fn units(&self) -> usize {
        match &self.shares {
            Some(shares) => shares.iter().sum(),
            None => self.size,
        }
    }

    /// How it is written behind the name: `2`, or `3:1`.
    pub(super) fn extent(&self) -> String {
        match &self.shares {
            Some(shares) => colons(shares),
            None => self.size.to_string(),
        }
    }
}

impl Mesh {
    /// The same mesh, whose chips along the axis `name` take these shares of what the axis cuts: of 8 rows, `[3, 1]` gives the
    /// first chip 6 and the second 2. See [`crate::placement::cut`].
    ///
    /// Shares are kept in lowest terms, so `[6, 2]` is `[3, 1]`, and equal ones are those of a mesh without.
    ///
    /// ```
    /// use supernode::mesh::Mesh;
    /// let mesh = Mesh::new([("dp", 2), ("tp", 2)]).with_shares("dp", &[3, 1]);
    /// assert_eq!(mesh.to_string(), "dp=3:1,tp=2");
    /// assert_eq!(Mesh::parse("dp=3:1,tp=2").unwrap(), mesh);
    /// ```
    ///
    /// # Panics
    /// If the mesh has no such axis, there is not one share for each of its chips, a share is 0, or their sum overflows.
    #[track_caller]
    pub fn with_shares(&self, name: &str, shares: &[usize]) -> Mesh {
        match self.shared(name, shares) {
            Ok(mesh) => mesh,
            Err(sentence) => panic!("{sentence}"),
        }
    }

    /// [`Mesh::with_shares`], or why not.
    pub(crate) fn shared(&self, name: &str, shares: &[usize]) -> Result<Mesh, String> {
        let Some(number) = self.axes.iter().position(|axis| axis.name == name) else {
            return Err(format!(
                "shares {} of axis '{name}', which the mesh {self} has not; name an axis of it",
                colons(shares)
            ));
        };
        let size = self.axes[number].size;
        if shares.len() != size {
            return Err(format!(
                "{} shares, {}, for the {size} chips of axis '{name}'; give one for each",
                shares.len(),
                colons(shares)
            ));
        }
        let mut axes = self.axes.to_vec();
        axes[number].shares = lowest(name, shares)?;
        Ok(Mesh { axes: axes.into() })
    }

    /// Refuses uneven shares along the axis `name`, because of what `why` says: for programs that need equal pieces.
    ///
    /// # Errors
    /// [`ErrorKind::Mesh`] if the axis has them, with the axis, the reason, and the axis that would do.
    pub fn refuse_shares(&self, name: &str, why: &str) -> Result<()> {
        match self.axis(name).filter(|a| a.shares.is_some()) {
            None => Ok(()),
            Some(axis) => Err(Error::new(
                ErrorKind::Mesh,
                format!(
                    "mesh axis {name}={} cannot have uneven shares: {why}; {name}={} would do",
                    axis.extent(),
                    axis.size
                ),
            )),
        }
    }

    /// The sum of the shares along the axis `name`, as [`Axis::units`]; 1 if the mesh has no such axis.
    pub(crate) fn units_of(&self, name: &str) -> usize {
        self.axis(name).map_or(1, Axis::units)
    }

    /// An axis as it is written: `dp=3:1`.
    pub(crate) fn written(&self, name: &str) -> String {
        format!(
            "{name}={}",
            self.axis(name).map_or("1".into(), Axis::extent)
        )
    }

    /// The same mesh with an axis under another name, and equal shares along it.
    pub(crate) fn renamed(&self, name: &str, to: &str) -> Mesh {
        let one = |axis: &Axis| match axis.name == name {
            true => Axis {
                name: to.into(),
                size: axis.size,
                shares: None,
            },
            false => axis.clone(),
        };
        Mesh {
            axes: self.axes.iter().map(one).collect(),
        }
    }
}

/// Shares in lowest terms, none if they are equal; or why they are no shares.
pub(super) fn lowest(name: &str, shares: &[usize]) -> Result<Option<Arc<[usize]>>, String> {
    if let Some(chip) = shares.iter().position(|share| *share == 0) {
        return Err(format!(
            "share {chip} of axis '{name}' is 0 in {}; every chip takes at least 1, or leave it out of the mesh",
            colons(shares)
        ));
    }
    let sum = shares.iter().try_fold(0usize, |sum, s| sum.checked_add(*s));
    if sum.is_none() {
        return Err(format!(
            "the shares {} of axis '{name}' add up to more than {}",
            colons(shares),
            usize::MAX
        ));
    }
    if shares.windows(2).all(|pair| pair[0] == pair[1]) {
        return Ok(None);
    }
    let divisor = shares.iter().copied().fold(0, common_divisor);
    Ok(Some(shares.iter().map(|s| s / divisor).collect()))
}

fn common_divisor(a: usize, b: usize) -> usize {
    match b {
        0 => a,
        _ => common_divisor(b, a % b),
    }
}

fn colons(shares: &[usize]) -> String {
    let words: Vec<String> = shares.iter().map(usize::to_string).collect();
    words.join(":")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_written_and_read() {
        for (text, printed) in [
            ("dp=3:1,tp=2", "dp=3:1,tp=2"),
            ("dp=6:2", "dp=3:1"),
            ("dp=2:1:1", "dp=2:1:1"),
            ("dp= 4 : 4 ,tp=2", "dp=2,tp=2"),
            ("a=1:2,b=5:1", "a=1:2,b=5:1"),
        ] {
            let mesh = Mesh::parse(text).unwrap();
            assert_eq!(mesh.to_string(), printed);
            let json = serde_json::to_string(&mesh).unwrap();
            assert_eq!(serde_json::from_str::<Mesh>(&json).unwrap(), mesh);
        }
        let mesh = Mesh::parse("dp=2:1:1,tp=2").unwrap();
        assert_eq!(mesh.chips(), 6);
        assert_eq!(mesh.coordinates(5).to_string(), "dp=2,tp=1");
        assert_eq!(mesh.axes()[0].shares(), Some(&[2, 1, 1][..]));
        assert_eq!((mesh.axes()[0].units(), mesh.axes()[1].units()), (4, 2));
        assert_eq!(
            mesh,
            Mesh::new([("dp", 3), ("tp", 2)]).with_shares("dp", &[4, 2, 2])
        );
        assert_ne!(mesh, Mesh::new([("dp", 3), ("tp", 2)]));
        assert_eq!(
            mesh.with_shares("dp", &[7, 7, 7]),
            Mesh::new([("dp", 3), ("tp", 2)])
        );
    }

    #[test]
    fn shares_that_are_none_are_told() {
        for (text, part) in [
            ("dp=3:0", "share 1 of axis 'dp' is 0 in 3:0"),
            ("dp=3:", "'3:' is no number of chips"),
            ("dp=3:x", "'3:x' is no number of chips"),
            ("dp=:", "no number of chips"),
            ("dp=18446744073709551615:1", "add up to more than"),
        ] {
            let error = Mesh::parse(text).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Mesh);
            assert!(error.to_string().contains(part), "{text}: {error}");
        }
        let mesh = Mesh::new([("dp", 2)]);
        let why = mesh.shared("dp", &[1, 2, 3]).unwrap_err();
        assert!(
            why.contains("3 shares, 1:2:3, for the 2 chips of axis 'dp'"),
            "{why}"
        );
        let why = mesh.shared("tp", &[1, 2]).unwrap_err();
        assert!(why.contains("the mesh dp=2 has not"), "{why}");
    }
}
