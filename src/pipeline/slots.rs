//! Layers shared out to the parts of a pipeline.

use crate::error::{Error, ErrorKind, Result};
use std::ops::Range;

/// The layers of each of `parts` parts. The embedding (of the first part) and the head (of the last) count as one slot each,
/// a layer as one; the slots are cut so that parts differ by at most one.
///
/// ```
/// use supernode::pipeline::layers_of_parts;
///
/// assert_eq!(layers_of_parts(6, 2)?, [0..3, 3..6]);
/// assert_eq!(layers_of_parts(5, 3)?, [0..1, 1..3, 3..5]); // with embedding and head 2, 2 and 3 slots
/// # Ok::<(), supernode::Error>(())
/// ```
///
/// # Errors
/// [`ErrorKind::Mesh`] if there are fewer slots than parts.
pub fn layers_of_parts(layers: usize, parts: usize) -> Result<Vec<Range<usize>>> {
    let slots = layers + 2;
    if parts == 0 || parts > slots && parts > 1 {
        return Err(Error::new(
            ErrorKind::Mesh,
            format!(
                "{layers} layers, with embedding and head {slots} slots, cannot be cut into {parts} parts; at most {slots} can \
                 be had"
            ),
        ));
    }
    let cut = |part: usize| (slots * part / parts).saturating_sub(1).min(layers);
    Ok((0..parts)
        .map(|part| {
            cut(part)..if part + 1 == parts {
                layers
            } else {
                cut(part + 1)
            }
        })
        .collect())
}
