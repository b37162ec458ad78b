// softmax(scale q k' + mask) v with products in bf16, for AVX-512 with BF16: of graphs with 8-bit activations, whose q, k and v
// have fewer correct bits than bf16. Included after attention.hpp, in its namespace and in a region compiled for it.
//
// vdpbf16ps adds two products to each of 16 fp32 sums, so operands hold pairs of neighbouring numbers in words of 32 bits.
//
// Layout, copies of one head in bf16
//   keys     [pair of dimensions][padded keys] of pairs: a vector holds consecutive keys
//   values   [pair of keys][dimension] of pairs: a vector holds consecutive dimensions
//   queries  [query][dimension]
//   scores   [QUERIES][padded keys] fp32, then the same in bf16 for e^score
// `padded` is a multiple of LANES, of which places from the last key on are zeros. Heads have a multiple of LANES
// dimensions. Sums are in increasing order of dimensions and keys, for one query as for QUERIES.

namespace narrow {

struct Copies {
    uint32_t* keys;
    uint32_t* values;
    uint16_t* queries;
    float* scores;
    uint16_t* powers;
    int64_t padded;
    int64_t head;
};

// 32 numbers in bf16, `first` in the lower half.
inline __m512i pairs_of(__m512 first, __m512 second) { return (__m512i)_mm512_cvtne2ps_pbh(second, first); }
inline __m256i narrowed(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }
inline __m512 add_pairs(__m512 sum, __m512i a, __m512i b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
inline __m512i broadcast(const uint16_t* pair) {
    int32_t two;
    std::memcpy(&two, pair, 4);
    return _mm512_set1_epi32(two);
}

// Keys to pairs of dimensions. A square of LANES keys by 2 LANES dimensions is transposed at a time; the last may be half as wide.
inline void copy_keys(const Head& k, int64_t count, const Copies& to) {
    for (int64_t key = 0; key < to.padded; key += LANES)
        for (int64_t d = 0; d < to.head; d += 2 * LANES) {
            Floats square[LANES];
            const bool is_whole = d + 2 * LANES <= to.head;
            for (int i = 0; i < LANES; ++i) {
                __m512 first = _mm512_setzero_ps();
                __m512 second = first;
                if (key + i < count) first = _mm512_loadu_ps(k.row(key + i) + d);
                if (key + i < count && is_whole) second = _mm512_loadu_ps(k.row(key + i) + d + LANES);
                square[i] = (Floats)pairs_of(first, second);
            }
            transpose(square);
            for (int i = 0; i < (is_whole ? LANES : LANES / 2); ++i)
                _mm512_storeu_si512(to.keys + (d / 2 + i) * to.padded + key, (__m512i)square[i]);
        }
}

// Values to pairs of keys: the even key in the lower half of each word, the odd one in the upper.
inline void copy_values(const Head& v, int64_t count, const Copies& to) {
    for (int64_t key = 0; key < to.padded; key += 2)
        for (int64_t d = 0; d < to.head; d += LANES) {
            __m256i even = _mm256_setzero_si256();
            __m256i odd = even;
            if (key < count) even = narrowed(_mm512_loadu_ps(v.row(key) + d));
            if (key + 1 < count) odd = narrowed(_mm512_loadu_ps(v.row(key + 1) + d));
            const __m512i pairs = _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
            _mm512_storeu_si512(to.values + key / 2 * to.head + d, pairs);
        }
}

inline void copy_queries(const Head& q, int64_t count, const Copies& to) {
    for (int64_t query = 0; query < count; ++query)
        for (int64_t d = 0; d < to.head; d += LANES)
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(to.queries + query * to.head + d), narrowed(_mm512_loadu_ps(q.row(query) + d)));
}

// e^x for x <= 0, to 5e-5: 2^n 2^r with a Taylor polynomial for 2^r, |r| <= 1/2. Below -87 it is about 1e-38.
inline __m512 power_of(__m512 x) {
    const __m512 scaled = _mm512_mul_ps(_mm512_max_ps(x, _mm512_set1_ps(-87.0f)), _mm512_set1_ps(1.44269504f));
    const __m512 n = _mm512_roundscale_ps(scaled, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 r = _mm512_sub_ps(scaled, n);
    __m512 p = _mm512_set1_ps(9.6181291e-3f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.5504109e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.4022651e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.9314718e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}

// sum[r][c] = the products of row r of `rows` with the c-th vector of columns of `columns`, over `count` places, which is even.
// `rows` holds single numbers, `stride` apart from row to row; `columns` holds pairs, `width` words from pair to pair.
// ROWS * VECTORS sums stay in registers: each vector of columns is read once for all rows.
template <int ROWS, int VECTORS>
inline void multiply(const uint16_t* rows, int64_t stride, const uint32_t* columns, int64_t width, int64_t count,
                     __m512 (&sum)[ROWS][VECTORS]) {
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (int c = 0; c < VECTORS; ++c) sum[r][c] = _mm512_setzero_ps();
    for (int64_t place = 0; place < count; place += 2, columns += width) {
        __m512i column[VECTORS];
#pragma GCC unroll 4
        for (int c = 0; c < VECTORS; ++c) column[c] = _mm512_loadu_si512(columns + c * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
            const __m512i pair = broadcast(rows + r * stride + place);
#pragma GCC unroll 4
            for (int c = 0; c < VECTORS; ++c) sum[r][c] = add_pairs(sum[r][c], pair, column[c]);
        }
    }
}

// Scores of ROWS queries with VECTORS vectors of keys from `key` on, with scale and mask. `most`: the largest so far.
template <int ROWS, int VECTORS>
inline void scores_of(const Copies& at, int64_t query, int64_t key, int64_t count, float scale, const Mask& mask, __m512 (&most)[ROWS]) {
    __m512 sum[ROWS][VECTORS];
    multiply(at.queries + query * at.head, at.head, at.keys + key, at.padded, at.head, sum);
    const __m512 least = _mm512_set1_ps(-3.0e38f);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (int c = 0; c < VECTORS; ++c) {
            const int64_t first = key + c * LANES;
            const __mmask16 exist = first + LANES <= count ? 0xffff : __mmask16((1 << (count - first)) - 1);
            __m512 value = _mm512_mul_ps(sum[r][c], _mm512_set1_ps(scale));
            if (mask.first) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(exist, mask.first + (query + r) * mask.stride + first));
            value = _mm512_mask_max_ps(least, exist, value, least);
            most[r] = _mm512_max_ps(most[r], value);
            _mm512_storeu_ps(at.scores + r * at.padded + first, value);
        }
}

// out[query][d] for ROWS queries and VECTORS vectors of dimensions from d on.
template <int ROWS, int VECTORS>
inline void values_of(const Copies& at, int64_t query, int64_t d, const float* share, const Head& out) {
    __m512 sum[ROWS][VECTORS];
    multiply(at.powers, at.padded, at.values + d, at.head, at.padded, sum);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
        for (int c = 0; c < VECTORS; ++c)
            _mm512_storeu_ps(out.row(query + r) + d + c * LANES, _mm512_mul_ps(sum[r][c], _mm512_set1_ps(share[r])));
}

// Results of ROWS queries: scores, then e^(score - largest) in bf16, then values. The total is of fp32 powers, and divides last.
template <int ROWS>
inline void rows_of(const Copies& at, int64_t query, int64_t count, float scale, const Mask& mask, const Head& out) {
    __m512 most[ROWS];
    for (__m512& row : most) row = _mm512_set1_ps(-3.0e38f);
    int64_t key = 0;
    for (; key + 4 * LANES <= at.padded; key += 4 * LANES) scores_of<ROWS, 4>(at, query, key, count, scale, mask, most);
    for (; key + 2 * LANES <= at.padded; key += 2 * LANES) scores_of<ROWS, 2>(at, query, key, count, scale, mask, most);
    for (; key < at.padded; key += LANES) scores_of<ROWS, 1>(at, query, key, count, scale, mask, most);
    float share[ROWS];
    for (int r = 0; r < ROWS; ++r) {
        const __m512 top = _mm512_set1_ps(_mm512_reduce_max_ps(most[r]));
        __m512 total = _mm512_setzero_ps();
        for (key = 0; key < at.padded; key += LANES) {
            const __mmask16 exist = key + LANES <= count ? 0xffff : __mmask16((1 << (count - key)) - 1);
            const __m512 power = _mm512_maskz_mov_ps(exist, power_of(_mm512_sub_ps(_mm512_loadu_ps(at.scores + r * at.padded + key), top)));
            total = _mm512_add_ps(total, power);
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(at.powers + r * at.padded + key), narrowed(power));
        }
        share[r] = 1.0f / _mm512_reduce_add_ps(total);
    }
    int64_t d = 0;
    for (; d + 2 * LANES <= at.head; d += 2 * LANES) values_of<ROWS, 2>(at, query, d, share, out);
    for (; d < at.head; d += LANES) values_of<ROWS, 1>(at, query, d, share, out);
}

// Prefetch rows [first, last) of the next head, which lies behind this one: rows are far apart, so the processor does not.
inline void fetch_next(const Head& x, int64_t first, int64_t last, int64_t head) {
    for (int64_t i = first; i < last; ++i)
        for (int64_t d = 0; d < head; d += LANES) __builtin_prefetch(x.row(i) + head + d, 0, 2);
}

// One head of `num_queries` and `num_keys`. False if memory is short.
inline bool attend(const Head& q, const Head& k, const Head& v, int64_t num_queries, int64_t num_keys, int64_t head, float scale,
                   const Mask& mask, const Head& out) {
    static thread_local Scratch memory;
    const int64_t padded = round_up(num_keys, LANES);
    // in words of 32 bits
    const int64_t of_keys = head / 2 * padded;
    const int64_t of_queries = round_up(num_queries * head / 2, LANES);
    const int64_t of_scores = QUERIES * padded;
    uint32_t* words = memory.get<uint32_t>(2 * of_keys + of_queries + of_scores + of_scores / 2);
    if (!words) return false;
    const Copies at{words, words + of_keys, reinterpret_cast<uint16_t*>(words + 2 * of_keys),
                    reinterpret_cast<float*>(words + 2 * of_keys + of_queries),
                    reinterpret_cast<uint16_t*>(words + 2 * of_keys + of_queries + of_scores), padded, head};
    copy_keys(k, num_keys, at);
    copy_values(v, num_keys, at);
    copy_queries(q, num_queries, at);
    int64_t query = 0;
    for (; query + QUERIES <= num_queries; query += QUERIES) {
        fetch_next(q, query, query + QUERIES, head);
        fetch_next(k, query, std::min(num_keys, query + QUERIES), head);
        fetch_next(v, query, std::min(num_keys, query + QUERIES), head);
        rows_of<QUERIES>(at, query, num_keys, scale, mask, out);
    }
    static_assert(QUERIES == 6, "the cases below are all remainders");
    switch (num_queries - query) {
        case 5: rows_of<5>(at, query, num_keys, scale, mask, out); break;
        case 4: rows_of<4>(at, query, num_keys, scale, mask, out); break;
        case 3: rows_of<3>(at, query, num_keys, scale, mask, out); break;
        case 2: rows_of<2>(at, query, num_keys, scale, mask, out); break;
        case 1: rows_of<1>(at, query, num_keys, scale, mask, out); break;
        default: break;
    }
    return true;
}

}  // namespace narrow

// Of heads with a multiple of LANES dimensions; others are multiplied in fp32.
template <class Parallel> bool narrow_attention(const AttentionCall& job, const Parallel& parallel) {
    return each_head(job, parallel, job.head % LANES ? attend : narrow::attend);
}
