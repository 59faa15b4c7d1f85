// One expert's slots in one sequence: its assignments in the order of the text, as many as there are places.
// elements; reads chosen: u32, order?: u32; writes slots: u32, origin: u32; numbers sequences, tokens, k, experts, capacity
fn element(i: u32) {
    let sequence = i / numbers.experts;
    let expert = i % numbers.experts;
    let first = sequence * numbers.tokens * numbers.k;
    let row = (expert * numbers.sequences + sequence) * numbers.capacity;
    var taken = 0u;
    for (var place = 0u; place < numbers.tokens; place++) {
        var token = place;
        if (has_order) { token = load_order(place); }
        for (var j = 0u; j < numbers.k; j++) {
            let at = token * numbers.k + j;
            if (load_chosen(first + at) != expert) { continue; }
            if (taken == numbers.capacity) {
                store_slots(first + at, 0xffffffffu);
            } else {
                store_slots(first + at, expert * numbers.capacity + taken);
                store_origin(row + taken, at);
                taken++;
            }
        }
    }
    for (; taken < numbers.capacity; taken++) { store_origin(row + taken, 0xffffffffu); }
}
