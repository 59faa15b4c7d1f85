// dq, as attention_dq, by blocks as attention_lanes: an invocation holds four query rows.
// lanes; reads q, k, v, dout, lse: f32, delta: f32, of_queries?: u32, of_keys?: u32; writes dq; numbers heads, kv_heads, queries, keys, head_dim, offset, causal, window, scale: f32, cap: f32; constants D, LANES, VECTORS
#include attention_sees
#include attention_part x=q
#include attention_part x=k
#include attention_part x=v
#include attention_part x=dout
#include attention_rows
var<workgroup> slopes: array<vec4<f32>, 4u * LANES * LANES>;

fn tile(group: vec3<u32>, lane: u32) {
    let g = group.y % numbers.kv_heads;
    let b = group.y / numbers.kv_heads;
    offset = numbers.offset;
    let rows = rows_of_head();
    let first = group.x * 4u * LANES;
    let d0 = group.z * 4u * LANES * VECTORS;
#unroll i 4
    let t@i = token(first + 4u * lane + @iu);
    let q_at@i = query_at(b, g, first + 4u * lane + @iu);
    let dout_at@i = q_at@i;
    let row@i = lse_at(b, g, first + 4u * lane + @iu);
#end
    let t = vec4<u32>(t0, t1, t2, t3);
    let lse = vec4<f32>(load_lse(row0), load_lse(row1), load_lse(row2), load_lse(row3));
    let delta = vec4<f32>(load_delta(row0), load_delta(row1), load_delta(row2), load_delta(row3));
    let seen = tokens_of_block(first);
#unroll x VECTORS
#unroll l LANES
#unroll c 4
    var dq@x_@l_@c = vec4<f32>(0.0);
#end
#end
#end
    let end = end_of_keys(seen.y);
    for (var s0 = (first_key(seen.x) / (4u * LANES)) * (4u * LANES); s0 < end; s0 += 4u * LANES) {
#unroll i 4
        let k_at@i = key_at(b, g, s0 + 4u * lane + @iu);
        let v_at@i = k_at@i;
#end
#include block_product out=s r=k x=q
#unroll l LANES
#unroll i 4
        slopes[(4u * @lu + @iu) * LANES + lane] = s@l_@i;
#end
#end
        let count = min(4u * LANES, end - s0);
        let all = all_see(seen, s0, 4u * LANES);
        for (var r = 0u; r < count; r++) {
            var l = logit4(slopes[r * LANES + lane]);
            let slope = slope4(l);
            if (!all) { l = hidden_from(b, t, s0 + r, l); }
            // Where nothing is seen the log-sum-exp is -infinity: no difference then.
            let p = select(exponential4(l - lse), vec4<f32>(0.0), l == vec4<f32>(-infinity()));
            slopes[r * LANES + lane] = p * slope;
        }
#include block_product out=e r=v x=dout
#unroll l LANES
#unroll i 4
        slopes[(4u * @lu + @iu) * LANES + lane] = slopes[(4u * @lu + @iu) * LANES + lane] * (e@l_@i - delta);
#end
#end
        for (var r = 0u; r < count; r++) {
            let ds = slopes[r * LANES + lane];
            let at = key_at(b, g, s0 + r);
#unroll x VECTORS
            let k@x = part_k(at, d0 + 4u * (@xu * LANES + lane));
#unroll l LANES
#unroll c 4
            dq@x_@l_@c = fma(vec4<f32>(subgroupBroadcast(k@x[@c], @lu)), ds, dq@x_@l_@c);
#end
#end
#end
        }
    }
#unroll i 4
    if (first + 4u * lane + @iu < rows) {
#unroll x VECTORS
#unroll l LANES
        store_part_dq(q_at@i, d0 + 4u * (@xu * LANES + @lu), vec4<f32>(dq@x_@l_0[@i], dq@x_@l_1[@i], dq@x_@l_2[@i], dq@x_@l_3[@i]));
#end
#end
    }
#end
}

fn store_part_dq(at: u32, d: u32, x: vec4<f32>) {
#include attention_store y=dq
}
