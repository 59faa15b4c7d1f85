// y = a / b, numbers on the device.
// map y: f32; reads a: f32, b: f32
fn value(i: u32) -> f32 { return load_a(i) / load_b(i); }
