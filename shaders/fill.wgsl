// y = value everywhere, or the number s on the device.
// map y; reads s?: f32; numbers value: f32
fn value(i: u32) -> f32 {
    if (has_s) { return load_s(0u); }
    return numbers.value;
}
