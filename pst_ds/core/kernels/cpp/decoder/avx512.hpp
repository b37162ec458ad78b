// Products with codes for AVX-512 with VBMI2 and VNNI: a word of mask bits expands 64 columns of a row. q is read as q
// + 2^15, in two unsigned planes of bytes; Matrix::offsets contains what this adds to a sum, modulo 2^32.

constexpr int64_t AHEAD = 4096;  // bytes to prefetch

inline __m512i bytes_at(const uint8_t* from) {
    __m512i bytes = _mm512_loadu_si512(from);
    asm("" : "+v"(bytes));  // keeps it in a register: as a memory operand the expansion would take twice as long
    return bytes;
}

inline __m512i dot(__m512i sum, __m512i x, __m512i codes) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(codes));
    return sum;
}

// Expand the codes of 8 rows in a word of columns, 0 where pruned, and advance `data` and `masks`.
template <int BITS, bool MASKED> inline void expand(const uint8_t*& data, const uint64_t*& masks, __m512i (&codes)[8]) {
#pragma GCC unroll 4
    for (int line = 0; line < (MASKED ? 4 : BITS); ++line)  // half of the codes have as many
        _mm_prefetch(reinterpret_cast<const char*>(data) + AHEAD + 64 * line, _MM_HINT_T0);
    if (BITS == 8) {
#pragma GCC unroll 8
        for (int r = 0; r < 8; ++r) {
            codes[r] = MASKED ? _mm512_maskz_expand_epi8(masks[r], bytes_at(data)) : bytes_at(data);
            data += MASKED ? __builtin_popcountll(masks[r]) : 64;
        }
    } else {
        const __m512i table = _mm512_set4_epi32(int(0xfffefdfc), int(0xfbfaf9f8), 0x07060504, 0x03020100);  // signed
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) {
            const __m512i both = bytes_at(data), fifteen = _mm512_set1_epi8(15);
            const __m512i low = _mm512_shuffle_epi8(table, _mm512_and_si512(both, fifteen));
            const __m512i high = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(both, 4), fifteen));
            codes[r] = MASKED ? _mm512_maskz_expand_epi8(masks[r], low) : low;
            codes[r + 4] = MASKED ? _mm512_maskz_expand_epi8(masks[r + 4], high) : high;
            const int a = MASKED ? __builtin_popcountll(masks[r]) : 64, b = MASKED ? __builtin_popcountll(masks[r + 4]) : 64;
            data += a > b ? a : b;
        }
    }
    if (MASKED) masks += 8;
}

// The sums of 8 vectors of 16 integers.
inline __m256i sums_of(const __m512i (&a)[8]) {
    __m512i t[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
        t[i] = _mm512_add_epi32(_mm512_unpacklo_epi32(a[2 * i], a[2 * i + 1]), _mm512_unpackhi_epi32(a[2 * i], a[2 * i + 1]));
    const __m512i u = _mm512_add_epi32(_mm512_unpacklo_epi64(t[0], t[1]), _mm512_unpackhi_epi64(t[0], t[1]));
    const __m512i v = _mm512_add_epi32(_mm512_unpacklo_epi64(t[2], t[3]), _mm512_unpackhi_epi64(t[2], t[3]));
    // two halves of 4 rows
    const __m256i us = _mm256_add_epi32(_mm512_castsi512_si256(u), _mm512_extracti64x4_epi64(u, 1));
    const __m256i vs = _mm256_add_epi32(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64(v, 1));
    const __m128i first = _mm_add_epi32(_mm256_castsi256_si128(us), _mm256_extracti128_si256(us, 1));
    const __m128i second = _mm_add_epi32(_mm256_castsi256_si128(vs), _mm256_extracti128_si256(vs, 1));
    return _mm256_inserti128_si256(_mm256_castsi128_si256(first), second, 1);
}

inline __m256 scales_at(const uint16_t* scales) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(scales));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

// One vector: two sums per row of a block stay in registers.
template <int BITS, bool MASKED> inline void one_vector(const ProductJob& job, int64_t token) {
    const Matrix& m = job.m;
    const int64_t chunks = m.chunks(), words = m.words(), words_in_chunk = std::max<int64_t>(1, m.chunk / m.word);
    const uint8_t *low = job.q.low_of(token), *high = job.q.high_of(token), *data = m.data.data() + m.first_byte[size_t(job.first)];
    const uint64_t* masks = m.masks.data() + (MASKED ? job.first * words * ROWS : 0);
    for (int64_t block = job.first; block < job.last; ++block) {
        __m256 total = _mm256_setzero_ps();
        int64_t word = 0;
        for (int64_t c = 0; c < chunks; ++c) {
            __m512i h[8], l[8];
#pragma GCC unroll 8
            for (int r = 0; r < 8; ++r) h[r] = l[r] = _mm512_setzero_si512();
            const int64_t end = c + 1 == chunks ? words : std::min(words, word + words_in_chunk);
            for (; word < end; ++word) {
                __m512i codes[8];
                const __m512i x_low = _mm512_loadu_si512(low + word * m.word), x_high = _mm512_loadu_si512(high + word * m.word);
                expand<BITS, MASKED>(data, masks, codes);
#pragma GCC unroll 8
                for (int r = 0; r < 8; ++r) {
                    h[r] = dot(h[r], x_high, codes[r]);
                    l[r] = dot(l[r], x_low, codes[r]);
                }
            }
#pragma GCC unroll 8
            for (int r = 0; r < 8; ++r) l[r] = _mm512_add_epi32(_mm512_slli_epi32(h[r], 8), l[r]);
            const int64_t at = (block * chunks + c) * ROWS;
            const __m256i offset = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(m.offsets.data() + at));
            const __m256 scale = _mm256_mul_ps(scales_at(m.scales.data() + at), _mm256_set1_ps(job.q.scales_of(token)[c]));
            total = _mm256_add_ps(total, _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_sub_epi32(sums_of(l), offset)), scale));
        }
        float rows[ROWS];
        _mm256_storeu_ps(rows, total);
        store_rows(rows, m, block, job.y + token * job.y_width);
    }
}

// Transpose 16 x 16 words of 32 bits: 16 rows as bytes [4 columns][row][4].
inline void transpose_codes(__m512i (&a)[16], uint8_t* to) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 4) {
        t[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]), t[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
        t[i + 2] = _mm512_unpacklo_epi32(a[i + 2], a[i + 3]), t[i + 3] = _mm512_unpackhi_epi32(a[i + 2], a[i + 3]);
    }
    for (int i = 0; i < 16; i += 4) {
        a[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]), a[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]), a[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int j = 0; j < 4; ++j) {
        const __m512i u = _mm512_shuffle_i32x4(a[j], a[4 + j], 0x88), v = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x88);
        const __m512i p = _mm512_shuffle_i32x4(a[j], a[4 + j], 0xdd), q = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xdd);
        _mm512_storeu_si512(to + 64 * j, _mm512_shuffle_i32x4(u, v, 0x88));
        _mm512_storeu_si512(to + 64 * (j + 4), _mm512_shuffle_i32x4(p, q, 0x88));
        _mm512_storeu_si512(to + 64 * (j + 8), _mm512_shuffle_i32x4(u, v, 0xdd));
        _mm512_storeu_si512(to + 64 * (j + 12), _mm512_shuffle_i32x4(p, q, 0xdd));
    }
}

// Expand two blocks from `block` on; at the end, the last block twice. UNSIGNED: codes + 128.
template <int BITS, bool MASKED, bool UNSIGNED> inline void expand_16(const Matrix& m, int64_t block, uint8_t* panel) {
    const uint8_t* data[2];
    const uint64_t* masks[2];
    for (int i = 0; i < 2; ++i) {
        const int64_t b = std::min(block + i, m.blocks() - 1);
        data[i] = m.data.data() + m.first_byte[size_t(b)], masks[i] = m.masks.data() + (MASKED ? b * m.words() * ROWS : 0);
    }
    for (int64_t word = 0; word < m.words(); ++word) {
        __m512i rows[16], eight[8];
        for (int i = 0; i < 2; ++i) {
            expand<BITS, MASKED>(data[i], masks[i], eight);
            for (int r = 0; r < 8; ++r)
                rows[8 * i + r] = UNSIGNED ? _mm512_xor_si512(eight[r], _mm512_set1_epi8(char(0x80))) : eight[r];
        }
        transpose_codes(rows, panel + word * m.word * 16);  // the second half of a 32-column word is overwritten
    }
}

inline __m512i four_columns(const uint8_t* x) {
    int32_t four;
    std::memcpy(&four, x, 4);
    return _mm512_set1_epi32(four);
}

// The values of two blocks in a chunk, from `from` [block][chunk][8].
template <class T> struct Both {
    const T *first, *second;
    Both(const std::vector<T>& from, const Matrix& m, int64_t block, int64_t chunk) {
        first = from.data() + (block * m.chunks() + chunk) * ROWS;
        second = block + 1 < m.blocks() ? first + m.chunks() * ROWS : first;
    }
};
inline __m512i offsets_of(const Matrix& m, int64_t block, int64_t chunk) {
    const Both<int32_t> at(m.offsets, m, block, chunk);
    const __m256i first = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at.first));
    return _mm512_inserti64x4(_mm512_castsi256_si512(first), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at.second)), 1);
}
inline __m512 scales_of(const Matrix& m, int64_t block, int64_t chunk) {
    const Both<uint16_t> at(m.scales, m, block, chunk);
    return _mm512_insertf32x8(_mm512_castps256_ps512(scales_at(at.first)), scales_at(at.second), 1);
}

// total + the contribution of a chunk of 16 rows to a vector: its sums with the high and the low plane.
inline __m512 with_planes(__m512 total, __m512i high, __m512i low, __m512i offset, __m512 scales, float x_scale) {
    const __m512i sum = _mm512_sub_epi32(_mm512_add_epi32(_mm512_slli_epi32(high, 8), low), offset);
    return _mm512_add_ps(total, _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_mul_ps(scales, _mm512_set1_ps(x_scale))));
}

// Store two blocks of rows for TOKENS vectors; the second may belong to another thread.
template <int TOKENS> inline void store_panel(const ProductJob& job, int64_t block, int64_t token, const __m512* total) {
    for (int t = 0; t < TOKENS; ++t) {
        float rows[2 * ROWS], *y = job.y + (token + t) * job.y_width;
        _mm512_storeu_ps(rows, total[t]);
        store_rows(rows, job.m, block, y);
        if (block + 1 < job.last) store_rows(rows + ROWS, job.m, block + 1, y);
    }
}

// Vectors with PANELS times 16 expanded rows, from `block` on.
template <int TOKENS, int PANELS> inline void panel_rows(const ProductJob& job, int64_t block, int64_t token) {
    const Matrix& m = job.m;
    const int64_t chunks = m.chunks(), columns = m.words() * m.word;
    __m512 total[PANELS][TOKENS];
    for (auto& of_panel : total)
        for (__m512& sum : of_panel) sum = _mm512_setzero_ps();
    for (int64_t c = 0; c < chunks; ++c) {
        __m512i h[PANELS][TOKENS], l[PANELS][TOKENS];
#pragma GCC unroll 2
        for (int p = 0; p < PANELS; ++p)
#pragma GCC unroll 8
            for (int t = 0; t < TOKENS; ++t) h[p][t] = l[p][t] = _mm512_setzero_si512();
        const int64_t end = c + 1 == chunks ? columns : (c + 1) * m.chunk;
        for (int64_t i = c * m.chunk; i < end; i += 4) {
            __m512i codes[PANELS];
#pragma GCC unroll 2
            for (int p = 0; p < PANELS; ++p) codes[p] = _mm512_loadu_si512(job.room + p * job.panel + i * 16);
#pragma GCC unroll 8
            for (int t = 0; t < TOKENS; ++t) {
                const __m512i high = four_columns(job.q.high_of(token + t) + i), low = four_columns(job.q.low_of(token + t) + i);
#pragma GCC unroll 2
                for (int p = 0; p < PANELS; ++p) h[p][t] = dot(h[p][t], high, codes[p]), l[p][t] = dot(l[p][t], low, codes[p]);
            }
        }
#pragma GCC unroll 2
        for (int p = 0; p < PANELS; ++p) {
            const __m512i offset = offsets_of(m, block + 2 * p, c);
            const __m512 scales = scales_of(m, block + 2 * p, c);
#pragma GCC unroll 8
            for (int t = 0; t < TOKENS; ++t) {
                total[p][t] = with_planes(total[p][t], h[p][t], l[p][t], offset, scales, job.q.scales_of(token + t)[c]);
            }
        }
    }
    for (int p = 0; p < PANELS; ++p) store_panel<TOKENS>(job, block + 2 * p, token, total[p]);
}

// The same for vectors of bytes: codes are unsigned, and each sum starts with the correction for it.
template <int TOKENS, int PANELS> inline void byte_rows(const ProductJob& job, int64_t block, int64_t token) {
    const Matrix& m = job.m;
    const int64_t chunks = m.chunks(), words = m.words(), words_in_chunk = std::max<int64_t>(1, m.chunk / m.word);
    const uint8_t* x = job.q.low_of(token);
    const float* x_scales = job.q.scales_of(token);
    const int32_t* sums = job.q.sums_of(token);
    __m512 total[PANELS][TOKENS];
    for (auto& of_panel : total)
        for (__m512& sum : of_panel) sum = _mm512_setzero_ps();
    int64_t word = 0;
    for (int64_t c = 0; c < chunks; ++c) {
        __m512 of_chunk[PANELS][TOKENS];
        for (auto& of_panel : of_chunk)
            for (__m512& sum : of_panel) sum = _mm512_setzero_ps();
        const int64_t end = c + 1 == chunks ? words : std::min(words, word + words_in_chunk);
        for (; word < end; ++word) {
            __m512i sum[PANELS][TOKENS];
#pragma GCC unroll 8
            for (int t = 0; t < TOKENS; ++t)
#pragma GCC unroll 2
                for (int p = 0; p < PANELS; ++p) sum[p][t] = _mm512_set1_epi32(sums[t * words + word]);
            for (int64_t i = word * m.word; i < (word + 1) * m.word; i += 4) {
                __m512i codes[PANELS];
#pragma GCC unroll 2
                for (int p = 0; p < PANELS; ++p) codes[p] = _mm512_loadu_si512(job.room + p * job.panel + i * 16);
#pragma GCC unroll 8
                for (int t = 0; t < TOKENS; ++t) {
                    const __m512i four = four_columns(x + t * job.q.stride + i);
#pragma GCC unroll 2
                    for (int p = 0; p < PANELS; ++p) sum[p][t] = dot(sum[p][t], codes[p], four);
                }
            }
#pragma GCC unroll 8
            for (int t = 0; t < TOKENS; ++t) {
                const __m512 scale = _mm512_set1_ps(x_scales[t * words + word]);
#pragma GCC unroll 2
                for (int p = 0; p < PANELS; ++p)
                    of_chunk[p][t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[p][t]), scale, of_chunk[p][t]);
            }
        }
        for (int p = 0; p < PANELS; ++p) {
            const __m512 scales = scales_of(m, block + 2 * p, c);
            for (int t = 0; t < TOKENS; ++t) total[p][t] = _mm512_fmadd_ps(of_chunk[p][t], scales, total[p][t]);
        }
    }
    for (int p = 0; p < PANELS; ++p) store_panel<TOKENS>(job, block + 2 * p, token, total[p]);
}

template <int PANELS, int TOKENS> inline void vectors_with_panels(const ProductJob& job, int64_t block, int64_t& token) {
    for (; token + TOKENS <= job.tokens; token += TOKENS)
        if (job.q.are_bytes) byte_rows<TOKENS, PANELS>(job, block, token);
        else panel_rows<TOKENS, PANELS>(job, block, token);
}

template <int BITS, bool MASKED, int PANELS> inline void panels(const ProductJob& job, int64_t block) {
    for (int p = 0; p < PANELS; ++p) {
        uint8_t* panel = job.room + p * job.panel;
        if (job.q.are_bytes) expand_16<BITS, MASKED, true>(job.m, block + 2 * p, panel);
        else expand_16<BITS, MASKED, false>(job.m, block + 2 * p, panel);
    }
    int64_t token = 0;
    vectors_with_panels<PANELS, 6>(job, block, token);
    vectors_with_panels<PANELS, 2>(job, block, token);
    vectors_with_panels<PANELS, 1>(job, block, token);
}

template <int BITS, bool MASKED> inline void code_product_of(const ProductJob& job) {
    if (job.tokens <= 2 && !job.q.are_bytes) {
        for (int64_t token = 0; token < job.tokens; ++token) one_vector<BITS, MASKED>(job, token);
        return;
    }
    int64_t block = job.first;
    for (; block + 4 <= job.last; block += 4) panels<BITS, MASKED, 2>(job, block);
    for (; block < job.last; block += 2) panels<BITS, MASKED, 1>(job, block);
}

inline void code_product(const ProductJob& job) {
    if (job.m.bits == 4) return job.m.has_bits ? code_product_of<4, true>(job) : code_product_of<4, false>(job);
    return job.m.has_bits ? code_product_of<8, true>(job) : code_product_of<8, false>(job);
}

// Quantise a vector to bytes, word by word of columns.
inline void quantize_to_bytes(const Matrix& m, const float* x, int64_t token, Activations& to) {
    uint8_t* bytes = to.low.data() + token * to.stride;
    for (int64_t c = 0; c < to.chunks; ++c, x += m.word) {
        const int64_t count = std::min(m.columns - c * m.word, m.word);
        __m512 part[4], most = _mm512_setzero_ps();
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            const int64_t left = count - 16 * i;
            part[i] = _mm512_maskz_loadu_ps(left >= 16 ? 0xffff : left > 0 ? (1 << left) - 1 : 0, x + 16 * i);
            most = (__m512)_mm512_max_epi32((__m512i)most, (__m512i)_mm512_abs_ps(part[i]));  // the maximum keeps NaN
        }
        const Rounding rounding(_mm512_reduce_max_epi32((__m512i)most), 127);
        const __m512 inverse = _mm512_set1_ps(rounding.inverse);
        __m512i sum = _mm512_setzero_si512();
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            const __m512i q = rounding.inverse > 0 ? _mm512_cvtps_epi32(_mm512_mul_ps(part[i], inverse)) : _mm512_setzero_si512();
            sum = _mm512_add_epi32(sum, q);
            _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes + c * m.word + 16 * i), _mm512_cvtepi32_epi8(q));
        }
        to.scales[size_t(token * to.chunks + c)] = rounding.scale;
        to.sums[size_t(token * to.chunks + c)] = -128 * _mm512_reduce_add_epi32(sum);
    }
}
