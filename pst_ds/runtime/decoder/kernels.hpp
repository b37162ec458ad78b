// Products, attention and what lies between them, for each instruction set; functions(level) has those of one.
#pragma once

#include <cmath>

#include "activations.hpp"

namespace pst::decoder_portable {
constexpr int LANES = 8;
constexpr bool WORDS_FIRST = false;
#include "../onnx/lanes.hpp"
inline Floats larger(Floats a, Floats b) { return choose(a > b, a, b); }
inline Floats smaller(Floats a, Floats b) { return choose(a < b, a, b); }
#include "../onnx/vectors.hpp"
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
#include "portable.hpp"
#include "attention.hpp"
#include "glue.hpp"
}  // namespace pst::decoder_portable

#if PST_X86
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace pst::decoder_avx2 {
constexpr int LANES = 8;
constexpr bool WORDS_FIRST = false;
#include "../onnx/lanes.hpp"
inline Floats larger(Floats a, Floats b) { return (Floats)_mm256_max_ps((__m256)a, (__m256)b); }
inline Floats smaller(Floats a, Floats b) { return (Floats)_mm256_min_ps((__m256)a, (__m256)b); }
#include "../onnx/vectors.hpp"
inline Floats widen(const bf16* from) {
    return (Floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))), 16);
}
inline Floats widen(const int8_t* from) {
    return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
}
inline Floats fused(Floats a, Floats b, Floats c) { return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
inline void store_sums(const Floats (&of)[4], float* to) {
    const __m256 first = _mm256_hadd_ps((__m256)of[0], (__m256)of[1]), second = _mm256_hadd_ps((__m256)of[2], (__m256)of[3]);
    const __m256 halves = _mm256_hadd_ps(first, second);
    _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
}
#include "avx2.hpp"
#include "attention.hpp"
#include "glue.hpp"
}  // namespace pst::decoder_avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi2,popcnt,fma")
namespace pst::decoder_avx512 {
constexpr int LANES = 16;
constexpr bool WORDS_FIRST = true;
#include "../onnx/lanes.hpp"
inline Floats larger(Floats a, Floats b) { return (Floats)_mm512_max_ps((__m512)a, (__m512)b); }
inline Floats smaller(Floats a, Floats b) { return (Floats)_mm512_min_ps((__m512)a, (__m512)b); }
#include "../onnx/vectors.hpp"
inline Floats widen(const bf16* from) {
    return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))), 16);
}
inline Floats widen(const int8_t* from) {
    return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}
inline Floats fused(Floats a, Floats b, Floats c) { return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
inline __m512 halves_of(__m512 a, __m512 b) { return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)); }
inline void store_sums(const Floats (&of)[4], float* to) {
    const __m512d first = (__m512d)halves_of((__m512)of[0], (__m512)of[1]), second = (__m512d)halves_of((__m512)of[2], (__m512)of[3]);
    const __m512 quarters = _mm512_add_ps((__m512)_mm512_unpacklo_pd(first, second), (__m512)_mm512_unpackhi_pd(first, second));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(quarters), _mm512_extractf32x8_ps(quarters, 1));
    _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}
#include "avx512.hpp"
#include "attention.hpp"
#include "glue.hpp"
}  // namespace pst::decoder_avx512
#pragma GCC pop_options
#endif

namespace pst {

constexpr int PORTABLE = 0, AVX2 = 1, AVX512 = 2;

inline int best_level() {
#if PST_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi2"))
        return AVX512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return AVX2;
#endif
    return PORTABLE;
}

inline const Functions& functions(int level) {
#if PST_X86
    static const Functions tables[] = {decoder_portable::table("portable"), decoder_avx2::table("avx2"),
                                       decoder_avx512::table("avx512")};
    return tables[level];
#else
    static const Functions table = decoder_portable::table("portable");
    return table;
#endif
}

}  // namespace pst
