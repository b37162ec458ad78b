// Eight lanes with AVX2 and FMA, and with AVX-VNNI if PST_AVX_VNNI is defined. Included first for an instruction set,
// inside a region compiled for it and a namespace: no #pragma once.
//
// A register has two halves of 128 bits, and most shuffles work within them: hadd adds neighbours of each half, so the
// halves are added last; transpose exchanges the halves in its last step. Loads and stores need no alignment.
// The functions are listed in portable.hpp.

constexpr int LANES = 8;
#include "types.hpp"

inline Floats larger(Floats a, Floats b) { return (Floats)_mm256_max_ps((__m256)a, (__m256)b); }
inline Floats smaller(Floats a, Floats b) { return (Floats)_mm256_min_ps((__m256)a, (__m256)b); }

#include "functions.hpp"

inline Floats widen(const bf16* from) {
    return (Floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))), 16);
}
inline Floats widen(const int8_t* from) {
    return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
}
inline Floats fused(Floats a, Floats b, Floats c) { return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
inline Floats rounded_once(Floats a, Floats b, Floats c) { return fused(a, b, c); }
// to[i] = the sum of the lanes of of[i].
inline void store_sums(const Floats (&of)[4], float* to) {
    const __m256 first = _mm256_hadd_ps((__m256)of[0], (__m256)of[1]);
    const __m256 second = _mm256_hadd_ps((__m256)of[2], (__m256)of[3]);
    const __m256 halves = _mm256_hadd_ps(first, second);
    _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
}
// Transpose 8 x 8 floats: pairs of rows are interleaved, then pairs of pairs, then halves of registers.
inline void transpose(Floats (&square)[LANES]) {
    __m256* r = reinterpret_cast<__m256*>(square);
    __m256 t[8];
    for (int i = 0; i < 8; i += 4) {
        t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
        t[i + 2] = _mm256_unpacklo_ps(r[i + 2], r[i + 3]);
        t[i + 3] = _mm256_unpackhi_ps(r[i + 2], r[i + 3]);
    }
    for (int i = 0; i < 8; i += 4) {
        r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
        r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
        r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
        t[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
    }
    for (int i = 0; i < 8; ++i) r[i] = t[i];
}
// sum + the products of the 16-bit halves of a and b.
inline Ints add_pairs(Ints sum, Ints a, Ints b) {
#ifdef PST_AVX_VNNI
    return (Ints)_mm256_dpwssd_avx_epi32((__m256i)sum, (__m256i)a, (__m256i)b);
#else
    return sum + (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#endif
}
