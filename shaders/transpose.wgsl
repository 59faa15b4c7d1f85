// y of shape s0 .. s5 = x with strides f0 .. f5.
// map y; reads x; numbers s1, s2, s3, s4, s5, f0, f1, f2, f3, f4, f5
fn value(i: u32) -> E {
    var rest = i;
    var at = (rest % numbers.s5) * numbers.f5;
    rest = rest / numbers.s5;
    at += (rest % numbers.s4) * numbers.f4;
    rest = rest / numbers.s4;
    at += (rest % numbers.s3) * numbers.f3;
    rest = rest / numbers.s3;
    at += (rest % numbers.s2) * numbers.f2;
    rest = rest / numbers.s2;
    at += (rest % numbers.s1) * numbers.f1;
    rest = rest / numbers.s1;
    return load_x(at + rest * numbers.f0);
}
