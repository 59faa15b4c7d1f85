// c = f(a b + bias) for `batch` products of [m, k] by [k, n] with any strides; each invocation holds ROWS by COLUMNS sums in
// registers, each one chain of fused multiply-adds over ascending k. z takes the sum before f. With ADD the chain resumes from c.
// Loads beyond an edge are held inside the operand, and what they give is never stored.
// tiles; reads a, b, bias?; writes c, z?; numbers m, n, k, a_row, a_column, a_batch, b_row, b_column, b_batch; constants ADD, FUNCTION, ROWS, COLUMNS, WG_X, WG_Y
fn finish(at: u32, column: u32, total: f32) {
    var sum = total;
    if (has_bias) { sum += load_bias(column); }
    store_z(at, sum);
    store_c(at, activate(FUNCTION, sum));
}

fn tile(group: vec3<u32>, lane: u32) {
    let row = (group.y * WG_Y + lane / WG_X) * ROWS;
    let column = (group.x * WG_X + lane % WG_X) * COLUMNS;
    if (row >= numbers.m || column >= numbers.n) { return; }
    let c_first = group.z * numbers.m * numbers.n;
#unroll i ROWS
    var a_at@i = group.z * numbers.a_batch + min(row + @iu, numbers.m - 1u) * numbers.a_row;
#unroll j COLUMNS
    var sum@i_@j = 0.0;
#end
#end
#unroll j COLUMNS
    var b_at@j = group.z * numbers.b_batch + min(column + @ju, numbers.n - 1u) * numbers.b_column;
#end
    if (ADD == 1u) {
#unroll i ROWS
#unroll j COLUMNS
        sum@i_@j = load_c(c_first + min(row + @iu, numbers.m - 1u) * numbers.n + min(column + @ju, numbers.n - 1u));
#end
#end
    }
    for (var p = 0u; p < numbers.k; p++) {
#unroll i ROWS
        let a@i = load_a(a_at@i);
        a_at@i += numbers.a_column;
#end
#unroll j COLUMNS
        let b@j = load_b(b_at@j);
        b_at@j += numbers.b_row;
#unroll i ROWS
        sum@i_@j = fma(a@i, b@j, sum@i_@j);
#end
#end
    }
#unroll i ROWS
    if (row + @iu < numbers.m) {
#unroll j COLUMNS
        if (column + @ju < numbers.n) { finish(c_first + (row + @iu) * numbers.n + column + @ju, column + @ju, sum@i_@j); }
#end
    }
#end
}
