// parts[p, j] = sum over the rows of part p of x[i, j], one chain in row order; part p holds `length` rows. The rows of the last
// pass, over parts, are one part, and ADD resumes from what is there.
// map parts; reads x; numbers width, rows, length; constants ADD
fn value(i: u32) -> f32 {
    let column = i % numbers.width;
    let first = (i / numbers.width) * numbers.length;
    var sum = 0.0;
    if (ADD == 1u) { sum = load_parts(i); }
    let end = min(first + numbers.length, numbers.rows);
    for (var row = first; row < end; row++) { sum += load_x(row * numbers.width + column); }
    return sum;
}
