// bias += rate sign(mean - load).
// map bias; reads load: f32; numbers rate: f32, mean: f32
fn value(i: u32) -> f32 {
    let error = numbers.mean - load_load(i);
    return load_bias(i) + numbers.rate * sign(error);
}
