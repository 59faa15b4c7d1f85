// c = a b with operands in f16 or f32 and sums in f32, through cooperative matrices of SIDE by SIDE: every subgroup holds DOWN by
// ACROSS of them as sums, and a group four subgroups, two by two. Operands come straight from memory. Rows and columns are multiples of what a group
// covers, k of SIDE; the sum's order inside of a step of SIDE is the device's own.
// A_COLUMNS, B_COLUMNS 0: rows are consecutive in memory; 1: columns. LOADS 1: sums begin as what c holds.
// matrices; reads a, b; writes c: f32; numbers n, k, m, a_stride, a_batch, b_stride, b_batch; constants SIDE, LOADS, DOWN, ACROSS, A_COLUMNS, B_COLUMNS
alias Left = coop_mat@{SIDE}x@{SIDE}<E, A>;
alias Right = coop_mat@{SIDE}x@{SIDE}<E, B>;
alias Sums = coop_mat@{SIDE}x@{SIDE}<f32, C>;

fn tile(group: vec3<u32>, subgroup: u32) {
    let row = (group.y * 2u + subgroup / 2u) * DOWN * SIDE;
    let column = (group.x * 2u + subgroup % 2u) * ACROSS * SIDE;
    let a_first = group.z * numbers.a_batch;
    let b_first = group.z * numbers.b_batch;
    let c_first = group.z * numbers.m * numbers.n;
#unroll i DOWN
#unroll j ACROSS
    let c@i_@j = c_first + (row + @iu * SIDE) * numbers.n + column + @ju * SIDE;
    var sum@i_@j: Sums;
    if (LOADS == 1u) {
        sum@i_@j = coopLoadT<Sums>(&data_c[c@i_@j], numbers.n);
    } else {
        sum@i_@j = Sums();
    }
#end
#end
    for (var p = 0u; p < numbers.k; p += SIDE) {
#unroll i DOWN
        let a_at@i = a_first + place(A_COLUMNS, row + @iu * SIDE, p, numbers.a_stride);
        var a@i: Left;
        if (A_COLUMNS == 0u) {
            a@i = coopLoadT<Left>(&data_a[a_at@i], numbers.a_stride);
        } else {
            a@i = coopLoad<Left>(&data_a[a_at@i], numbers.a_stride);
        }
#end
#unroll j ACROSS
        let b_at@j = b_first + place(B_COLUMNS, p, column + @ju * SIDE, numbers.b_stride);
        var b@j: Right;
        if (B_COLUMNS == 0u) {
            b@j = coopLoadT<Right>(&data_b[b_at@j], numbers.b_stride);
        } else {
            b@j = coopLoad<Right>(&data_b[b_at@j], numbers.b_stride);
        }
#unroll i DOWN
        sum@i_@j = coopMultiplyAdd(a@i, b@j, sum@i_@j);
#end
#end
    }
    // Named before they are stored: naga's SPIR-V writer panics on a matrix or a stride that the call itself reads from memory.
    let c_stride = numbers.n;
#unroll i DOWN
#unroll j ACROSS
    let done@i_@j = sum@i_@j;
    coopStoreT(done@i_@j, &data_c[c@i_@j], c_stride);
#end
#end
}

fn place(columns: u32, i: u32, j: u32, stride: u32) -> u32 {
    if (columns == 0u) { return i * stride + j; }
    return j * stride + i;
}
