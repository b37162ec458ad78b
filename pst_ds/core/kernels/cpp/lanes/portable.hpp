// Eight lanes in plain C++ with compiler vector types. Included first for an instruction set, inside a region compiled
// for it and a namespace: no #pragma once.

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
inline Floats fused(Floats a, Floats b, Floats c) { return a * b + c; }
inline void store_sums(const Floats (&of)[4], float* to) {
    for (int i = 0; i < 4; ++i) to[i] = sum_of(of[i]);
}
inline void transpose(Floats (&square)[LANES]) {
    for (int i = 0; i < LANES; ++i)
        for (int j = 0; j < i; ++j) {
            const float other = square[i][j];
            square[i][j] = square[j][i];
            square[j][i] = other;
        }
}
// sum + the products of the 16-bit halves of a and b.
inline Ints add_pairs(Ints sum, Ints a, Ints b) { return sum + (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16); }
