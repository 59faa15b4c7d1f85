// y = f(x).
// map y; reads x; constants FUNCTION
fn value(i: u32) -> f32 { return activate(FUNCTION, load_x(i)); }
