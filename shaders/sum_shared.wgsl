// dshared[token] = sum over its heads, in order, of what lies behind their own elements in dy.
// map dshared; reads dy; numbers heads, own, rest
fn value(i: u32) -> f32 {
    let width = numbers.own + numbers.rest;
    let token = i / numbers.rest;
    var sum = 0.0;
    for (var head = 0u; head < numbers.heads; head++) {
        sum += load_dy((token * numbers.heads + head) * width + numbers.own + i % numbers.rest);
    }
    return sum;
}
