// AVX-512 with VBMI2 and BF16: 32 values at a time are expanded under their mask bits, then multiplied in pairs.
// Included inside a region that is compiled for these instructions.
//
// Layout
//   packed W   as in common.hpp; a word of 32 mask bits and the values from `from` on make a vector of 32 weights
//   expanded   (rows, stride) bf16 in working memory, aligned to 64 bytes; every row is a multiple of 32 columns, zeros
//              at pruned places and behind the last column
//   x          (n, stride) bf16, padded with zeros to 32; or fp32 for one vector, see dot()
// A bf16 dot product (dpbf16ps) adds two products to each of 16 fp32 sums, so bf16 weights need no widening.
//
// At the end of `values` a vector of 32 values would pass the array. OVERREAD = false masks the load, which is slower;
// rows far enough from the end use OVERREAD = true (may_overread).
#pragma once

#include "common.hpp"

namespace pst::avx512 {

constexpr int64_t LANES = 32;         // bf16 values of a register
constexpr int64_t AHEAD = 3072;       // bytes to prefetch ahead of a row's values
constexpr int64_t MASK_AHEAD = 1024;  // bytes to prefetch ahead of its mask

template <bool OVERREAD> inline __m512i load_values(const bf16* from, int count) {
    if (OVERREAD) return _mm512_loadu_si512(from);
    return _mm512_maskz_loadu_epi16(_bzhi_u32(~0u, unsigned(count)), from);  // reads nothing beyond the array
}

// The next 32 weights of a row, zeros where `mask` has none; advances `from` behind their values.
template <bool OVERREAD> inline __m512i expand(uint32_t mask, const bf16*& from) {
    const int count = _mm_popcnt_u32(mask);
    const __m512i values = _mm512_maskz_expand_epi16(mask, load_values<OVERREAD>(from, count));
    from += count;
    return values;
}

inline uint32_t load_word(const uint8_t* mask) {
    uint32_t word;
    std::memcpy(&word, mask, 4);
    return word;
}

// sum + 32 weights times x, in pairs. x: unchanged, padded with zeros.
inline __m512 dot(__m512 sum, __m512i weights, const bf16* x) {
    return _mm512_dpbf16_ps(sum, (__m512bh)weights, (__m512bh)_mm512_loadu_si512(x));
}
// The same with fp32 products, which Intel's processors execute faster: there a bf16 dot product takes as long as five
// other instructions, on the port that expansion needs. x: of each 32 values first those at even places, then those at
// odd.
inline __m512 dot(__m512 sum, __m512i weights, const float* x) {
    const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(weights, 16));
    const __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(weights, _mm512_set1_epi32(int(0xffff0000))));
    return _mm512_fmadd_ps(odd, _mm512_loadu_ps(x + 16), _mm512_fmadd_ps(even, _mm512_loadu_ps(x), sum));
}

template <int LINES> inline void prefetch(const bf16* values, const uint8_t* mask, int64_t ahead = AHEAD) {
    const char* at = reinterpret_cast<const char*>(values) + ahead;
    for (int i = 0; i < LINES; ++i) _mm_prefetch(at + 64 * i, _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(mask) + MASK_AHEAD, _MM_HINT_T0);
}

// ROWS rows, far from each other, times one vector: several streams keep the memory busy. LINES: cache lines of values
// in 128 columns, to prefetch. OVERREAD: whether whole vectors may be read at the ends of rows.
template <int LINES, int ROWS, bool OVERREAD, class X>
inline void rows_dot(const Packed<bf16>& w, const int64_t (&row)[ROWS], const X* x, float (&sums)[ROWS]) {
    const bf16* values[ROWS];
    const uint8_t* mask[ROWS];
    __m512 sum[ROWS][4];
    for (int r = 0; r < ROWS; ++r) {
        values[r] = w.values + w.row_offsets[row[r]];
        mask[r] = w.mask_row(row[r]);
        for (int i = 0; i < 4; ++i) sum[r][i] = _mm512_setzero_ps();
    }
    int64_t col = 0;
    // four sums per row, because a product takes several cycles and each sum waits for its own last one
    for (; col + 4 * LANES <= w.cols; col += 4 * LANES)
        for (int r = 0; r < ROWS; ++r) {
            prefetch<LINES>(values[r], mask[r] + col / 8);
            for (int i = 0; i < 4; ++i) {
                const uint32_t word = load_word(mask[r] + col / 8 + 4 * i);
                sum[r][i] = dot(sum[r][i], expand<OVERREAD>(word, values[r]), x + col + i * LANES);
            }
        }
    for (; col < w.cols; col += LANES)
        for (int r = 0; r < ROWS; ++r) {
            const uint32_t word = mask_word(mask[r], w.bytes_per_row(), col);
            sum[r][0] = dot(sum[r][0], expand<OVERREAD>(word, values[r]), x + col);
        }
    for (int r = 0; r < ROWS; ++r)
        sums[r] = _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sum[r][0], sum[r][1]), _mm512_add_ps(sum[r][2], sum[r][3])));
}

// Expand a whole row, pruned entries zero, to `out`, up to the next multiple of 32 columns.
template <int LINES, bool OVERREAD> inline void expand_row(const Packed<bf16>& w, int64_t row, bf16* out) {
    const bf16* values = w.values + w.row_offsets[row];
    const uint8_t* mask = w.mask_row(row);
    int64_t col = 0;
    for (; col + 4 * LANES <= w.cols; col += 4 * LANES) {
        prefetch<LINES>(values, mask + col / 8);
        for (int i = 0; i < 4; ++i)
            _mm512_store_si512(out + col + i * LANES, expand<OVERREAD>(load_word(mask + col / 8 + 4 * i), values));
    }
    for (; col < w.cols; col += LANES)
        _mm512_store_si512(out + col, expand<OVERREAD>(mask_word(mask, w.bytes_per_row(), col), values));
}

// A block of rows and vectors: 24 sums and 3 rows' values take 27 of 32 registers.
constexpr int ROWS = 3;
constexpr int COLUMNS = 8;

// Rows to expand while others are multiplied, in equal number and in step, so that both execution ports and the memory
// are busy.
template <int N> struct Beside {
    const bf16* values[N];
    const uint8_t* mask[N];
    bf16* out;
};

// sums[r][c] = row r of a times row c of b. Both are `length` long, a multiple of LANES.
template <int R, int C, bool BESIDE, int LINES = 1>
inline void block(const bf16* a, const bf16* b, int64_t stride, int64_t length, float* sums, const Packed<bf16>* w = nullptr,
                  const Beside<R>* beside = nullptr) {
    __m512 sum[R][C];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) sum[r][c] = _mm512_setzero_ps();
    const bf16* next[R];
    for (int r = 0; r < R; ++r) next[r] = BESIDE ? beside->values[r] : nullptr;
    const int64_t whole = BESIDE ? w->cols / LANES * LANES : 0;
    for (int64_t k = 0; k < length; k += LANES) {
        __m512i values[R];
        for (int r = 0; r < R; ++r) values[r] = _mm512_load_si512(a + r * stride + k);
        for (int c = 0; c < C; ++c) {
            const __m512bh x = (__m512bh)_mm512_load_si512(b + c * stride + k);
            for (int r = 0; r < R; ++r) sum[r][c] = _mm512_dpbf16_ps(sum[r][c], (__m512bh)values[r], x);
        }
        if (BESIDE && k % (4 * LANES) == 0)
            for (int r = 0; r < R; ++r) prefetch<LINES>(next[r], beside->mask[r] + k / 8);
        if (BESIDE)
            for (int r = 0; r < R; ++r) {
                const uint8_t* mask = beside->mask[r];
                const uint32_t word = k < whole ? load_word(mask + k / 8) : mask_word(mask, w->bytes_per_row(), k);
                _mm512_store_si512(beside->out + r * stride + k, expand<true>(word, next[r]));
            }
    }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) sums[r * C + c] = _mm512_reduce_add_ps(sum[r][c]);
}

// Kernel of panel.hpp for bf16.
template <int LINES> struct Bf16 {
    using T = bf16;
    using C = bf16;
    static constexpr int64_t lanes = LANES;
    static constexpr int rows_at_once = ROWS;
    static constexpr int columns_at_once = COLUMNS;

    static void expand(const Packed<bf16>& w, int64_t row, bf16* out) {
        w.may_overread(row, LANES) ? expand_row<LINES, true>(w, row, out) : expand_row<LINES, false>(w, row, out);
    }
    template <int R, int C>
    static void block(const bf16* a, const bf16* b, int64_t stride, int64_t length, float* sums) {
        avx512::block<R, C, false>(a, b, stride, length, sums);
    }
};

// Kernel of panel.hpp for fp32: 16 values at a time, two halves of a word of 32 mask bits.
struct Fp32 {
    using T = float;
    using C = float;
    static constexpr int64_t lanes = 16;
    static constexpr int rows_at_once = 4;
    static constexpr int columns_at_once = 4;

    static void expand(const Packed<float>& w, int64_t row, float* out) {
        w.may_overread(row, lanes) ? expand_row<true>(w, row, out) : expand_row<false>(w, row, out);
    }
    template <bool OVERREAD> static void expand_row(const Packed<float>& w, int64_t row, float* out) {
        const float* values = w.values + w.row_offsets[row];
        const uint8_t* mask = w.mask_row(row);
        for (int64_t col = 0; col < w.cols; col += LANES) {
            const uint32_t word = mask_word(mask, w.bytes_per_row(), col);
            _mm_prefetch(reinterpret_cast<const char*>(values) + AHEAD, _MM_HINT_T0);
            for (int half = 0; half < 2 && col + half * lanes < w.cols; ++half) {
                const __mmask16 bits = __mmask16(word >> 16 * half);
                const int count = _mm_popcnt_u32(bits);
                const __mmask16 there = OVERREAD ? __mmask16(0xffff) : __mmask16(_bzhi_u32(~0u, unsigned(count)));
                _mm512_store_ps(out + col + half * lanes, _mm512_maskz_expand_ps(bits, _mm512_maskz_loadu_ps(there, values)));
                values += count;
            }
        }
    }
    template <int R, int C>
    static void block(const float* a, const float* b, int64_t stride, int64_t length, float* sums) {
        __m512 sum[R][C];
        for (int r = 0; r < R; ++r)
            for (int c = 0; c < C; ++c) sum[r][c] = _mm512_setzero_ps();
        for (int64_t k = 0; k < length; k += 16)
            for (int c = 0; c < C; ++c) {
                const __m512 x = _mm512_load_ps(b + c * stride + k);
                for (int r = 0; r < R; ++r) sum[r][c] = _mm512_fmadd_ps(_mm512_load_ps(a + r * stride + k), x, sum[r][c]);
            }
        for (int r = 0; r < R; ++r)
            for (int c = 0; c < C; ++c) sums[r * C + c] = _mm512_reduce_add_ps(sum[r][c]);
    }
};

}  // namespace pst::avx512
