// dk = sum of ds q and dv = sum of p dout over the query rows that see a key, head by head and token by token: an invocation for
// each key row. No atomics: the order is fixed.
// elements; reads q, k, v, dout, lse: f32, delta: f32, of_queries?: u32, of_keys?: u32; writes dk?, dv?; numbers heads, kv_heads, queries, keys, head_dim, offset, causal, window, scale: f32, cap: f32; constants D
#include attention_sees
fn element(i: u32) {
    let s = i % numbers.keys;
    let g = (i / numbers.keys) % numbers.kv_heads;
    let b = i / (numbers.keys * numbers.kv_heads);
    offset = numbers.offset;
    let k_at = ((b * numbers.keys + s) * numbers.kv_heads + g) * D;
#unroll d D
    let k@d = load_k(k_at + @du);
    let v@d = load_v(k_at + @du);
    var dk@d = 0.0;
    var dv@d = 0.0;
#end
    let group = numbers.heads / numbers.kv_heads;
    let end = end_of_queries(s);
    for (var h = g * group; h < (g + 1u) * group; h++) {
        for (var t = first_query(s); t < end; t++) {
            if (!same_document(b, t, s)) { continue; }
            let at = ((b * numbers.queries + t) * numbers.heads + h) * D;
            let row = (b * numbers.heads + h) * numbers.queries + t;
            var dot = 0.0;
            var dp = 0.0;
#unroll d D
            let q@d = load_q(at + @du);
            let dout@d = load_dout(at + @du);
            dot = fma(q@d, k@d, dot);
            dp = fma(dout@d, v@d, dp);
#end
            let l = logit(dot);
            let p = exponential(l - load_lse(row));
            let ds = p * (dp - load_delta(row)) * logit_slope(l);
#unroll d D
            dk@d = fma(ds, q@d, dk@d);
            dv@d = fma(p, dout@d, dv@d);
#end
        }
    }
#unroll d D
    store_dk(k_at + @du, dk@d);
    store_dv(k_at + @du, dv@d);
#end
}
