// The exponential of a vector, and the activation functions. Included by the lanes of each instruction set, after
// larger() and smaller(): no #pragma once.
//
// Every function maps a vector to a vector, element by element and without branches or tables, so all LANES elements
// take as long as one. Results depend on LANES only where lanes are added (sum_of), and on the instruction set where the
// compiler may fuse a product and a sum. No memory is read or written.

// The sum of all lanes, by the same additions for every instruction set with as many lanes.
inline float sum_of(Floats x) {
    typedef float Four __attribute__((vector_size(16)));
    Four parts[LANES / 4];
    std::memcpy(parts, &x, sizeof x);
    Four sum = parts[0] + parts[1];
    for (int i = 2; i < LANES / 4; ++i) sum += parts[i];
    return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}
inline float largest_of(Floats x) {
    float largest = x[0];
    for (int i = 1; i < LANES; ++i) largest = x[i] > largest ? x[i] : largest;
    return largest;
}

// e^x to 2 units in the last place. x is limited to -87.3 .. 88, so the result is never infinite, and about 1e-38 far
// below. x = n ln 2 + r: 2^n goes to the exponent's bits, and e^r is the Taylor polynomial of degree 7.
inline Floats exponential(Floats x) {
    x = smaller(larger(x, all(-87.3f)), all(88.0f));
    const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, in the lowest bits
    const Floats shifted = x * 1.44269504f + shift;
    const Floats n = shifted - shift;
    const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // x - n ln 2, in two parts
    Floats p = all(1.0f / 5040);
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    const Ints exponent = ((Ints)shifted - 0x4b400000 + 127) << 23;  // 0x4b400000: the bits of `shift`; 127: the bias
    return p * (Floats)exponent;
}

// tanh(x) = 1 - 2 / (e^2x + 1), with the sign restored: cancellation does not matter at the precision of its callers.
inline Floats hyperbolic_tangent(Floats x) {
    const Floats size = 1.0f - 2.0f / (exponential(2.0f * absolute(x)) + 1.0f);
    return choose(x < 0.0f, -size, size);
}

// x Phi(x), with erf(z) = z P(z^2) / Q(z^2) up to 3.7, beyond which it is 1 to 2e-7. The polynomials were fitted for
// this file by least squares with error-dependent weights until the largest error was 2e-7; in fp32 it stays below
// 5e-7.
inline Floats gelu(Floats x) {
    const Floats z = smaller(larger(x * 0.70710678f, all(-3.7f)), all(3.7f));
    const Floats t = z * z;
    Floats p = t * -1.5024315e-6f + 2.5212101e-4f;
    Floats q = t * 2.3024010e-3f + 2.6790064e-2f;
    p = p * t + 9.6883522e-3f;
    p = p * t + 6.9998950e-2f;
    p = p * t + 3.4968612e-1f;
    p = p * t + 1.1283776f;
    q = q * t + 1.7651173e-1f;
    q = q * t + 6.4321536e-1f;
    q = q * t + 1.0f;
    return 0.5f * x * (1.0f + z * p / q);
}

enum Activation { NONE = 0, RELU = 1, GELU = 2, GELU_TANH = 3, SILU = 4, TANH = 5, RELU2 = 6 };

inline Floats activate(int64_t kind, Floats x) {
    switch (kind) {
        case RELU: return larger(x, Floats{});
        case GELU: return gelu(x);
        case GELU_TANH: return 0.5f * x * (1.0f + hyperbolic_tangent(0.79788456f * (x + 0.044715f * x * x * x)));
        case SILU: return x / (1.0f + exponential(-x));
        case TANH: return hyperbolic_tangent(x);
        case RELU2: return larger(x, Floats{}) * larger(x, Floats{});
        default: return x;
    }
}
