// c = f(sum of the parts of k in their order + bias); with ADD the sum begins from c. z takes it before f.
// map c; reads parts: f32, bias?; writes z?; numbers n, parts_count, part; constants ADD, FUNCTION
fn value(i: u32) -> f32 {
    var sum = 0.0;
    if (ADD == 1u) { sum = load_c(i); }
    for (var p = 0u; p < numbers.parts_count; p++) { sum += load_parts(p * numbers.part + i); }
    if (has_bias) { sum += load_bias(i % numbers.n); }
    store_z(i, sum);
    return activate(FUNCTION, sum);
}
