// dq = sum over ascending keys of ds k, with ds = p (dout v - delta) d logit / d dot and p = e^(logit - lse): an invocation for
// each query row. No atomics: the order is fixed.
// elements; reads q, k, v, dout, lse: f32, delta: f32, of_queries?: u32, of_keys?: u32; writes dq; numbers heads, kv_heads, queries, keys, head_dim, offset, causal, window, scale: f32, cap: f32; constants D
#include attention_sees
fn element(i: u32) {
    let t = i % numbers.queries;
    let h = (i / numbers.queries) % numbers.heads;
    let b = i / (numbers.queries * numbers.heads);
    offset = numbers.offset;
    let g = h / (numbers.heads / numbers.kv_heads);
    let q_at = ((b * numbers.queries + t) * numbers.heads + h) * D;
#unroll d D
    let q@d = load_q(q_at + @du);
    let dout@d = load_dout(q_at + @du);
    var dq@d = 0.0;
#end
    let lse = load_lse(i);
    let delta = load_delta(i);
    let end = end_of_keys(t);
    for (var s = first_key(t); s < end; s++) {
        if (!same_document(b, t, s)) { continue; }
        let at = ((b * numbers.keys + s) * numbers.kv_heads + g) * D;
        var dot = 0.0;
        var dp = 0.0;
#unroll d D
        let k@d = load_k(at + @du);
        dot = fma(q@d, k@d, dot);
        dp = fma(dout@d, load_v(at + @du), dp);
#end
        let l = logit(dot);
        let ds = exponential(l - lse) * (dp - delta) * logit_slope(l);
#unroll d D
        dq@d = fma(ds, k@d, dq@d);
#end
    }
#unroll d D
    store_dq(q_at + @du, dq@d);
#end
}
