// y = factor s x, where s is a number on the device, 1 if it is not given.
// map y; reads x, s?: f32; numbers factor: f32
fn value(i: u32) -> f32 {
    var s = numbers.factor;
    if (has_s) { s = s * load_s(0u); }
    return s * load_x(i);
}
