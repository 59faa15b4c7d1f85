// parts[p, j] = sum over the rows of part p of dy[i, j] (x[i, j] - mean[i]) rstd[i]; see column_sum.
// map parts: f32; reads x, dy, mean?: f32, rstd: f32; numbers width, rows, length
fn value(i: u32) -> f32 {
    let column = i % numbers.width;
    let first = (i / numbers.width) * numbers.length;
    var sum = 0.0;
    let end = min(first + numbers.length, numbers.rows);
    for (var row = first; row < end; row++) {
        var x = load_x(row * numbers.width + column);
        if (has_mean) { x -= load_mean(row); }
        sum = fma(load_dy(row * numbers.width + column), x * load_rstd(row), sum);
    }
    return sum;
}
