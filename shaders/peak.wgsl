// Multiply-adds in registers and nothing else: what the device could do at best.
// elements; writes y: f32; numbers rounds
fn element(i: u32) {
#unroll a 8
    var x@a = vec4<f32>(f32(i) * 1e-6, 0.25, 0.5, @af);
#end
    for (var r = 0u; r < numbers.rounds; r++) {
#unroll a 8
        x@a = fma(x@a, vec4<f32>(0.999), vec4<f32>(0.001));
#end
    }
    var sum = vec4<f32>(0.0);
#unroll a 8
    sum += x@a;
#end
    store_y(i, sum.x + sum.y + sum.z + sum.w);
}
