// dk and dv, as attention_dkv, by blocks: an invocation holds four key rows, and blocks of 4 LANES query rows pass by, head by head
// and token by token.
// lanes; reads q, k, v, dout, lse: f32, delta: f32, of_queries?: u32, of_keys?: u32; writes dk?, dv?; numbers heads, kv_heads, queries, keys, head_dim, offset, causal, window, scale: f32, cap: f32; constants D, LANES, VECTORS
#include attention_sees
#include attention_part x=q
#include attention_part x=k
#include attention_part x=v
#include attention_part x=dout
#include attention_rows
var<workgroup> weights: array<vec4<f32>, 4u * LANES * LANES>;
var<workgroup> slopes: array<vec4<f32>, 4u * LANES * LANES>;

fn tile(group: vec3<u32>, lane: u32) {
    let g = group.y % numbers.kv_heads;
    let b = group.y / numbers.kv_heads;
    offset = numbers.offset;
    let s0 = group.x * 4u * LANES;
    let d0 = group.z * 4u * LANES * VECTORS;
    let s = s0 + 4u * lane;
#unroll i 4
    let k_at@i = key_at(b, g, s + @iu);
    let v_at@i = k_at@i;
#end
#unroll x VECTORS
#unroll l LANES
#unroll c 4
    var dk@x_@l_@c = vec4<f32>(0.0);
    var dv@x_@l_@c = vec4<f32>(0.0);
#end
#end
#end
    let last = min(s0 + 4u * LANES, numbers.keys) - 1u;
    let begin = (first_query(s0) / (4u * LANES)) * (4u * LANES);
    let end = end_of_queries(last);
    let group_heads = numbers.heads / numbers.kv_heads;
    for (var h = 0u; h < group_heads; h++) {
        for (var t0 = begin; t0 < end; t0 += 4u * LANES) {
            let at = h * numbers.queries;
            let count = min(4u * LANES, end - t0);
#unroll i 4
            let q_at@i = query_at(b, g, at + min(t0 + 4u * lane + @iu, numbers.queries - 1u));
            let dout_at@i = q_at@i;
#end
#include block_product out=s r=q x=k
#unroll l LANES
#unroll i 4
            weights[(4u * @lu + @iu) * LANES + lane] = s@l_@i;
#end
#end
#include block_product out=e r=dout x=v
#unroll l LANES
#unroll i 4
            slopes[(4u * @lu + @iu) * LANES + lane] = e@l_@i;
#end
#end
            let all = all_see(vec2<u32>(t0, t0 + count - 1u), s0, 4u * LANES);
            for (var r = 0u; r < count; r++) {
                let row = lse_at(b, g, at + t0 + r);
                let lse = load_lse(row);
                let l = logit4(weights[r * LANES + lane]);
                var p = exponential4(l - vec4<f32>(lse));
                if (!all) {
#unroll i 4
                    if (!visible(b, t0 + r, s + @iu)) { p[@i] = 0.0; }
#end
                }
                let ds = p * (slopes[r * LANES + lane] - vec4<f32>(load_delta(row))) * slope4(l);
                let q_row = query_at(b, g, at + t0 + r);
#unroll x VECTORS
                let q@x = part_q(q_row, d0 + 4u * (@xu * LANES + lane));
                let dout@x = part_dout(q_row, d0 + 4u * (@xu * LANES + lane));
#unroll l LANES
#unroll c 4
                dk@x_@l_@c = fma(vec4<f32>(subgroupBroadcast(q@x[@c], @lu)), ds, dk@x_@l_@c);
                dv@x_@l_@c = fma(vec4<f32>(subgroupBroadcast(dout@x[@c], @lu)), p, dv@x_@l_@c);
#end
#end
#end
            }
        }
    }
#unroll i 4
    if (s + @iu < numbers.keys) {
#unroll x VECTORS
#unroll l LANES
        store_part_dk(k_at@i, d0 + 4u * (@xu * LANES + @lu), vec4<f32>(dk@x_@l_0[@i], dk@x_@l_1[@i], dk@x_@l_2[@i], dk@x_@l_3[@i]));
        store_part_dv(k_at@i, d0 + 4u * (@xu * LANES + @lu), vec4<f32>(dv@x_@l_0[@i], dv@x_@l_1[@i], dv@x_@l_2[@i], dv@x_@l_3[@i]));
#end
#end
    }
#end
}

fn store_part_dk(at: u32, d: u32, x: vec4<f32>) {
#include attention_store y=dk
}

fn store_part_dv(at: u32, d: u32, x: vec4<f32>) {
#include attention_store y=dv
}
