// dscore of a chosen expert: scale dw, or scale (dw - sum of dw score / sum) / sum; 0 elsewhere.
// map dscores; reads scores: f32, chosen: u32, dweights: f32; numbers experts, k, scale: f32, least: f32; constants NORMALIZE
fn value(i: u32) -> f32 {
    let r = i / numbers.experts;
    let e = i % numbers.experts;
    var at = numbers.k;
    var sum = 0.0;
    for (var j = 0u; j < numbers.k; j++) {
        let expert = load_chosen(r * numbers.k + j);
        if (expert == e) { at = j; }
        sum += load_scores(r * numbers.experts + expert);
    }
    if (at == numbers.k) { return 0.0; }
    let dw = load_dweights(r * numbers.k + at);
    if (NORMALIZE == 0u) { return numbers.scale * dw; }
    sum += numbers.least;
    var mean = 0.0;
    for (var j = 0u; j < numbers.k; j++) {
        let score = load_scores(r * numbers.experts + load_chosen(r * numbers.k + j));
        mean += load_dweights(r * numbers.k + j) * (score / sum);
    }
    return numbers.scale / sum * (dw - mean);
}
