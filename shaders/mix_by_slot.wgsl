// y[token] = sum over its choices, in order, of weight x[slot]; slots of other chips and none add nothing.
// map y; reads x, slots: u32, weights?: f32; numbers width, b, k, assignments, first_expert, experts, capacity, first_slot, places
fn value(i: u32) -> f32 {
    let token = i / numbers.width;
    let sequence = token * numbers.k / numbers.assignments;
    var sum = 0.0;
    for (var j = 0u; j < numbers.k; j++) {
        let slot = load_slots(token * numbers.k + j);
        if (slot == 0xffffffffu) { continue; }
        // What lies before the chip's part wraps around to beyond it.
        let expert = slot / numbers.capacity - numbers.first_expert;
        let place = slot % numbers.capacity - numbers.first_slot;
        if (expert >= numbers.experts || place >= numbers.places) { continue; }
        let row = (expert * numbers.b + sequence) * numbers.places + place;
        var weight = 1.0;
        if (has_weights) { weight = load_weights(token * numbers.k + j); }
        sum = fma(weight, load_x(row * numbers.width + i % numbers.width), sum);
    }
    return sum;
}
