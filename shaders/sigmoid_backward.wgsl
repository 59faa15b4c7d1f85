// dx = dy y (1 - y).
// map dx; reads y, dy
fn value(i: u32) -> f32 {
    let y = load_y(i);
    return load_dy(i) * fma(-y, y, y);
}
