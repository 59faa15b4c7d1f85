// dx = dy f'(x).
// map dx; reads x, dy; constants FUNCTION
fn value(i: u32) -> f32 { return load_dy(i) * slope(FUNCTION, load_x(i)); }
