// AVX-512 with VBMI2 and BF16: 32 values are expanded under their mask bits at a time, then multiplied in pairs.
// Included inside a region that is compiled for these instructions.
#pragma once

#include "common.hpp"

namespace pst::avx512 {

constexpr int64_t LANES = 32, AHEAD = 3072, MASK_AHEAD = 1024;  // bytes to prefetch ahead, measured on two Xeons

template <bool OVERREAD> inline __m512i load_values(const bf16* from, int count) {
    if (OVERREAD) return _mm512_loadu_si512(from);
    return _mm512_maskz_loadu_epi16(_bzhi_u32(~0u, unsigned(count)), from);  // the last row: nothing beyond the array
}

template <bool OVERREAD> inline __m512i expand(uint32_t mask, const bf16*& from) {
    int count = _mm_popcnt_u32(mask);
    __m512i values = _mm512_maskz_expand_epi16(mask, load_values<OVERREAD>(from, count));
    from += count;
    return values;
}

inline __m512 dot(__m512 sum, __m512i a, const bf16* b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)_mm512_loadu_si512(b));
}

template <int LINES> inline void prefetch(const bf16* values, const uint8_t* mask) {
    const char* at = reinterpret_cast<const char*>(values) + AHEAD;
    for (int i = 0; i < LINES; ++i) _mm_prefetch(at + 64 * i, _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(mask) + MASK_AHEAD, _MM_HINT_T0);
}

// One row times one vector.
template <int LINES, bool OVERREAD>
inline float row_dot(const bf16* values, const uint8_t* mask, int64_t bytes, int64_t cols, const bf16* x) {
    __m512 sum[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
    int64_t col = 0;
    for (; col + 4 * LANES <= cols; col += 4 * LANES) {
        prefetch<LINES>(values, mask + col / 8);
        for (int i = 0; i < 4; ++i) {
            uint32_t word;
            std::memcpy(&word, mask + col / 8 + 4 * i, 4);
            sum[i] = dot(sum[i], expand<OVERREAD>(word, values), x + col + i * LANES);
        }
    }
    for (; col < cols; col += LANES) sum[0] = dot(sum[0], expand<OVERREAD>(mask_word(mask, bytes, col), values), x + col);
    return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sum[0], sum[1]), _mm512_add_ps(sum[2], sum[3])));
}

template <int LINES> void vector_rows(const Job<bf16>& job, const bf16* x, int64_t first, int64_t last) {
    const Packed<bf16>& w = job.weight;
    for (int64_t row = first; row < last; ++row) {
        const bf16* values = w.values + w.row_offsets[row];
        float sum = w.may_overread(row, LANES)
                        ? row_dot<LINES, true>(values, w.mask_row(row), w.bytes_per_row(), w.cols, x)
                        : row_dot<LINES, false>(values, w.mask_row(row), w.bytes_per_row(), w.cols, x);
        job.store(0, row, sum);
    }
}

// A whole row, pruned entries zero, to `out`; up to the next multiple of 32 columns.
template <int LINES, bool OVERREAD>
inline void expand_row(const bf16* values, const uint8_t* mask, int64_t bytes, int64_t cols, bf16* out) {
    int64_t col = 0;
    for (; col + 4 * LANES <= cols; col += 4 * LANES) {
        prefetch<LINES>(values, mask + col / 8);
        for (int i = 0; i < 4; ++i) {
            uint32_t word;
            std::memcpy(&word, mask + col / 8 + 4 * i, 4);
            _mm512_store_si512(out + col + i * LANES, expand<OVERREAD>(word, values));
        }
    }
    for (; col < cols; col += LANES) _mm512_store_si512(out + col, expand<OVERREAD>(mask_word(mask, bytes, col), values));
}

template <int LINES> struct Bf16 {
    using T = bf16;
    using C = bf16;
    static constexpr int64_t lanes = LANES;
    static constexpr bool has_vector_rows = true;
    static constexpr int rows_at_once = 3, columns_at_once = 8;  // 24 sums and 3 rows' values in 32 registers

    static void vector_rows(const Job<bf16>& job, const bf16* x, int64_t first, int64_t last) {
        avx512::vector_rows<LINES>(job, x, first, last);
    }
    static void expand(const Packed<bf16>& w, int64_t row, bf16* out) {
        const bf16* values = w.values + w.row_offsets[row];
        if (w.may_overread(row, LANES))
            expand_row<LINES, true>(values, w.mask_row(row), w.bytes_per_row(), w.cols, out);
        else
            expand_row<LINES, false>(values, w.mask_row(row), w.bytes_per_row(), w.cols, out);
    }
    // sums[r][c] = row r of a times row c of b, both `length` long, a multiple of LANES
    template <int ROWS, int COLUMNS>
    static void block(const bf16* a, int64_t a_stride, const bf16* b, int64_t b_stride, int64_t length, float* sums) {
        __m512 sum[ROWS][COLUMNS];
        for (int r = 0; r < ROWS; ++r)
            for (int c = 0; c < COLUMNS; ++c) sum[r][c] = _mm512_setzero_ps();
        for (int64_t k = 0; k < length; k += LANES) {
            __m512i values[ROWS];
            for (int r = 0; r < ROWS; ++r) values[r] = _mm512_load_si512(a + r * a_stride + k);
            for (int c = 0; c < COLUMNS; ++c) {
                __m512bh x = (__m512bh)_mm512_load_si512(b + c * b_stride + k);
                for (int r = 0; r < ROWS; ++r) sum[r][c] = _mm512_dpbf16_ps(sum[r][c], (__m512bh)values[r], x);
            }
        }
        for (int r = 0; r < ROWS; ++r)
            for (int c = 0; c < COLUMNS; ++c) sums[r * COLUMNS + c] = _mm512_reduce_add_ps(sum[r][c]);
    }
};

}  // namespace pst::avx512
