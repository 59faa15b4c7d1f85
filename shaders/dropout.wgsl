// y = factor x where the random word of the element's index in the whole tensor is at least p 2^24, else 0. Philox4x32-10, as
// in random.rs. Run r of `run` elements begins at the 64-bit index starts[2 r], starts[2 r + 1].
// map y; reads x, starts: u32; numbers p: f32, factor: f32, key0, key1, name0, name1, run

// The high word of a 64-bit product, by 16-bit halves: WGSL has no wide integers.
fn high(a: u32, b: u32) -> u32 {
    let a0 = a & 0xffffu;
    let a1 = a >> 16u;
    let b0 = b & 0xffffu;
    let b1 = b >> 16u;
    let low = a0 * b0;
    let m = a1 * b0 + (low >> 16u);
    let n = a0 * b1 + (m & 0xffffu);
    return a1 * b1 + (m >> 16u) + (n >> 16u);
}

fn philox(counter: vec4<u32>) -> vec4<u32> {
    var c = counter;
    var k0 = numbers.key0;
    var k1 = numbers.key1;
    for (var i = 0u; i < 10u; i++) {
        c = vec4<u32>(
            high(c.z, 0xCD9E8D57u) ^ c.y ^ k0,
            c.z * 0xCD9E8D57u,
            high(c.x, 0xD2511F53u) ^ c.w ^ k1,
            c.x * 0xD2511F53u,
        );
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return c;
}

fn value(i: u32) -> f32 {
    let r = i / numbers.run;
    let low = load_starts(2u * r) + (i - r * numbers.run);
    let carry = select(0u, 1u, low < load_starts(2u * r));
    let top = load_starts(2u * r + 1u) + carry;
    let words = philox(vec4<u32>((low >> 2u) | (top << 30u), top >> 2u, numbers.name0, numbers.name1));
    let which = low & 3u;
    var word = words.x;
    if (which == 1u) { word = words.y; }
    if (which == 2u) { word = words.z; }
    if (which == 3u) { word = words.w; }
    let uniform_number = f32(word >> 8u) * 5.960464477539063e-8;
    if (uniform_number >= numbers.p) { return load_x(i) * numbers.factor; }
    return 0.0;
}
