// y = a + b; with a aliased to y, y += b.
// map y; reads a, b
fn value(i: u32) -> f32 { return load_a(i) + load_b(i); }
