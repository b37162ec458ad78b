// Products with codes for NEON with dot products of bytes (dotprod), and with its matrix products (i8mm) if PST_I8MM is
// defined.
//
// Layout: PAIRS and WINDOWS of matrix.hpp, blocks of 8 rows. A dot product adds four products of bytes to each int32 of a
// vector, so codes are put in the order [row][4 columns], and the two bytes of q are multiplied apart: the high one is
// signed, the low one is not. dotprod has no products of signed and unsigned bytes: the low byte is made signed by
// subtracting 128, and 128 times the sum of the codes is added. 4 bits of PAIRS are unsigned, and need neither. i8mm has
// such products, and multiplies PAIRS with two vectors at once.
//
// Sums of a chunk are exact modulo 2^32, so any order gives the same bits; floats are added chunk by chunk (Sums::add),
// one product and one sum each. A step may pass a vector's end, where q is 0, and the end of a block's codes.

// A sum of 8 rows: rows 0 to 3 and rows 4 to 7.
struct EightRows {
    int32x4_t half[2] = {vdupq_n_s32(0), vdupq_n_s32(0)};
};

inline uint8x16_t bytes_at(const uint8_t* from) { return vld1q_u8(from); }
inline uint8x16_t less_128(uint8x16_t bytes) { return veorq_u8(bytes, vdupq_n_u8(128)); }  // as signed bytes
inline uint8x16_t in_order(uint8x16_t bytes, const uint8_t (&order)[16]) { return vqtbl1q_u8(bytes, vld1q_u8(order)); }
inline int8x16_t as_signed(uint8x16_t bytes) { return vreinterpretq_s8_u8(bytes); }
inline int8x16_t signed_nibbles(uint8x16_t nibbles) {
    const int8x16_t eight = vdupq_n_s8(8);
    return vsubq_s8(veorq_s8(as_signed(nibbles), eight), eight);
}

// Prefetch a stream from memory: the hardware prefetcher stops at every page of 4 KiB.
inline void fetch_ahead(const uint8_t* data) { __builtin_prefetch(data + 4096, 0, 3); }

// The sum of q from those of its bytes, whose codes have the sum `codes` if low bytes were made signed.
inline EightRows of_bytes(const EightRows& low, const EightRows& high, const EightRows& codes) {
    EightRows sum;
    for (int h = 0; h < 2; ++h)
        sum.half[h] = vaddq_s32(vaddq_s32(low.half[h], vshlq_n_s32(codes.half[h], 7)), vshlq_n_s32(high.half[h], 8));
    return sum;
}

template <int TOKENS> struct Sums {
    const uint16_t* row_scales;
    const float* x_scales;
    const int64_t chunks;
    float32x4_t total[TOKENS][2];
    Sums(const ProductJob& job, int64_t block, int64_t token)
        : row_scales(job.m.scales.data() + block * job.m.chunks() * ROWS), x_scales(job.q.scales_of(token)), chunks(job.q.chunks) {
        for (auto& of_token : total) of_token[0] = of_token[1] = vdupq_n_f32(0);
    }
    void add(const EightRows (&chunk)[TOKENS]) {
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h) {
            const float32x4_t scales = vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(row_scales + 4 * h), 16));
#pragma GCC unroll 4
            for (int t = 0; t < TOKENS; ++t) {
                const float32x4_t scale = vmulq_n_f32(scales, x_scales[t * chunks]);
                total[t][h] = vaddq_f32(total[t][h], vmulq_f32(vcvtq_f32_s32(chunk[t].half[h]), scale));
            }
        }
        row_scales += ROWS;
        ++x_scales;
    }
    void store(const ProductJob& job, int64_t block, int64_t token) const {
        for (int t = 0; t < TOKENS; ++t) {
            float rows[ROWS];
            vst1q_f32(rows, total[t][0]);
            vst1q_f32(rows + 4, total[t][1]);
            store_rows(rows, job.m, block, job.y + (token + t) * job.y_width);
        }
    }
};

// Orders that 4 bits of PAIRS have in a row; and that make [row][2 windows][2] of [2 windows][row][2].
constexpr uint8_t OF_NIBBLES[16] = {0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15};
constexpr uint8_t OF_WINDOWS[16] = {0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15};

// The next 32 codes of 8 rows, [row][2 windows][2]: rows 0 to 3, and rows 4 to 7.
template <int BITS> inline void window_codes(const uint8_t* data, int8x16_t (&codes)[2]) {
    const uint8x16_t first = in_order(bytes_at(data), OF_WINDOWS);
    if (BITS == 8) {
        codes[0] = as_signed(first);
        codes[1] = as_signed(in_order(bytes_at(data + 16), OF_WINDOWS));
        return;
    }
    codes[0] = signed_nibbles(vandq_u8(first, vdupq_n_u8(15)));
    codes[1] = signed_nibbles(vshrq_n_u8(first, 4));
}

inline void add_low(int32x4_t& sum, uint8x16_t low, int8x16_t codes) {
#ifdef PST_I8MM
    sum = vusdotq_s32(sum, low, codes);
#else
    sum = vdotq_s32(sum, as_signed(less_128(low)), codes);
#endif
}

template <int BITS, int TOKENS> inline void window_rows(const ProductJob& job, int64_t block, int64_t token) {
    const Matrix& m = job.m;
    const uint8_t* data = m.data.data() + m.first_byte[size_t(block)];
    const uint8_t* move = m.moves.data() + m.first_move[size_t(block)];
    Sums<TOKENS> sums(job, block, token);
    for (int64_t c = 0; c < m.chunks(); ++c) {
        EightRows low_sum[TOKENS];
        EightRows high_sum[TOKENS];
        EightRows code_sum;
        const uint8_t* low = job.q.low_of(token) + c * m.chunk;
        const uint8_t* high = job.q.high_of(token) + c * m.chunk;
        const uint8_t* end = move + 2 * m.steps[size_t(block * m.chunks() + c)];
        for (int64_t at = 0; move < end; move += 2, data += 16 + 4 * BITS) {
            const int64_t before = at + move[0];
            at = before + move[1];
            if (TOKENS == 1) fetch_ahead(data);
            const uint8x16_t both = bytes_at(data);
            // places in two windows, one behind the other
            const uint16x8_t first = vreinterpretq_u16_u8(vandq_u8(both, vdupq_n_u8(15)));
            const uint16x8_t second = vreinterpretq_u16_u8(vorrq_u8(vshrq_n_u8(both, 4), vdupq_n_u8(16)));
            const uint8x16_t places[2] = {vreinterpretq_u8_u16(vzip1q_u16(first, second)),
                                          vreinterpretq_u8_u16(vzip2q_u16(first, second))};
            int8x16_t codes[2];
            window_codes<BITS>(data + 16, codes);
#pragma GCC unroll 2
            for (int h = 0; h < 2; ++h) {
#ifndef PST_I8MM
                code_sum.half[h] = vdotq_s32(code_sum.half[h], codes[h], vdupq_n_s8(1));
#endif
            }
#pragma GCC unroll 4
            for (int t = 0; t < TOKENS; ++t) {
                const uint8_t* l = low + t * job.q.stride;
                const uint8_t* g = high + t * job.q.stride;
                const uint8x16x2_t lows = {{bytes_at(l + before), bytes_at(l + at)}};
                const uint8x16x2_t highs = {{bytes_at(g + before), bytes_at(g + at)}};
#pragma GCC unroll 2
                for (int h = 0; h < 2; ++h) {
                    add_low(low_sum[t].half[h], vqtbl2q_u8(lows, places[h]), codes[h]);
                    high_sum[t].half[h] = vdotq_s32(high_sum[t].half[h], as_signed(vqtbl2q_u8(highs, places[h])), codes[h]);
                }
            }
        }
        EightRows chunk[TOKENS];
        for (int t = 0; t < TOKENS; ++t) chunk[t] = of_bytes(low_sum[t], high_sum[t], code_sum);
        sums.add(chunk);
    }
    sums.store(job, block, token);
}

// 16 columns of 8 rows: codes[i][h] are columns 4 i to 4 i + 3, in the order of q_in_order, of rows 4 h to 4 h + 3.
template <int BITS> inline void columns_at(const uint8_t* data, int8x16_t (&codes)[4][2]) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        if (BITS == 8) {
            const uint16x8_t first = vreinterpretq_u16_u8(bytes_at(data + 32 * i));
            const uint16x8_t second = vreinterpretq_u16_u8(bytes_at(data + 32 * i + 16));
            codes[i][0] = vreinterpretq_s8_u16(vzip1q_u16(first, second));
            codes[i][1] = vreinterpretq_s8_u16(vzip2q_u16(first, second));
            continue;
        }
        for (int h = 0; h < 2; ++h) {
            const uint8x16_t bytes = bytes_at(data + i / 2 * 32 + h * 16);
            codes[i][h] = as_signed(i % 2 ? vshrq_n_u8(bytes, 4) : vandq_u8(bytes, vdupq_n_u8(15)));
        }
    }
}

template <int BITS> inline uint8x16_t q_in_order(const uint8_t* q) {
    return BITS == 4 ? in_order(bytes_at(q), OF_NIBBLES) : bytes_at(q);
}

// Add the products of four columns with those of q that are four bytes of a vector, in LANE.
template <int BITS, int LANE>
inline void add_columns(EightRows& low_sum, EightRows& high_sum, const int8x16_t (&codes)[2], uint8x16_t low, uint8x16_t high) {
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
        int32x4_t& sum = low_sum.half[h];
#ifdef PST_I8MM
        sum = vsudotq_laneq_s32(sum, codes[h], low, LANE);
#else
        if (BITS == 4)
            sum = vreinterpretq_s32_u32(vdotq_laneq_u32(vreinterpretq_u32_s32(sum), vreinterpretq_u8_s8(codes[h]), low, LANE));
        else
            sum = vdotq_laneq_s32(sum, codes[h], as_signed(less_128(low)), LANE);
#endif
        high_sum.half[h] = vdotq_laneq_s32(high_sum.half[h], codes[h], as_signed(high), LANE);
    }
}

#ifdef PST_I8MM
// A matrix product of bytes multiplies eight columns of two vectors and two rows, to [vector][row]; rows are put together
// afterwards. `low` and `high` are bytes of the first vector's columns.
template <int BITS, int TOKENS>
inline void add_matrices(const uint8_t* data, const uint8_t* low, const uint8_t* high, int64_t stride, int64_t count,
                         EightRows (&low_sum)[TOKENS], EightRows (&high_sum)[TOKENS]) {
    int32x4_t low_of[TOKENS / 2][4];
    int32x4_t high_of[TOKENS / 2][4];
    for (int pair = 0; pair < TOKENS / 2; ++pair)
        for (int rows = 0; rows < 4; ++rows) low_of[pair][rows] = high_of[pair][rows] = vdupq_n_s32(0);
    for (int64_t i = 0; i < count; i += 16, data += 16 * BITS) {
        int8x16_t codes[4][2];
        columns_at<BITS>(data, codes);
        int8x16_t matrices[2][4];  // of 8 columns and two rows each
#pragma GCC unroll 4
        for (int part = 0; part < 4; ++part) {
            const int32x4_t first = vreinterpretq_s32_s8(codes[part / 2 * 2][part % 2]);
            const int32x4_t second = vreinterpretq_s32_s8(codes[part / 2 * 2 + 1][part % 2]);
            matrices[part / 2][part % 2 * 2] = vreinterpretq_s8_s32(vzip1q_s32(first, second));
            matrices[part / 2][part % 2 * 2 + 1] = vreinterpretq_s8_s32(vzip2q_s32(first, second));
        }
#pragma GCC unroll 2
        for (int pair = 0; pair < TOKENS / 2; ++pair) {
            const int64_t at = 2 * pair * stride + i;
            const uint64x2_t low_first = vreinterpretq_u64_u8(q_in_order<BITS>(low + at));
            const uint64x2_t low_second = vreinterpretq_u64_u8(q_in_order<BITS>(low + at + stride));
            const uint64x2_t high_first = vreinterpretq_u64_u8(q_in_order<BITS>(high + at));
            const uint64x2_t high_second = vreinterpretq_u64_u8(q_in_order<BITS>(high + at + stride));
            const uint64x2_t lows[2] = {vzip1q_u64(low_first, low_second), vzip2q_u64(low_first, low_second)};
            const uint64x2_t highs[2] = {vzip1q_u64(high_first, high_second), vzip2q_u64(high_first, high_second)};
#pragma GCC unroll 8
            for (int part = 0; part < 8; ++part) {
                int32x4_t& of_low = low_of[pair][part % 4];
                int32x4_t& of_high = high_of[pair][part % 4];
                of_low = vusmmlaq_s32(of_low, vreinterpretq_u8_u64(lows[part / 4]), matrices[part / 4][part % 4]);
                of_high = vmmlaq_s32(of_high, vreinterpretq_s8_u64(highs[part / 4]), matrices[part / 4][part % 4]);
            }
        }
    }
    const auto split = [](int32x4_t a, int32x4_t b, int32x4_t& first, int32x4_t& second) {
        first = vreinterpretq_s32_s64(vzip1q_s64(vreinterpretq_s64_s32(a), vreinterpretq_s64_s32(b)));
        second = vreinterpretq_s32_s64(vzip2q_s64(vreinterpretq_s64_s32(a), vreinterpretq_s64_s32(b)));
    };
    for (int t = 0; t < TOKENS; t += 2)
        for (int h = 0; h < 2; ++h) {
            split(low_of[t / 2][2 * h], low_of[t / 2][2 * h + 1], low_sum[t].half[h], low_sum[t + 1].half[h]);
            split(high_of[t / 2][2 * h], high_of[t / 2][2 * h + 1], high_sum[t].half[h], high_sum[t + 1].half[h]);
        }
}
#endif

// The products of `count` columns, byte by byte of q; and of signed codes their sums if low bytes are made signed.
template <int BITS, int TOKENS>
inline void add_dots(const uint8_t* data, const uint8_t* low, const uint8_t* high, int64_t stride, int64_t count,
                     EightRows (&low_sum)[TOKENS], EightRows (&high_sum)[TOKENS], EightRows& code_sum) {
    for (int64_t i = 0; i < count; i += 16, data += 16 * BITS) {
        if (TOKENS == 1) fetch_ahead(data);
        int8x16_t codes[4][2];
        columns_at<BITS>(data, codes);
#ifdef PST_I8MM
        (void)code_sum;
#else
        for (int j = 0; BITS == 8 && j < 8; ++j)
            code_sum.half[j % 2] = vdotq_s32(code_sum.half[j % 2], codes[j / 2][j % 2], vdupq_n_s8(1));
#endif
#pragma GCC unroll 4
        for (int t = 0; t < TOKENS; ++t) {
            const uint8x16_t l = q_in_order<BITS>(low + t * stride + i);
            const uint8x16_t g = q_in_order<BITS>(high + t * stride + i);
            add_columns<BITS, 0>(low_sum[t], high_sum[t], codes[0], l, g);
            add_columns<BITS, 1>(low_sum[t], high_sum[t], codes[1], l, g);
            add_columns<BITS, 2>(low_sum[t], high_sum[t], codes[2], l, g);
            add_columns<BITS, 3>(low_sum[t], high_sum[t], codes[3], l, g);
        }
    }
}

template <int BITS, int TOKENS> inline void pair_rows(const ProductJob& job, int64_t block, int64_t token) {
    const Matrix& m = job.m;
    const uint8_t* data = m.data.data() + m.first_byte[size_t(block)];
    Sums<TOKENS> sums(job, block, token);
    for (int64_t c = 0; c < m.chunks(); ++c) {
        EightRows low_sum[TOKENS];
        EightRows high_sum[TOKENS];
        EightRows code_sum;
        const uint8_t* low = job.q.low_of(token) + c * m.chunk;
        const uint8_t* high = job.q.high_of(token) + c * m.chunk;
        const int64_t count = m.chunk_end(c) - c * m.chunk;
#ifdef PST_I8MM
        if constexpr (TOKENS > 1) add_matrices<BITS, TOKENS>(data, low, high, job.q.stride, count, low_sum, high_sum);
        else
#endif
            add_dots<BITS, TOKENS>(data, low, high, job.q.stride, count, low_sum, high_sum, code_sum);
        data += round_up(count, 16) * BITS;
        EightRows chunk[TOKENS];
        for (int t = 0; t < TOKENS; ++t) {
            chunk[t] = of_bytes(low_sum[t], high_sum[t], code_sum);
            const int32x4_t excess = vdupq_n_s32(BITS == 4 ? 8 * job.q.sums_of(token + t)[c] : 0);  // codes are 8 too large
            for (int32x4_t& sum : chunk[t].half) sum = vsubq_s32(sum, excess);
        }
        sums.add(chunk);
    }
    sums.store(job, block, token);
}

template <int BITS, int TOKENS> inline void rows_of(const ProductJob& job, int64_t block, int64_t token) {
    if (job.m.layout == WINDOWS) return window_rows<BITS, TOKENS>(job, block, token);
    pair_rows<BITS, TOKENS>(job, block, token);
}
