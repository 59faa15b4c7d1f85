// load[0, e] = how many assignments name expert e; load[1, e] = how many of them are beyond a sequence's capacity.
// map load; reads chosen: u32; numbers sequences, tokens, k, experts, capacity
fn value(i: u32) -> f32 {
    let expert = i % numbers.experts;
    let each = numbers.tokens * numbers.k;
    var asked = 0u;
    var dropped = 0u;
    for (var sequence = 0u; sequence < numbers.sequences; sequence++) {
        var count = 0u;
        for (var at = 0u; at < each; at++) {
            if (load_chosen(sequence * each + at) == expert) { count++; }
        }
        asked += count;
        dropped += max(count, numbers.capacity) - numbers.capacity;
    }
    return f32(select(asked, dropped, i >= numbers.experts));
}
