// y = 1 / (1 + e^-x).
// map y; reads x
fn value(i: u32) -> f32 { return sigmoid(load_x(i)); }
