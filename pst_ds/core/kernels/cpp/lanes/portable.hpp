// Eight lanes in plain C++ with compiler vector types. Included first for an instruction set, inside a region compiled
// for it and a namespace: no #pragma once.
//
// Each file of this folder defines for its instruction set: LANES; larger and smaller; widen, to LANES floats from as
// many bf16 or int8 at any address; fused, a * b + c; rounded_once, a * b + c rounded only once, which is slow without
// instructions for it; store_sums, the sums of four vectors; transpose, of a square of LANES vectors in place; add_pairs.
// functions.hpp and the code of the operators use only these.

constexpr int LANES = 8;
#include "types.hpp"

inline Floats larger(Floats a, Floats b) { return choose(a > b, a, b); }
inline Floats smaller(Floats a, Floats b) { return choose(a < b, a, b); }

#include "functions.hpp"

inline Floats widen(const bf16* from) {
    Floats wide;
    for (int i = 0; i < LANES; ++i) wide[i] = pst::widen(from[i]);
    return wide;
}
inline Floats widen(const int8_t* from) {
    Floats wide;
    for (int i = 0; i < LANES; ++i) wide[i] = float(from[i]);
    return wide;
}
// arm64 has fused products and sums, so they are fused there as by its other instruction sets.
inline Floats fused(Floats a, Floats b, Floats c) {
#if defined(__aarch64__)
    for (int i = 0; i < LANES; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
#else
    return a * b + c;
#endif
}
inline Floats rounded_once(Floats a, Floats b, Floats c) {
    for (int i = 0; i < LANES; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
}
inline void store_sums(const Floats (&of)[4], float* to) {
    for (int i = 0; i < 4; ++i) to[i] = sum_of(of[i]);
}
#include "transpose.hpp"
// sum + the products of the 16-bit halves of a and b. Shifting left and right extends the sign of the lower half.
inline Ints add_pairs(Ints sum, Ints a, Ints b) { return sum + (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16); }
