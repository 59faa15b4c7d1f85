// Functions that every kernel may use. Elementary functions are polynomials of this project (see cpu/polynomial.rs): what a
// driver brings for exp or tanh differs in accuracy from one to the next.

fn bf16_to_f32(h: u32) -> f32 { return bitcast<f32>(h << 16u); }

// To nearest, ties to even; NaN stays NaN.
fn f32_to_bf16(x: f32) -> u32 {
    let b = bitcast<u32>(x);
    if ((b & 0x7fffffffu) > 0x7f800000u) { return (b >> 16u) | 0x40u; }
    return (b + 0x7fffu + ((b >> 16u) & 1u)) >> 16u;
}

fn f16_to_f32(h: u32) -> f32 {
    let sign = (h & 0x8000u) << 16u;
    let e = (h >> 10u) & 31u;
    let m = h & 0x3ffu;
    if (e == 31u) { return bitcast<f32>(sign | 0x7f800000u | (m << 13u)); }
    if (e == 0u) {
        let tiny = f32(m) * 5.960464477539063e-8;
        return bitcast<f32>(bitcast<u32>(tiny) | sign);
    }
    return bitcast<f32>(sign | ((e + 112u) << 23u) | (m << 13u));
}

fn f32_to_f16(x: f32) -> u32 {
    let b = bitcast<u32>(x);
    let sign = (b >> 16u) & 0x8000u;
    let a = b & 0x7fffffffu;
    if (a > 0x7f800000u) { return sign | 0x7e00u; }
    // 65520 and above round to infinity.
    if (a >= 0x477ff000u) { return sign | 0x7c00u; }
    if (a < 0x38800000u) {
        let e = a >> 23u;
        if (e < 102u) { return sign; }
        let m = (a & 0x7fffffu) | 0x800000u;
        let shift = 126u - e;
        let half = 1u << (shift - 1u);
        let q = m >> shift;
        let rest = m & ((1u << shift) - 1u);
        let up = rest > half || (rest == half && (q & 1u) == 1u);
        return sign | (q + select(0u, 1u, up));
    }
    return sign | ((a + 0xfffu + ((a >> 13u) & 1u) - 0x38000000u) >> 13u);
}

fn infinity() -> f32 { return bitcast<f32>(numbers.infinity); }
fn not_a_number() -> f32 { return bitcast<f32>(numbers.infinity | 0x400000u); }
fn is_nan(x: f32) -> bool { return (bitcast<u32>(x) & 0x7fffffffu) > 0x7f800000u; }
fn is_finite(x: f32) -> bool { return (bitcast<u32>(x) & 0x7f800000u) != 0x7f800000u; }

// 2^n for n in -126..=127.
fn power_of_two(n: i32) -> f32 { return bitcast<f32>(u32(n + 127) << 23u); }

// y 2^n, in two steps so that neither overflows alone.
fn scale2(y: f32, n: f32) -> f32 {
    let whole = i32(n);
    let half = whole >> 1u;
    return y * power_of_two(half) * power_of_two(whole - half);
}

fn exponential(a: f32) -> f32 {
    if (is_nan(a)) { return a; }
    let x = clamp(a, -105.0, 90.0);
    let n = round(x * 1.4426950408889634);
    let r = fma(-n, 3.1946183e-5, fma(-n, 0.69311523, x));
    var y = fma(0.001382136, r, 0.008368669);
    y = fma(y, r, 0.04166826);
    y = fma(y, r, 0.16666521);
    y = fma(y, r, 0.49999994);
    return scale2(fma(y, r * r, r) + 1.0, n);
}

fn exponential4(a: vec4<f32>) -> vec4<f32> {
    return vec4<f32>(exponential(a.x), exponential(a.y), exponential(a.z), exponential(a.w));
}

fn logarithm(x: f32) -> f32 {
    if (is_nan(x) || x < 0.0) { return not_a_number(); }
    if (x == 0.0) { return -infinity(); }
    if (!is_finite(x)) { return x; }
    let subnormal = x < 1.1754944e-38;
    let b = bitcast<u32>(select(x, x * 16777216.0, subnormal));
    // The mantissa lies in 2/3 .. 4/3.
    let t = b - 0x3f2aaaabu;
    let e = f32(bitcast<i32>(t) >> 23u) - select(0.0, 24.0, subnormal);
    let m = bitcast<f32>((t & 0x7fffffu) + 0x3f2aaaabu);
    let f = m - 1.0;
    var y = fma(0.119356506, f, -0.12839976);
    y = fma(y, f, 0.10775289);
    y = fma(y, f, -0.12197025);
    y = fma(y, f, 0.14302254);
    y = fma(y, f, -0.1667948);
    y = fma(y, f, 0.19999693);
    y = fma(y, f, -0.24999823);
    y = fma(y, f, 0.33333334);
    let square = f * f;
    y = fma(y * f, square, e * 3.1946183e-5);
    y = fma(-0.5, square, y);
    return fma(e, 0.69311523, f) + y;
}

fn with_sign(a: f32, x: f32) -> f32 {
    return bitcast<f32>((bitcast<u32>(a) & 0x7fffffffu) | (bitcast<u32>(x) & 0x80000000u));
}

fn hyperbolic_tangent(x: f32) -> f32 {
    let a = abs(x);
    let square = x * x;
    var c = fma(-0.005700092, square, 0.020634118);
    c = fma(c, square, -0.05373794);
    c = fma(c, square, 0.13331416);
    c = fma(c, square, -0.3333328);
    let small = fma(square * c, x, x);
    let large = 1.0 - 2.0 / (exponential(a + a) + 1.0);
    return with_sign(select(large, small, a < 0.625), x);
}

fn error_function(x: f32) -> f32 {
    let a = abs(x);
    let square = x * x;
    var c = fma(-0.0005955465, square, 0.0049878876);
    c = fma(c, square, -0.026764775);
    c = fma(c, square, 0.11281852);
    c = fma(c, square, -0.37612516);
    c = fma(c, square, 0.12837917);
    let small = fma(c, x, x);
    let b = min(4.0, a);
    var q = fma(0.000198246, b, -0.003065737);
    q = fma(q, b, 0.022316134);
    q = fma(q, b, -0.104115434);
    q = fma(q, b, -0.6369743);
    q = fma(q, b, -1.1277982);
    q = fma(q, b, -0.00016624357);
    let large = with_sign(1.0 - exponential(q), x);
    return select(large, small, a < 0.92);
}

fn sigmoid(x: f32) -> f32 { return 1.0 / (1.0 + exponential(-x)); }

const GELU_TANH: u32 = 0u;
const GELU_ERF: u32 = 1u;
const RELU2: u32 = 2u;
const SILU: u32 = 3u;
const IDENTITY: u32 = 4u;

fn activate(f: u32, x: f32) -> f32 {
    // Far out they are their limits; a NaN goes on.
    if (f == GELU_TANH || f == GELU_ERF || f == SILU) {
        if (x < -1e4) { return 0.0; }
        if (x > 1e4) { return x; }
    }
    if (f == GELU_TANH) {
        let inner = fma((x * x) * x, 0.035677407, x * 0.7978846);
        return fma(x * 0.5, hyperbolic_tangent(inner), x * 0.5);
    }
    if (f == GELU_ERF) { return fma(x * 0.5, error_function(x * 0.70710677), x * 0.5); }
    if (f == RELU2) {
        let positive = select(max(0.0, x), x, is_nan(x));
        return positive * positive;
    }
    if (f == SILU) { return x * sigmoid(x); }
    return x;
}

// f'(x).
fn slope(f: u32, x: f32) -> f32 {
    if (f == GELU_TANH || f == GELU_ERF || f == SILU) {
        if (x < -1e4) { return 0.0; }
        if (x > 1e4) { return 1.0; }
    }
    if (f == GELU_TANH) {
        // (1 + tanh u) / 2 = sigmoid(2 u), without the cancellation for negative u.
        let p = sigmoid((1.5957692 * x) * fma(0.044715, x * x, 1.0));
        let inner = fma(0.21406444, x * x, 1.5957692);
        return fma(x * inner, p * (1.0 - p), p);
    }
    if (f == GELU_ERF) {
        let density = 0.3989423 * exponential(-0.5 * (x * x));
        return fma(x, density, fma(0.5, error_function(x * 0.70710677), 0.5));
    }
    if (f == RELU2) {
        let positive = select(max(0.0, x), x, is_nan(x));
        return positive + positive;
    }
    if (f == SILU) {
        let p = sigmoid(x);
        return fma(x * p, 1.0 - p, p);
    }
    return 1.0;
}

// The larger of two, NaN if one is NaN.
fn larger(a: f32, b: f32) -> f32 {
    if (is_nan(a)) { return a; }
    if (is_nan(b)) { return b; }
    return max(a, b);
}
