// y = 1 where a label is not ignored, else 0.
// map y: f32; reads labels: u32; numbers ignored
fn value(i: u32) -> f32 { return select(1.0, 0.0, load_labels(i) == numbers.ignored); }
