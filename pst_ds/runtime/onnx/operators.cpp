// Operators for ONNX Runtime, domain "pst_ds": products with sparse weights, and what lies between them in a transformer.
//   SparseLinear (x, mask, values, scales?, bias?) -> y                     bits, columns, activation, activation_bits
//   SkipLayerNorm (x, skip?, gain, shift?) -> y, sum?                       epsilon
//   Attention (q, k, v, mask?) -> y                                         heads, key_value_heads, head_size, scale, *_offset
//   Embedding (ids, values, scales?) -> y                                   bits, columns
// The graphs that use them are written by pst_ds/onnx.
#include <cmath>
#include <new>

#include "functions.hpp"

namespace pst::onnx_portable {
constexpr int LANES = 8;
#include "lanes.hpp"
inline Floats larger(Floats a, Floats b) { return choose(a > b, a, b); }
inline Floats smaller(Floats a, Floats b) { return choose(a < b, a, b); }
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
#include "vectors.hpp"
#include "attention.hpp"
#include "layer_norm.hpp"
#include "product.hpp"
#include "table.hpp"
}  // namespace pst::onnx_portable

#if PST_X86
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace pst::onnx_avx2 {
constexpr int LANES = 8;
#include "lanes.hpp"
inline Floats larger(Floats a, Floats b) { return (Floats)_mm256_max_ps((__m256)a, (__m256)b); }
inline Floats smaller(Floats a, Floats b) { return (Floats)_mm256_min_ps((__m256)a, (__m256)b); }
inline void transpose(Floats (&square)[LANES]) {
    __m256 *r = reinterpret_cast<__m256*>(square), t[8];
    for (int i = 0; i < 8; i += 4) {
        t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]), t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
        t[i + 2] = _mm256_unpacklo_ps(r[i + 2], r[i + 3]), t[i + 3] = _mm256_unpackhi_ps(r[i + 2], r[i + 3]);
    }
    for (int i = 0; i < 8; i += 4) {
        r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44), r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
        r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44), r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
        t[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
    }
    for (int i = 0; i < 8; ++i) r[i] = t[i];
}
inline Ints add_pairs(Ints sum, Ints a, Ints b) { return sum + (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b); }
#include "vectors.hpp"
#include "attention.hpp"
#include "layer_norm.hpp"
#include "product.hpp"
#include "table.hpp"
}  // namespace pst::onnx_avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma")
namespace pst::onnx_avx512 {
constexpr int LANES = 16;
#include "lanes.hpp"
inline Floats larger(Floats a, Floats b) { return (Floats)_mm512_max_ps((__m512)a, (__m512)b); }
inline Floats smaller(Floats a, Floats b) { return (Floats)_mm512_min_ps((__m512)a, (__m512)b); }
inline void transpose(Floats (&square)[LANES]) {
    __m512 *r = reinterpret_cast<__m512*>(square), t[16];
    for (int i = 0; i < 16; i += 4) {
        t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]), t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
        t[i + 2] = _mm512_unpacklo_ps(r[i + 2], r[i + 3]), t[i + 3] = _mm512_unpackhi_ps(r[i + 2], r[i + 3]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44), r[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
        r[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44), r[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    for (int i = 0; i < 16; i += 8)  // quarters of a vector from here on
        for (int j = 0; j < 4; ++j) {
            t[i + j] = _mm512_shuffle_f32x4(r[i + j], r[i + j + 4], 0x88);
            t[i + j + 4] = _mm512_shuffle_f32x4(r[i + j], r[i + j + 4], 0xdd);
        }
    for (int j = 0; j < 4; ++j) {
        r[j] = _mm512_shuffle_f32x4(t[j], t[j + 8], 0x88), r[j + 8] = _mm512_shuffle_f32x4(t[j], t[j + 8], 0xdd);
        r[j + 4] = _mm512_shuffle_f32x4(t[j + 4], t[j + 12], 0x88), r[j + 12] = _mm512_shuffle_f32x4(t[j + 4], t[j + 12], 0xdd);
    }
}
inline Ints add_pairs(Ints sum, Ints a, Ints b) {
    return (Ints)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
}
#include "vectors.hpp"
#include "attention.hpp"
#include "layer_norm.hpp"
#include "product.hpp"
#include "table.hpp"
}  // namespace pst::onnx_avx512
#pragma GCC pop_options
#endif

namespace pst {

inline const OperatorTable& operators() {
    static const OperatorTable best = [] {
#if PST_X86
        __builtin_cpu_init();
        const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                            __builtin_cpu_supports("avx512vnni");
        if (avx512) return onnx_avx512::table();
        if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return onnx_avx2::table();
#endif
        return onnx_portable::table();
    }();
    return best;
}

}  // namespace pst

#ifndef PST_ONNX_WITHOUT_NODES  // for tests of what is above
#include "nodes.hpp"

extern "C" __attribute__((visibility("default"))) ort::Status* RegisterCustomOps(ort::SessionOptions* options,
                                                                                 const ort::ApiBase* base) {
    return pst::register_operators(options, base);
}

// Whether sessions that are opened from now on take 16 bits where their graph allows 8: for comparisons.
extern "C" __attribute__((visibility("default"))) void pst_onnx_exact_inputs(int exact) { pst::exact_inputs() = exact != 0; }
#endif
