// What a product begins from and ends in. Four columns are one vector; columns beyond the edge are computed and not stored.

fn start(first: u32, row: u32, column: u32) -> vec4<f32> {
    if (ADD == 0u || row >= numbers.m || column >= numbers.n) { return vec4<f32>(0.0); }
    let at = first + row * numbers.n + column;
    if (WIDE == 1u) { return load4_c(at); }
    let last = numbers.n - 1u - column;
    return vec4<f32>(load_c(at), load_c(at + min(1u, last)), load_c(at + min(2u, last)), load_c(at + min(3u, last)));
}

fn activate4(x: vec4<f32>) -> vec4<f32> {
    if (FUNCTION == IDENTITY) { return x; }
    return vec4<f32>(activate(FUNCTION, x.x), activate(FUNCTION, x.y), activate(FUNCTION, x.z), activate(FUNCTION, x.w));
}

fn finish(first: u32, row: u32, column: u32, total: vec4<f32>) {
    if (row >= numbers.m || column >= numbers.n) { return; }
    let at = first + row * numbers.n + column;
    var sum = total;
    if (WIDE == 1u) {
        if (has_bias) { sum += load4_bias(column); }
        store4_z(at, sum);
        store4_c(at, activate4(sum));
        return;
    }
    let count = min(numbers.n - column, 4u);
    for (var x = 0u; x < count; x++) {
        var one = sum[x];
        if (has_bias) { one += load_bias(column + x); }
        store_z(at + x, one);
        store_c(at + x, activate(FUNCTION, one));
    }
}
