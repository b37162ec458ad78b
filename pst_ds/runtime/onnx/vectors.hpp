// Vectors of LANES floats, their exponential, and the activation functions. Included once for each instruction set,
// inside a region compiled for it and a namespace that has LANES: no #pragma once.

typedef float Floats __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES), aligned(4)));

inline Floats all(float value) { return Floats{} + value; }
inline Floats load(const float* from) { return *reinterpret_cast<const Floats*>(from); }
inline void store(float* to, Floats value) { *reinterpret_cast<Floats*>(to) = value; }
inline Floats choose(Ints mask, Floats yes, Floats no) { return (Floats)(((Ints)yes & mask) | ((Ints)no & ~mask)); }
inline Floats larger(Floats a, Floats b) { return choose(a > b, a, b); }
inline Floats smaller(Floats a, Floats b) { return choose(a < b, a, b); }
inline Floats absolute(Floats x) { return (Floats)((Ints)x & 0x7fffffff); }

inline float sum_of(Floats x) {
    float sum = 0;
    for (int i = 0; i < LANES; ++i) sum += x[i];
    return sum;
}
inline float largest_of(Floats x) {
    float largest = x[0];
    for (int i = 1; i < LANES; ++i) largest = x[i] > largest ? x[i] : largest;
    return largest;
}

// e^x to 2 units in the last place; 0 far below, and no infinity: x is taken within -87.3 .. 88.
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
    const Ints exponent = ((Ints)shifted - 0x4b400000 + 127) << 23;
    return p * (Floats)exponent;
}

// tanh(x) = 1 - 2 / (e^2x + 1), with the sign put back: no cancellation matters at the precision of its callers.
inline Floats hyperbolic_tangent(Floats x) {
    const Floats size = 1.0f - 2.0f / (exponential(2.0f * absolute(x)) + 1.0f);
    return choose(x < 0.0f, -size, size);
}

// x Phi(x), by the complementary error function of Abramowitz and Stegun, 7.1.26, whose error is below 1.5e-7.
inline Floats gelu(Floats x) {
    const Floats z = absolute(x) * 0.70710678f, t = 1.0f / (z * 0.3275911f + 1.0f);
    Floats p = all(1.061405429f);
    p = p * t - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    const Floats half_tail = 0.5f * absolute(x) * (p * t * exponential(-z * z));
    return larger(x, Floats{}) - half_tail;
}

enum Activation { NONE = 0, RELU = 1, GELU = 2, GELU_TANH = 3, SILU = 4, TANH = 5 };

inline Floats activate(int64_t kind, Floats x) {
    switch (kind) {
        case RELU: return larger(x, Floats{});
        case GELU: return gelu(x);
        case GELU_TANH: return 0.5f * x * (1.0f + hyperbolic_tangent(0.79788456f * (x + 0.044715f * x * x * x)));
        case SILU: return x / (1.0f + exponential(-x));
        case TANH: return hyperbolic_tangent(x);
        default: return x;
    }
}
