// Merges a part's results, of queries from `first` on, into those over other keys: lse = ln(e^lse + e^part_lse) and o the mean
// weighted by either's share; a side that saw nothing counts for nothing. With o, an invocation for each element of the part's
// o; without, for each of its rows (width 1), which then stores the log-sum-exp.
// elements; reads part?: f32, part_lse: f32; writes lse: f32, o?: f32; numbers heads, width, queries, first, some
fn element(i: u32) {
    let r = i / numbers.width;
    let h = r % numbers.heads;
    let t = (r / numbers.heads) % numbers.some;
    let b = r / (numbers.heads * numbers.some);
    let row = (b * numbers.heads + h) * numbers.queries + numbers.first + t;
    let old = load_lse(row);
    let more = load_part_lse((b * numbers.heads + h) * numbers.some + t);
    let top = max(old, more);
    // Where neither saw anything 0 stands in for the maximum, so that infinities are not subtracted.
    let base = select(top, 0.0, top == -infinity());
    let kept = exponential(old - base);
    let come = exponential(more - base);
    let sum = kept + come;
    if (!has_o) {
        store_lse(row, select(base + logarithm(sum), -infinity(), sum == 0.0));
        return;
    }
    var shares = vec2<f32>(0.0);
    if (sum != 0.0) { shares = vec2<f32>(kept, come) / sum; }
    let at = ((b * numbers.queries + numbers.first + t) * numbers.heads + h) * numbers.width + i % numbers.width;
    store_o(at, fma(load_o(at), shares.x, load_part(i) * shares.y));
}
