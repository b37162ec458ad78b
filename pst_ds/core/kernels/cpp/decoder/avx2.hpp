// Products with codes for AVX2 and AVX-VNNI: a byte shuffle looks up places in a window, for the low and high bytes of
// q.
//
// Layout: WINDOWS, PLACES and PAIRS of matrix.hpp, blocks of 8 rows. A step of WINDOWS takes two windows of 16 columns:
// 16 bytes of places, then 32 codes, two per row and window. The shuffle fetches bytes of q within halves of a register,
// one window in each; low and high bytes are interleaved to int16, and madd (or vpdpwssd) adds the two products of a row
// to its int32 sum. A step of PLACES takes 4 codes per row from one window, which both halves hold: 16 bytes of places,
// then 32 codes. PAIRS multiplies all columns, two per int32.
//
// Sums of a chunk are exact integers, so any order gives the same bits; floats are added chunk by chunk (Sums::add),
// one product and one sum each. Loads are unaligned and may pass a vector's end by PADDING bytes.

inline __m256i add_products(__m256i sum, __m256i codes, __m256i q) { return (__m256i)add_pairs((Ints)sum, (Ints)codes, (Ints)q); }

inline __m256i twice(const uint8_t* from) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
inline __m128i half(const uint8_t* from) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)); }
inline __m256i wide(__m128i codes) { return _mm256_cvtepi8_epi16(codes); }
inline __m128i signed_nibbles(__m128i bytes) {  // of the lower halves
    const __m128i eight = _mm_set1_epi8(8);
    return _mm_sub_epi8(_mm_xor_si128(_mm_and_si128(bytes, _mm_set1_epi8(15)), eight), eight);
}
inline __m256i eight_scales(const uint16_t* scales) {  // as bits of floats
    return _mm256_slli_epi32(_mm256_cvtepu16_epi32(half(reinterpret_cast<const uint8_t*>(scales))), 16);
}

// The next 32 codes of 8 rows, as two vectors of 16-bit integers.
template <int BITS> inline void codes_at(const uint8_t* data, __m256i& first, __m256i& second) {
    if (BITS == 8) {
        first = wide(half(data));
        second = wide(half(data + 16));
        return;
    }
    const __m128i bytes = half(data);
    first = wide(signed_nibbles(bytes));
    second = wide(signed_nibbles(_mm_srli_epi16(bytes, 4)));
}

// Prefetch a stream from memory: the hardware prefetcher stops at every page of 4 KiB.
inline void fetch_ahead(const uint8_t* data) { _mm_prefetch(reinterpret_cast<const char*>(data) + 4096, _MM_HINT_T0); }

template <int TOKENS> struct Sums {
    const uint16_t* row_scales;
    const float* x_scales;
    const int64_t chunks;
    __m256 total[TOKENS];
    Sums(const ProductJob& job, int64_t block, int64_t token)
        : row_scales(job.m.scales.data() + block * job.m.chunks() * ROWS), x_scales(job.q.scales_of(token)), chunks(job.q.chunks) {
        for (int t = 0; t < TOKENS; ++t) total[t] = _mm256_setzero_ps();
    }
    void add(const __m256i (&chunk)[TOKENS]) {
        const __m256 scales = _mm256_castsi256_ps(eight_scales(row_scales));
#pragma GCC unroll 8
        for (int t = 0; t < TOKENS; ++t) {
            const __m256 scale = _mm256_mul_ps(scales, _mm256_broadcast_ss(x_scales + t * chunks));
            total[t] = _mm256_add_ps(total[t], _mm256_mul_ps(_mm256_cvtepi32_ps(chunk[t]), scale));
        }
        row_scales += ROWS;
        ++x_scales;
    }
    void store(const ProductJob& job, int64_t block, int64_t token) const {
        for (int t = 0; t < TOKENS; ++t) {
            float rows[ROWS];
            _mm256_storeu_ps(rows, total[t]);
            store_rows(rows, job.m, block, job.y + (token + t) * job.y_width);
        }
    }
};

inline __m256i two_windows(const uint8_t* first, const uint8_t* second) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(half(first)), half(second), 1);
}

template <int BITS, int TOKENS> inline void window_rows(const ProductJob& job, int64_t block, int64_t token) {
    const Matrix& m = job.m;
    const uint8_t* data = m.data.data() + m.first_byte[size_t(block)];
    const uint8_t* move = m.moves.data() + m.first_move[size_t(block)];
    const __m256i halves = _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4);
    const __m256i nibble = _mm256_set1_epi8(15);
    Sums<TOKENS> sums(job, block, token);
    for (int64_t c = 0; c < m.chunks(); ++c) {
        // sums of rows 0 to 3 and of rows 4 to 7: the first window in the lower half, the second in the upper
        __m256i first_rows[TOKENS];
        __m256i other_rows[TOKENS];
#pragma GCC unroll 8
        for (int t = 0; t < TOKENS; ++t) first_rows[t] = other_rows[t] = _mm256_setzero_si256();
        const uint8_t* low = job.q.low_of(token) + c * m.chunk;
        const uint8_t* high = job.q.high_of(token) + c * m.chunk;
        const uint8_t* end = move + 2 * m.steps[size_t(block * m.chunks() + c)];
        for (int64_t at = 0; move < end; move += 2, data += 16 + 4 * BITS) {
            const int64_t before = at + move[0];
            at = before + move[1];
            const __m256i places = _mm256_and_si256(_mm256_srlv_epi32(twice(data), halves), nibble);
            __m256i first;
            __m256i other;
            if (TOKENS == 1) fetch_ahead(data);
            codes_at<BITS>(data + 16, first, other);
#pragma GCC unroll 8
            for (int t = 0; t < TOKENS; ++t) {
                const uint8_t* l = low + t * job.q.stride;
                const uint8_t* h = high + t * job.q.stride;
                const __m256i lows = _mm256_shuffle_epi8(two_windows(l + before, l + at), places);
                const __m256i highs = _mm256_shuffle_epi8(two_windows(h + before, h + at), places);
                first_rows[t] = add_products(first_rows[t], first, _mm256_unpacklo_epi8(lows, highs));
                other_rows[t] = add_products(other_rows[t], other, _mm256_unpackhi_epi8(lows, highs));
            }
        }
        __m256i chunk[TOKENS];
#pragma GCC unroll 8
        for (int t = 0; t < TOKENS; ++t)
            chunk[t] = _mm256_add_epi32(_mm256_permute2x128_si256(first_rows[t], other_rows[t], 0x20),
                                        _mm256_permute2x128_si256(first_rows[t], other_rows[t], 0x31));
        sums.add(chunk);
    }
    sums.store(job, block, token);
}

inline __m256i two_columns(const int16_t* q) {
    int32_t pair;
    std::memcpy(&pair, q, 4);
    return _mm256_set1_epi32(pair);
}

// Four vectors of 16 codes of 2 columns: of 8 columns with codes 0 .. 15, or of 4 columns twice.
template <int BITS> inline void columns_at(const uint8_t* data, __m256i (&codes)[4]) {
    if (BITS == 8) {
        codes_at<8>(data, codes[0], codes[1]);
        return codes_at<8>(data + 32, codes[2], codes[3]);
    }
    const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data));
    const __m256i lowest = _mm256_set1_epi16(15);
    codes[0] = _mm256_and_si256(words, lowest);
    codes[1] = _mm256_and_si256(_mm256_srli_epi16(words, 4), lowest);
    codes[2] = _mm256_and_si256(_mm256_srli_epi16(words, 8), lowest);
    codes[3] = _mm256_srli_epi16(words, 12);
}

template <int BITS, int TOKENS> inline void pair_rows(const ProductJob& job, int64_t block, int64_t token) {
    constexpr int CHAINS = TOKENS == 4 ? 2 : 4;  // independent sums
    const Matrix& m = job.m;
    const uint8_t* data = m.data.data() + m.first_byte[size_t(block)];
    Sums<TOKENS> sums(job, block, token);
    for (int64_t c = 0; c < m.chunks(); ++c) {
        __m256i chain[TOKENS][CHAINS];
        __m256i chunk[TOKENS];
        for (auto& of_token : chain)
            for (__m256i& sum : of_token) sum = _mm256_setzero_si256();
        const int16_t* q = job.q.q_of(token) + c * m.chunk;
        const int16_t* end = job.q.q_of(token) + m.chunk_end(c);
        for (; q + 8 <= end || (BITS == 4 && q < end); q += 8, data += BITS * 8) {
            __m256i codes[4];
            if (TOKENS == 1) fetch_ahead(data);
            columns_at<BITS>(data, codes);
#pragma GCC unroll 8
            for (int t = 0; t < TOKENS; ++t)
#pragma GCC unroll 4
                for (int i = 0; i < 4; ++i)
                    chain[t][i % CHAINS] = add_products(chain[t][i % CHAINS], codes[i], two_columns(q + t * job.q.stride + 2 * i));
        }
        for (; q < end; q += 4, data += 32) {
            __m256i codes[2];
            codes_at<8>(data, codes[0], codes[1]);
            for (int t = 0; t < TOKENS; ++t)
                for (int i = 0; i < 2; ++i)
                    chain[t][i] = add_products(chain[t][i], codes[i], two_columns(q + t * job.q.stride + 2 * i));
        }
#pragma GCC unroll 8
        for (int t = 0; t < TOKENS; ++t) {
            chunk[t] = chain[t][0];
            for (int i = 1; i < CHAINS; ++i) chunk[t] = _mm256_add_epi32(chunk[t], chain[t][i]);
            if (BITS == 4)  // the codes are 8 too large
                chunk[t] = _mm256_sub_epi32(chunk[t], _mm256_set1_epi32(8 * job.q.sums_of(token + t)[c]));
        }
        sums.add(chunk);
    }
    sums.store(job, block, token);
}

// STEPS of 4 codes per row and window.
template <int BITS, int STEPS, int TOKENS> inline void place_rows(const ProductJob& job, int64_t block, int64_t token) {
    constexpr int CHAINS = TOKENS == 4 ? 2 : 2 * STEPS;  // independent sums
    const Matrix& m = job.m;
    const uint8_t* data = m.data.data() + m.first_byte[size_t(block)];
    const __m256i halves = _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4);
    const __m256i nibble = _mm256_set1_epi8(15);
    Sums<TOKENS> sums(job, block, token);
    for (int64_t c = 0; c < m.chunks(); ++c) {
        __m256i chain[TOKENS][CHAINS];
        for (auto& of_token : chain)
            for (__m256i& sum : of_token) sum = _mm256_setzero_si256();
        const uint8_t* low = job.q.low_of(token);
        const uint8_t* high = job.q.high_of(token);
        const int64_t end = m.chunk_end(c);
        for (int64_t first = c * m.chunk; first < end; first += WINDOW) {
#pragma GCC unroll 2
            for (int step = 0; step < STEPS; ++step, data += 16 + 4 * BITS) {
                const __m256i places = _mm256_and_si256(_mm256_srlv_epi32(twice(data), halves), nibble);
                __m256i codes;
                __m256i others;
                if (TOKENS == 1) fetch_ahead(data);
                codes_at<BITS>(data + 16, codes, others);
#pragma GCC unroll 8
                for (int t = 0; t < TOKENS; ++t) {
                    const __m256i l = _mm256_shuffle_epi8(twice(low + t * job.q.stride + first), places);
                    const __m256i h = _mm256_shuffle_epi8(twice(high + t * job.q.stride + first), places);
                    __m256i* to = chain[t] + 2 * step % CHAINS;
                    to[0] = add_products(to[0], codes, _mm256_unpacklo_epi8(l, h));
                    to[1] = add_products(to[1], others, _mm256_unpackhi_epi8(l, h));
                }
            }
        }
        __m256i chunk[TOKENS];
#pragma GCC unroll 8
        for (int t = 0; t < TOKENS; ++t) {
            chunk[t] = chain[t][0];
            for (int i = 1; i < CHAINS; ++i) chunk[t] = _mm256_add_epi32(chunk[t], chain[t][i]);
        }
        sums.add(chunk);
    }
    sums.store(job, block, token);
}

template <int BITS, int TOKENS> inline void rows_of(const ProductJob& job, int64_t block, int64_t token) {
    const Matrix& m = job.m;
    if (m.layout == WINDOWS) return window_rows<BITS, TOKENS>(job, block, token);
    if (m.layout == PLACES && m.slots == 8) return place_rows<BITS, 2, TOKENS>(job, block, token);
    if (m.layout == PLACES) return place_rows<BITS, 1, TOKENS>(job, block, token);
    pair_rows<BITS, TOKENS>(job, block, token);
}
