// slopes[b, e] = experts f / tokens, f the share of the sequence's assignments that name the expert.
// map slopes; reads chosen: u32; numbers tokens, k, experts
fn value(i: u32) -> f32 {
    let each = numbers.tokens * numbers.k;
    let first = i / numbers.experts * each;
    var count = 0u;
    for (var at = 0u; at < each; at++) {
        if (load_chosen(first + at) == i % numbers.experts) { count++; }
    }
    return f32(count) * (f32(numbers.experts) / f32(each * numbers.tokens));
}
