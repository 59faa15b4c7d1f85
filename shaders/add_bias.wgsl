// y[i, j] = x[i, j] + bias[j].
// map y; reads x, bias; numbers width
fn value(i: u32) -> f32 { return load_x(i) + load_bias(i % numbers.width); }
