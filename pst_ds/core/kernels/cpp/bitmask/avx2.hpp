// AVX2 with FMA: values are widened to fp32 and moved to their places, 8 at a time, by a table of permutations.
// Included inside a region that is compiled for these instructions.
//
// AVX2 has no expand instruction: a table of 256 rows of 8 int32 (8 KiB, aligned to 32 bytes) has for each byte of a mask
// the permutation that does it. Expanded rows are fp32 in working memory, aligned to 64 bytes, and written with aligned
// stores up to a multiple of 8 columns. `values` is read 8 at a time except near the end of the array, where only the
// values that the byte keeps are read.
#pragma once

#include "common.hpp"

namespace pst::avx2 {

// For every byte of a mask: which of 8 packed values each lane takes (any, if the bit is clear).
struct Places {
    alignas(32) int32_t of[256][8];
    Places() {
        for (int byte = 0; byte < 256; ++byte)
            for (int lane = 0, next = 0; lane < 8; ++lane) {
                of[byte][lane] = next;
                next += byte >> lane & 1;
            }
    }
};
inline const Places& places() {
    static const Places table;
    return table;
}

inline __m256 widen_8(const float* from, int count) {
    if (count == 8) return _mm256_loadu_ps(from);
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_maskload_ps(from, _mm256_cmpgt_epi32(_mm256_set1_epi32(count), lane));
}
inline __m256 widen_8(const bf16* from, int count) {
    alignas(16) bf16 some[8];
    __m128i halves;
    if (count == 8)
        halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    else {
        std::memcpy(some, from, size_t(count) * sizeof(bf16));
        halves = _mm_load_si128(reinterpret_cast<const __m128i*>(some));
    }
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

inline float sum_of(__m256 v) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

template <class Type> struct Kernel {
    using T = Type;
    using C = float;
    static constexpr int64_t lanes = 8;
    static constexpr int rows_at_once = 3;
    static constexpr int columns_at_once = 4;  // 3 x 4 sums take 12 of 16 registers

    static void expand(const Packed<T>& w, int64_t row, float* out) {
        const Places& table = places();
        const T* values = w.values + w.row_offsets[row];
        const T* end = w.values + w.count;
        const uint8_t* mask = w.mask_row(row);
        const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
        for (int64_t i = 0; i < w.bytes_per_row(); ++i, out += 8) {
            // an address past the end is allowed: a prefetch never faults
            _mm_prefetch(reinterpret_cast<const char*>(values) + 2048, _MM_HINT_T0);
            const int count = _mm_popcnt_u32(mask[i]);
            const __m256 packed = widen_8(values, end - values >= 8 ? 8 : count);
            const __m256i keep = _mm256_and_si256(_mm256_set1_epi32(mask[i]), bit);
            const __m256 placed = _mm256_permutevar8x32_ps(
                packed, _mm256_load_si256(reinterpret_cast<const __m256i*>(table.of[mask[i]])));
            _mm256_store_ps(out, _mm256_and_ps(placed, _mm256_castsi256_ps(_mm256_cmpeq_epi32(keep, bit))));
            values += count;
        }
    }
    template <int R, int C>
    static void block(const float* a, const float* b, int64_t stride, int64_t length, float* sums) {
        __m256 sum[R][C];
        for (int r = 0; r < R; ++r)
            for (int c = 0; c < C; ++c) sum[r][c] = _mm256_setzero_ps();
        for (int64_t k = 0; k < length; k += 8)
            for (int r = 0; r < R; ++r) {
                const __m256 row = _mm256_load_ps(a + r * stride + k);
                for (int c = 0; c < C; ++c) sum[r][c] = _mm256_fmadd_ps(row, _mm256_load_ps(b + c * stride + k), sum[r][c]);
            }
        for (int r = 0; r < R; ++r)
            for (int c = 0; c < C; ++c) sums[r * C + c] = sum_of(sum[r][c]);
    }
};

}  // namespace pst::avx2
