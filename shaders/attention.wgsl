// o = softmax(mask(logit(q k^T))) v and its log-sum-exp: an invocation for each query row, online over ascending keys. The sums
// are scaled only when a larger logit comes: about ln(keys) times. Keys that a query cannot see are never read. Where rows are too few
// to keep a card busy, an invocation takes one part of `span` keys, and results stand part by part: see attention_join.
// elements; reads q, k, v, of_queries?: u32, of_keys?: u32, offsets?: u32; writes o, lse: f32; numbers heads, kv_heads, queries, keys, head_dim, offset, causal, window, scale: f32, cap: f32, rows, span; constants D
#include attention_sees
fn element(n: u32) {
    let i = n % numbers.rows;
    let part = n / numbers.rows;
    let t = i % numbers.queries;
    let h = (i / numbers.queries) % numbers.heads;
    let b = i / (numbers.queries * numbers.heads);
    offset = numbers.offset;
    if (has_offsets) { offset = load_offsets(b); }
    let g = h / (numbers.heads / numbers.kv_heads);
    let q_at = ((b * numbers.queries + t) * numbers.heads + h) * D;
#unroll d D
    let q@d = load_q(q_at + @du);
    var o@d = 0.0;
#end
    var m = -infinity();
    var sum = 0.0;
    let begin = max(first_key(t), part * numbers.span);
    let end = min(end_of_keys(t), (part + 1u) * numbers.span);
    for (var s = begin; s < end; s++) {
        if (!same_document(b, t, s)) { continue; }
        let at = ((b * numbers.keys + s) * numbers.kv_heads + g) * D;
        var dot = 0.0;
#unroll d D
        dot = fma(q@d, load_k(at + @du), dot);
#end
        let l = logit(dot);
        if (l > m || is_nan(l)) {
            let down = exponential(m - l);
            sum = sum * down;
#unroll d D
            o@d = o@d * down;
#end
            m = l;
        }
        let p = exponential(l - m);
        sum += p;
#unroll d D
        o@d = fma(p, load_v(at + @du), o@d);
#end
    }
    var share = 0.0;
    if (sum != 0.0) { share = 1.0 / sum; }
#unroll d D
    store_o(part * numbers.rows * D + q_at + @du, o@d * share);
#end
    store_lse(n, select(m + logarithm(sum), -infinity(), sum == 0.0));
}
