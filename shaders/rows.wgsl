// Sums and maxima over the invocations of a group, by a fixed tree.

var<workgroup> lanes: array<f32, WG>;

fn group_sum(lane: u32, x: f32) -> f32 {
    lanes[lane] = x;
    workgroupBarrier();
    for (var stride = WG / 2u; stride > 0u; stride = stride / 2u) {
        if (lane < stride) { lanes[lane] = lanes[lane] + lanes[lane + stride]; }
        workgroupBarrier();
    }
    let total = lanes[0];
    workgroupBarrier();
    return total;
}

fn group_max(lane: u32, x: f32) -> f32 {
    lanes[lane] = x;
    workgroupBarrier();
    for (var stride = WG / 2u; stride > 0u; stride = stride / 2u) {
        if (lane < stride) { lanes[lane] = larger(lanes[lane], lanes[lane + stride]); }
        workgroupBarrier();
    }
    let greatest = lanes[0];
    workgroupBarrier();
    return greatest;
}
