// y[token, choice] = a[token] . x[slot], 0 for slots of other chips and none.
// rows; reads a, x, slots: u32; writes y: f32; numbers width, b, k, assignments, first_expert, experts, capacity, first_slot, places
fn row(r: u32, lane: u32) {
    let token = r / numbers.k;
    let slot = load_slots(r);
    let expert = slot / numbers.capacity - numbers.first_expert;
    let place = slot % numbers.capacity - numbers.first_slot;
    let here = slot != 0xffffffffu && expert < numbers.experts && place < numbers.places;
    let sequence = r / numbers.assignments;
    let there = (expert * numbers.b + sequence) * numbers.places + place;
    var sum = 0.0;
    if (here) {
        for (var j = lane; j < numbers.width; j += WG) {
            sum = fma(load_a(token * numbers.width + j), load_x(there * numbers.width + j), sum);
        }
    }
    sum = group_sum(lane, sum);
    if (lane == 0u) { store_y(r, sum); }
}
