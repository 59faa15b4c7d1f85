// Joins results over parts of the keys, in the order of the keys: lse = ln(sum e^lse of the parts) and o the mean weighted by each
// part's share; a part in which a query sees nothing counts for nothing. With o, an invocation for each of its elements; without,
// for each row (width 1), which stores the log-sum-exp.
// elements; reads part?: f32, part_lse: f32; writes o?, lse: f32; numbers heads, queries, width, rows, parts
fn element(i: u32) {
    let r = i / numbers.width;
    let h = r % numbers.heads;
    let t = (r / numbers.heads) % numbers.queries;
    let b = r / (numbers.heads * numbers.queries);
    let row = (b * numbers.heads + h) * numbers.queries + t;
    var top = -infinity();
    for (var p = 0u; p < numbers.parts; p++) { top = max(top, load_part_lse(p * numbers.rows + row)); }
    // Where no part saw anything 0 stands in for the maximum, so that infinities are not subtracted.
    let base = select(top, 0.0, top == -infinity());
    var sum = 0.0;
    var x = 0.0;
    for (var p = 0u; p < numbers.parts; p++) {
        let weight = exponential(load_part_lse(p * numbers.rows + row) - base);
        sum += weight;
        if (has_o) { x = fma(weight, load_part(p * numbers.rows * numbers.width + i), x); }
    }
    if (has_o) {
        store_o(i, select(x / sum, 0.0, sum == 0.0));
        return;
    }
    store_lse(row, select(base + logarithm(sum), -infinity(), sum == 0.0));
}
