// sum[r] = sum over visible columns of e^(x - max[r]); target[r] = the logit of labels[r] if this chip's columns hold it, else 0.
// rows; reads x, max: f32, labels: u32; writes sum: f32, target_logit: f32; numbers width, visible, first
fn row(r: u32, lane: u32) {
    let begin = r * numbers.width;
    let m = load_max(r);
    var sum = 0.0;
    for (var j = lane; j < numbers.visible; j += WG) { sum += exponential(load_x(begin + j) - m); }
    sum = group_sum(lane, sum);
    if (lane == 0u) {
        store_sum(r, sum);
        let label = load_labels(r) - numbers.first;
        var logit = 0.0;
        if (label < numbers.visible) { logit = load_x(begin + label); }
        store_target_logit(r, logit);
    }
}
