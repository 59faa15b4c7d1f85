// loss = max + ln(sum) - target, 0 for an ignored label.
// map loss: f32; reads max: f32, sum: f32, target_logit: f32, labels: u32; numbers ignored
fn value(i: u32) -> f32 {
    if (load_labels(i) == numbers.ignored) { return 0.0; }
    return logarithm(load_sum(i)) + (load_max(i) - load_target_logit(i));
}
