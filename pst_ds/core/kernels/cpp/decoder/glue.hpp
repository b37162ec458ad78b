// The operations between the products. Included once per instruction set, after its lanes.
//
// Arrays are rows of fp32 at any address, of `width` or `count` numbers: whole vectors first, then the last numbers one by
// one, so nothing is read past a row's end. q is written with zeros up to the stride of Activations, since products
// read whole vectors of it. A token's results depend on its row only, never on its neighbours in a pass.
// Quantisation multiplies in fp32 and rounds to nearest, ties to even; the decoder is compiled without fused operations
// (-ffp-contract=off).

// The bits of the largest |x|; the bits of infinities and NaN exceed all others.
inline int32_t largest_bits(const float* x, int64_t count) {
    const int64_t whole = count / LANES * LANES;
    Ints largest{};
    for (int64_t i = 0; i < whole; i += LANES) {
        const Ints bits = (Ints)load(x + i) & 0x7fffffff;
        largest = bits > largest ? bits : largest;
    }
    int32_t most = 0;
    int32_t word;
    for (int i = 0; i < LANES; ++i) most = std::max(most, largest[i]);
    for (int64_t i = whole; i < count; ++i) {
        std::memcpy(&word, x + i, 4);
        most = std::max(most, word & 0x7fffffff);
    }
    return most;
}

// q = x / scale to nearest, ties to even; |q| below 2^15.
inline void round_to_integers(const float* x, int64_t count, float inverse, int16_t* q) {
    typedef int16_t Shorts __attribute__((vector_size(2 * LANES), aligned(2)));
    const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds, and leaves the integer in the lowest bits
    const int64_t whole = count / LANES * LANES;
    for (int64_t i = 0; i < whole; i += LANES) {
        const Ints integers = (Ints)(load(x + i) * inverse + shift) - 0x4b400000;
        *reinterpret_cast<Shorts*>(q + i) = __builtin_convertvector(integers, Shorts);
    }
    for (int64_t i = whole; i < count; ++i) q[i] = int16_t(int32_t(x[i] * inverse + shift - shift));
}

inline int32_t sum_of(const int16_t* q, int64_t count) {
    int32_t sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += q[i];
    return sum;
}

// What the sums of WORDS exceed the exact ones by, because they multiply unsigned codes (avx512.hpp), modulo 2^32. 4-bit
// codes are codes + 8 for both planes; 8-bit codes are codes + 128 for the high plane only, whose sum counts 256 times.
inline int32_t excess_of(int bits, const int16_t* q, int64_t count) {
    if (bits == 4) return int32_t(8 * uint32_t(sum_of(q, count)));
    int32_t high = 0;
    for (int64_t i = 0; i < count; ++i) high += q[i] >> 8;
    return int32_t(uint32_t(high) << 15);
}

// Quantise one vector, chunk by chunk. A chunk with an infinity or a NaN has the scale NaN.
inline void quantize(const Matrix& m, const float* x, int64_t token, Activations& to) {
    int16_t* q = to.q.data() + token * to.stride;
    uint8_t* low = to.low.data() + token * to.stride;
    uint8_t* high = to.high.data() + token * to.stride;
    for (int64_t c = 0; c < to.chunks; ++c) {
        const int64_t begin = c * m.chunk;
        const int64_t count = m.chunk_end(c) - begin;
        const Rounding rounding(largest_bits(x + begin, count), float(m.levels));
        to.scales[size_t(token * to.chunks + c)] = rounding.scale;
        if (rounding.inverse > 0)
            round_to_integers(x + begin, count, rounding.inverse, q + begin);
        else
            std::memset(q + begin, 0, size_t(count) * sizeof(int16_t));
        to.sums[size_t(token * to.chunks + c)] = WORDS_FIRST ? excess_of(m.bits, q + begin, count) : sum_of(q + begin, count);
    }
    const int64_t stride = to.stride;  // a local copy, because writing bytes might alias it
    std::memset(q + m.columns, 0, size_t(stride - m.columns) * sizeof(int16_t));
#pragma GCC ivdep
    for (int64_t i = 0; i < stride; ++i) {
        low[i] = uint8_t(q[i]);
        high[i] = uint8_t(uint16_t(q[i]) >> 8);
    }
}

inline void rms_norm(const float* x, const float* gain, float epsilon, int64_t width, float* y) {
    const int64_t whole = width / LANES * LANES;
    Floats total{};
    float rest = 0;
    for (int64_t i = 0; i < whole; i += LANES) total = fused(load(x + i), load(x + i), total);
    for (int64_t i = whole; i < width; ++i) rest += x[i] * x[i];
    const float scale = 1.0f / std::sqrt((sum_of(total) + rest) / float(width) + epsilon);
    for (int64_t i = 0; i < width; ++i) y[i] = x[i] * scale * gain[i];
}

inline void layer_norm(const float* x, const float* gain, const float* bias, float epsilon, int64_t width, float* y) {
    const int64_t whole = width / LANES * LANES;
    Floats total{};
    Floats squares{};
    float rest = 0;
    float rest_of_squares = 0;
    for (int64_t i = 0; i < whole; i += LANES) total += load(x + i);
    for (int64_t i = whole; i < width; ++i) rest += x[i];
    const float mean = (sum_of(total) + rest) / float(width);
    for (int64_t i = 0; i < whole; i += LANES) {
        const Floats centred = load(x + i) - mean;
        squares = fused(centred, centred, squares);
    }
    for (int64_t i = whole; i < width; ++i) rest_of_squares += (x[i] - mean) * (x[i] - mean);
    const float scale = 1.0f / std::sqrt((sum_of(squares) + rest_of_squares) / float(width) + epsilon);
    for (int64_t i = 0; i < width; ++i) y[i] = (x[i] - mean) * scale * gain[i] + bias[i];
}

// Rotate the first 2 * half numbers of a head, as pairs (i, i + half).
inline void rotate(float* x, const float* cosines, const float* sines, int64_t half) {
    for (int64_t i = 0; i < half; ++i) {
        const float a = x[i];
        const float b = x[i + half];
        x[i] = a * cosines[i] - b * sines[i];
        x[i + half] = b * cosines[i] + a * sines[i];
    }
}

// xIELU (arXiv 2411.13010). numbers: its factors of x^2 and of e^x - 1 - x, of x, and where e^x - 1 is cut off.
inline Floats xielu(const float* numbers, Floats x) {
    const Floats limit = all(numbers[3]);
    const Floats low = x < limit ? x : limit;
    const Floats negative = (exponential(low) - 1.0f - x) * numbers[1];
    const Floats positive = numbers[0] * x * x;
    return (x > Floats{} ? positive : negative) + numbers[2] * x;
}

inline Floats activated(int64_t activation, const float* numbers, Floats x) {
    return activation == XIELU ? xielu(numbers, x) : activate(activation, x);
}

// y = activation(gates) * up; up may be null. numbers: parameters of the activation, null without any.
inline void gate(int64_t activation, const float* numbers, const float* gates, const float* up, int64_t width, float* y) {
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) {
        const Floats value = activated(activation, numbers, load(gates + i));
        store(y + i, up ? value * load(up + i) : value);
    }
    if (i == width) return;
    Floats last{};
    for (int64_t j = i; j < width; ++j) last[j - i] = gates[j];
    last = activated(activation, numbers, last);
    for (int64_t j = i; j < width; ++j) y[j] = up ? last[j - i] * up[j] : last[j - i];
}

// y = x W' for a weight in fp32 or bf16, four vectors per step.
template <class T, int TOKENS> inline void float_rows(const ProductJob& job, int64_t token) {
    const Matrix& m = job.m;
    const int64_t whole = m.columns / LANES * LANES;
    for (int64_t row = job.first * ROWS; row < std::min(job.last * ROWS, m.rows); ++row) {
        const T* w = static_cast<const T*>(m.floats) + row * m.columns;
        Floats sum[TOKENS] = {};
        for (int64_t i = 0; i < whole; i += LANES) {
            const Floats weight = widen(w + i);
#pragma GCC unroll 4
            for (int t = 0; t < TOKENS; ++t) sum[t] = fused(weight, load(job.x + (token + t) * m.columns + i), sum[t]);
        }
        for (int t = 0; t < TOKENS; ++t) {
            float rest = 0;
            for (int64_t i = whole; i < m.columns; ++i)
                rest += pst::widen(w[i]) * job.x[(token + t) * m.columns + i];
            job.y[(token + t) * job.y_width + row] = sum_of(sum[t]) + rest;
        }
    }
}
template <class T> inline void float_product(const ProductJob& job) {
    int64_t token = 0;
    for (; token + 4 <= job.tokens; token += 4) float_rows<T, 4>(job, token);
    for (; token < job.tokens; ++token) float_rows<T, 1>(job, token);
}

inline void product(const ProductJob& job) {
    switch (job.m.layout) {
        case FLOATS: return job.m.bits == 16 ? float_product<uint16_t>(job) : float_product<float>(job);
        default: return code_product(job);
    }
}

inline Functions table() {
    return {WORDS_FIRST, WORDS_FIRST, quantize, quantize_to_bytes, product, rms_norm, layer_norm, rotate, gate, attend, update};
}
