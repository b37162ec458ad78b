// Sixteen lanes with AVX-512 and VNNI. Included first for an instruction set, inside a region compiled for it and a
// namespace: no #pragma once.
//
// A register has four quarters of 128 bits, and unpack and shuffle_ps work within them: sums and transposes first combine
// inside quarters, then move whole quarters (shuffle_f32x4). Loads and stores need no alignment.
// The functions are listed in portable.hpp.

constexpr int LANES = 16;
#include "types.hpp"

inline Floats larger(Floats a, Floats b) { return (Floats)_mm512_max_ps((__m512)a, (__m512)b); }
inline Floats smaller(Floats a, Floats b) { return (Floats)_mm512_min_ps((__m512)a, (__m512)b); }

#include "functions.hpp"

inline Floats widen(const bf16* from) {
    return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))), 16);
}
inline Floats widen(const int8_t* from) {
    return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}
inline Floats fused(Floats a, Floats b, Floats c) { return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
inline Floats rounded_once(Floats a, Floats b, Floats c) { return fused(a, b, c); }
// Neighbouring sums: of each quarter, elements i and i + 2 of a, and those of b, alternating.
inline __m512 halves_of(__m512 a, __m512 b) { return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)); }
// to[i] = the sum of the lanes of of[i].
inline void store_sums(const Floats (&of)[4], float* to) {
    const __m512d first = (__m512d)halves_of((__m512)of[0], (__m512)of[1]);
    const __m512d second = (__m512d)halves_of((__m512)of[2], (__m512)of[3]);
    const __m512 quarters = _mm512_add_ps((__m512)_mm512_unpacklo_pd(first, second), (__m512)_mm512_unpackhi_pd(first, second));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(quarters), _mm512_extractf32x8_ps(quarters, 1));
    _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}
// Transpose 16 x 16 floats.
inline void transpose(Floats (&square)[LANES]) {
    __m512* r = reinterpret_cast<__m512*>(square);
    __m512 t[16];
    for (int i = 0; i < 16; i += 4) {
        t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
        t[i + 2] = _mm512_unpacklo_ps(r[i + 2], r[i + 3]);
        t[i + 3] = _mm512_unpackhi_ps(r[i + 2], r[i + 3]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
        r[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
        r[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        r[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    for (int i = 0; i < 16; i += 8)  // quarters of a vector from here on
        for (int j = 0; j < 4; ++j) {
            t[i + j] = _mm512_shuffle_f32x4(r[i + j], r[i + j + 4], 0x88);
            t[i + j + 4] = _mm512_shuffle_f32x4(r[i + j], r[i + j + 4], 0xdd);
        }
    for (int j = 0; j < 4; ++j) {
        r[j] = _mm512_shuffle_f32x4(t[j], t[j + 8], 0x88);
        r[j + 8] = _mm512_shuffle_f32x4(t[j], t[j + 8], 0xdd);
        r[j + 4] = _mm512_shuffle_f32x4(t[j + 4], t[j + 12], 0x88);
        r[j + 12] = _mm512_shuffle_f32x4(t[j + 4], t[j + 12], 0xdd);
    }
}
// sum + the products of the 16-bit halves of a and b.
inline Ints add_pairs(Ints sum, Ints a, Ints b) {
    return (Ints)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
}
