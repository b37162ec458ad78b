// Search for the scale of least squared error of every group: what search_scales() of core/quantization.py computes, with
// the same candidates in the same order, so scales are bit-identical to it.
//
// A candidate needs two sums over its group, of whole * code and of code^2 (`whole`: a weight as an integer of 28 bits).
// With vector instructions, each lane has one group: LANES groups are transposed once, and every candidate is a pass over
// them that adds nothing across lanes. Passes read the weights from the cache.
//
// Codes without division
//   A code is w / s, divided in fp32 and rounded half to even. The passes compute q = w r + w r2 instead, where r + r2 is
//   1 / s to 2^-46, and round q. The code is the same:
//   - If w = (k + 1/2) s, then w / s is a tie, and q differs from it by much less than half a unit, so q is k + 1/2 too.
//   - Otherwise w is at least a unit in the last place away from (k + 1/2) s, which is an fp32 number because s is a bf16
//     number. Divided by s, whose significand is at most 255/128, this is at least 0.501 units of k + 1/2. The error of
//     2^-46 does not reach half a unit, so w / s and q are both on that side of k + 1/2, before and after rounding.
//   This holds while no factor is denormal or infinite. Groups for which is_plain() is false use the division.
//
// Sums
//   whole = high 2^14 + low, where both fit 16 bits. Products with codes are added in pairs in 32 bits, for at most
//   WEIGHTS_PER_SUM weights, then in doubles, whose integers are exact below 2^53. All sums are exact.
//
// Needs -ffp-contract=off: products and sums are rounded separately, as in torch.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "bf16.hpp"

#if (defined(__AVX512BW__) && defined(__AVX512F__)) || (defined(__AVX2__) && defined(__FMA__))
#include <immintrin.h>
#define PST_SEARCH_LANES 1
#endif

namespace pst::scale_search {

constexpr float LEAST_SCALE = 0x1p-126f;  // smaller ones would be denormal
constexpr int WEIGHT_BITS = 28;
constexpr float UNUSED_SCALE = 1.0f;

struct Settings {
    int64_t least;    // code
    int64_t largest;  // code
    float limit;      // the largest scale, a bf16 number
    const float* divisors;  // the largest code first
    int64_t count;          // of divisors
    int64_t refits;
};

// The nearest scale that can be stored.
inline float stored_scale(float scale, float limit) {
    float size = std::fabs(scale);
    size = size < LEAST_SCALE ? LEAST_SCALE : size;
    size = size > limit ? limit : size;
    bf16 narrowed;
    narrow(std::copysign(size, scale), &narrowed);
    return widen(narrowed);
}

inline float larger_end(float least, float most) { return most >= -least ? most : least; }

// The unit of weights as integers: a power of two, about 2^-28 of the largest magnitude of a group, which is not 0.
inline double unit_of(float extreme) {
    const double wide = extreme;  // normal, even if the weight is denormal in fp32
    uint64_t bits;
    std::memcpy(&bits, &wide, 8);
    bits = ((bits >> 52 & 0x7ff) - (WEIGHT_BITS - 1)) << 52;  // an extreme of 1/2 to 1 has the exponent 0
    double unit;
    std::memcpy(&unit, &bits, 8);
    return unit;
}

// The best scale so far of each of LANES groups. All numbers are doubles, so that the compiler vectorises the loops.
template <int LANES> struct Best {
    double unit[LANES];
    double per_unit[LANES];  // 1 / unit
    double scale[LANES];
    double error[LANES];  // without the sum of squared weights
    double by_weight[LANES];
    double by_code[LANES];

    void start(int lane, double its_unit) {
        unit[lane] = its_unit;
        per_unit[lane] = 1.0 / its_unit;
        scale[lane] = UNUSED_SCALE;
        error[lane] = INFINITY;
        by_weight[lane] = by_code[lane] = 0.0;
    }

    // Keep those of `scales` whose errors are smaller. Sums are in `unit`.
    void judge(const float* scales, const double* weight_sums, const double* code_sums) {
        for (int l = 0; l < LANES; ++l) {
            const double in_units = double(scales[l]) * per_unit[l];
            const double new_error = in_units * (in_units * code_sums[l] - 2.0 * weight_sums[l]);
            const bool wins = new_error < error[l];  // of equal errors, the scale that was tried first
            scale[l] = wins ? double(scales[l]) : scale[l];
            error[l] = wins ? new_error : error[l];
            by_weight[l] = wins ? weight_sums[l] : by_weight[l];
            by_code[l] = wins ? code_sums[l] : by_code[l];
        }
    }

    // The least-squares scales for the codes of the best scales. Where all codes are 0, no scale is better than another.
    void fit(float limit, float* fitted) const {
        for (int l = 0; l < LANES; ++l) {
            const double divisor = by_code[l] < 1.0 ? 1.0 : by_code[l];
            const double exact = by_weight[l] / divisor * unit[l];
            fitted[l] = float(by_code[l] > 0.0 ? exact : scale[l]);
        }
        for (int l = 0; l < LANES; ++l) fitted[l] = stored_scale(fitted[l], limit);
    }
};

// With codes -8 to 7, a scale whose sign differs from the extreme's gives it a negative code: there is one more.
inline float numerator_of(float extreme, const Settings& s) {
    return -s.least > s.largest ? -extreme : std::fabs(extreme);
}

// One group of any finite weights. `whole`: room for `size` integers.
inline float scale_of_group(const float* weights, int64_t size, const Settings& s, int32_t* whole) {
    float least = weights[0];
    float most = weights[0];
    for (int64_t i = 1; i < size; ++i) {
        least = weights[i] < least ? weights[i] : least;
        most = weights[i] > most ? weights[i] : most;
    }
    const float extreme = larger_end(least, most);
    if (extreme == 0.0f) return UNUSED_SCALE;
    Best<1> best;
    best.start(0, unit_of(extreme));
    for (int64_t i = 0; i < size; ++i) whole[i] = int32_t(std::rint(double(weights[i]) * best.per_unit[0]));
    const float lowest = float(s.least);
    const float highest = float(s.largest);

    auto judge = [&](float scale) {
        int64_t weight_sum = 0;
        int64_t code_sum = 0;
        for (int64_t i = 0; i < size; ++i) {
            float rounded = std::rint(weights[i] / scale);
            rounded = rounded < lowest ? lowest : rounded;
            const int32_t code = int32_t(rounded > highest ? highest : rounded);
            weight_sum += int64_t(whole[i]) * code;
            code_sum += code * code;
        }
        const double by_weight = double(weight_sum);
        const double by_code = double(code_sum);
        best.judge(&scale, &by_weight, &by_code);
    };
    const float numerator = numerator_of(extreme, s);
    for (int64_t i = 0; i < s.count; ++i) judge(stored_scale(numerator / s.divisors[i], s.limit));
    for (int64_t i = 0; i < s.refits; ++i) {
        float fitted;
        best.fit(s.limit, &fitted);
        judge(fitted);
    }
    return float(best.scale[0]);
}

#if PST_SEARCH_LANES

#if defined(__AVX512BW__)
constexpr int LANES = 16;
constexpr int BATCH = 4;  // candidates per pass over the weights, as many as registers allow
#else
constexpr int LANES = 8;
constexpr int BATCH = 1;
#endif
constexpr int64_t WEIGHTS_PER_SUM = 1024;  // 2^14 * 127 * 1024 < 2^31
constexpr int LOW_BITS = 14;

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));

#if defined(__AVX512BW__)
inline Floats fused(Floats a, Floats b, Floats c) { return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
inline Ints nearest(Floats x) { return (Ints)_mm512_cvtps_epi32((__m512)x); }
inline Floats smaller(Floats a, Floats b) { return (Floats)_mm512_min_ps((__m512)a, (__m512)b); }
inline Floats larger(Floats a, Floats b) { return (Floats)_mm512_max_ps((__m512)a, (__m512)b); }
// The lower halves of two vectors: those of `first` in the lower halves.
inline Ints in_pairs(Ints first, Ints second) {
    return (Ints)_mm512_mask_blend_epi16(0xaaaaaaaa, (__m512i)first, _mm512_slli_epi32((__m512i)second, 16));
}
inline Ints limited(Ints pairs, Ints least, Ints most) {
    return (Ints)_mm512_min_epi16(_mm512_max_epi16((__m512i)pairs, (__m512i)least), (__m512i)most);
}
// `sum` and the products of 16-bit numbers, two to a lane.
inline Ints add_products(Ints sum, Ints a, Ints b) {
#if defined(__AVX512VNNI__)
    return (Ints)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#else
    return sum + (Ints)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#endif
}
#else
inline Floats fused(Floats a, Floats b, Floats c) { return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
inline Ints nearest(Floats x) { return (Ints)_mm256_cvtps_epi32((__m256)x); }
inline Floats smaller(Floats a, Floats b) { return (Floats)_mm256_min_ps((__m256)a, (__m256)b); }
inline Floats larger(Floats a, Floats b) { return (Floats)_mm256_max_ps((__m256)a, (__m256)b); }
inline Ints in_pairs(Ints first, Ints second) {
    return (Ints)_mm256_blend_epi16((__m256i)first, _mm256_slli_epi32((__m256i)second, 16), 0xaa);
}
inline Ints limited(Ints pairs, Ints least, Ints most) {
    return (Ints)_mm256_min_epi16(_mm256_max_epi16((__m256i)pairs, (__m256i)least), (__m256i)most);
}
inline Ints add_products(Ints sum, Ints a, Ints b) { return sum + (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b); }
#endif

// LANES groups, transposed. An odd number of weights is followed by zeros, which change no sum.
struct Block {
    std::vector<Floats> weights;  // weight i of each group
    std::vector<Ints> high;       // those of weights 2 i and 2 i + 1, 16 bits each
    std::vector<Ints> low;
    int64_t pairs;

    explicit Block(int64_t size)
        : weights(size + size % 2, Floats{}), high(weights.size() / 2), low(weights.size() / 2), pairs(weights.size() / 2) {}
};

// Whether no product of the passes is denormal or infinite, and the codes before their limitation have 15 bits. The zeros
// of an empty group are of any scale.
inline bool is_plain(float extreme, float limit) {
    const float size = std::fabs(extreme);
    return size == 0.0f || (size >= 0x1p-40f && size <= 0x1p40f && size <= 256.0f * limit);
}

inline void transpose(const float* groups, int64_t count, int64_t size, Floats* to) {
    float* out = reinterpret_cast<float*>(to);
    int64_t done = 0;
    if (count == LANES) {
        for (; done + 4 <= size; done += 4) {
            for (int l = 0; l < LANES; l += 4) {
                const float* from = groups + l * size + done;
                __m128 a = _mm_loadu_ps(from);
                __m128 b = _mm_loadu_ps(from + size);
                __m128 c = _mm_loadu_ps(from + 2 * size);
                __m128 d = _mm_loadu_ps(from + 3 * size);
                _MM_TRANSPOSE4_PS(a, b, c, d);
                float* row = out + done * LANES + l;
                _mm_storeu_ps(row, a);
                _mm_storeu_ps(row + LANES, b);
                _mm_storeu_ps(row + 2 * LANES, c);
                _mm_storeu_ps(row + 3 * LANES, d);
            }
        }
    }
    for (int64_t i = done; i < size; ++i)
        for (int64_t l = 0; l < LANES; ++l) out[i * LANES + l] = l < count ? groups[l * size + i] : 0.0f;
}

template <int COUNT>
void add_moments(const Block& block, const Settings& s, const Floats* scales, double (*by_weight)[LANES],
                 double (*by_code)[LANES]) {
    const int32_t least = int32_t(s.least) & 0xffff;
    const Ints lowest = Ints{} + (least | int32_t(uint32_t(least) << 16));
    const Ints highest = Ints{} + int32_t(s.largest | s.largest << 16);
    Floats inverse[COUNT];
    Floats inverse_rest[COUNT];  // what fp32 rounds off
    for (int c = 0; c < COUNT; ++c) {
        inverse[c] = 1.0f / scales[c];
        inverse_rest[c] = fused(-inverse[c], scales[c], Floats{} + 1.0f) * inverse[c];
    }
    for (int64_t first = 0; first < block.pairs; first += WEIGHTS_PER_SUM / 2) {
        const int64_t stop = first + WEIGHTS_PER_SUM / 2 < block.pairs ? first + WEIGHTS_PER_SUM / 2 : block.pairs;
        Ints high[COUNT] = {};
        Ints low[COUNT] = {};
        Ints squares[COUNT] = {};
        for (int64_t p = first; p < stop; ++p) {
            const Floats even = block.weights[2 * p];
            const Floats odd = block.weights[2 * p + 1];
            const Ints high_pair = block.high[p];
            const Ints low_pair = block.low[p];
#pragma GCC unroll 4
            for (int c = 0; c < COUNT; ++c) {
                const Ints of_even = nearest(fused(even, inverse[c], even * inverse_rest[c]));
                const Ints of_odd = nearest(fused(odd, inverse[c], odd * inverse_rest[c]));
                const Ints codes = limited(in_pairs(of_even, of_odd), lowest, highest);
                high[c] = add_products(high[c], high_pair, codes);
                low[c] = add_products(low[c], low_pair, codes);
                squares[c] = add_products(squares[c], codes, codes);
            }
        }
        for (int c = 0; c < COUNT; ++c) {
            int32_t sums[3][LANES];
            std::memcpy(sums[0], &high[c], sizeof high[c]);
            std::memcpy(sums[1], &low[c], sizeof low[c]);
            std::memcpy(sums[2], &squares[c], sizeof squares[c]);
            for (int l = 0; l < LANES; ++l) by_weight[c][l] += double(sums[0][l]) * (1 << LOW_BITS) + double(sums[1][l]);
            for (int l = 0; l < LANES; ++l) by_code[c][l] += double(sums[2][l]);
        }
    }
}

// Judge COUNT candidates in one pass.
template <int COUNT> void judge(const Block& block, const Settings& s, const float (*scales)[LANES], Best<LANES>& best) {
    double by_weight[COUNT][LANES] = {};
    double by_code[COUNT][LANES] = {};
    Floats vectors[COUNT];
    std::memcpy(vectors, scales, sizeof vectors);
    add_moments<COUNT>(block, s, vectors, by_weight, by_code);
    for (int c = 0; c < COUNT; ++c) best.judge(scales[c], by_weight[c], by_code[c]);
}

// Scales of `count` groups, at most LANES.
inline void scales_of_block(const float* groups, int64_t count, int64_t size, const Settings& s, Block& block,
                            int32_t* whole, bf16* scales) {
    transpose(groups, count, size, block.weights.data());
    Floats least = block.weights[0];
    Floats most = least;
    for (int64_t i = 1; i < size; ++i) {
        least = smaller(block.weights[i], least);
        most = larger(block.weights[i], most);
    }
    float extreme[LANES];
    float numerator[LANES];
    Floats factors;
    Best<LANES> best;
    bool are_plain = true;
    bool plain[LANES];
    for (int l = 0; l < LANES; ++l) {
        extreme[l] = larger_end(least[l], most[l]);
        plain[l] = is_plain(extreme[l], s.limit);
        are_plain = are_plain && plain[l];
        const float used = plain[l] && extreme[l] != 0.0f ? extreme[l] : 1.0f;
        numerator[l] = numerator_of(used, s);
        best.start(l, unit_of(used));
        factors[l] = float(best.per_unit[l]);
    }
    if (!are_plain)
        for (int64_t i = 0; i < size; ++i)
            for (int l = 0; l < LANES; ++l) block.weights[i][l] = plain[l] ? block.weights[i][l] : 0.0f;
    for (int64_t p = 0; p < block.pairs; ++p) {
        const Ints even = nearest(block.weights[2 * p] * factors);
        const Ints odd = nearest(block.weights[2 * p + 1] * factors);
        const int32_t mask = (1 << LOW_BITS) - 1;
        block.high[p] = in_pairs(even >> LOW_BITS, odd >> LOW_BITS);
        block.low[p] = in_pairs(even & mask, odd & mask);
    }

    for (int64_t first = 0; first < s.count; first += BATCH) {
        const int64_t in_batch = s.count - first < BATCH ? s.count - first : BATCH;
        float tried[BATCH][LANES];
        for (int64_t c = 0; c < in_batch; ++c)
            for (int l = 0; l < LANES; ++l) tried[c][l] = stored_scale(numerator[l] / s.divisors[first + c], s.limit);
        if (in_batch == BATCH) judge<BATCH>(block, s, tried, best);
        else
            for (int64_t c = 0; c < in_batch; ++c) judge<1>(block, s, tried + c, best);
    }
    for (int64_t i = 0; i < s.refits; ++i) {
        float fitted[1][LANES];
        best.fit(s.limit, fitted[0]);
        judge<1>(block, s, fitted, best);
    }
    for (int64_t l = 0; l < count; ++l) {
        float scale = extreme[l] != 0.0f ? float(best.scale[l]) : UNUSED_SCALE;
        if (!plain[l]) scale = scale_of_group(groups + l * size, size, s, whole);
        narrow(scale, scales + l);
    }
}

#endif

// bf16 scales of all groups: (groups, size) fp32, finite and contiguous.
inline void scales_of_groups(const float* weights, int64_t groups, int64_t size, const Settings& s, bf16* scales,
                             int64_t threads) {
#if PST_SEARCH_LANES
    const int64_t blocks = (groups + LANES - 1) / LANES;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        Block block(size);
        std::vector<int32_t> whole(size);
#pragma omp for schedule(static)
        for (int64_t b = 0; b < blocks; ++b) {
            const int64_t first = b * LANES;
            const int64_t count = groups - first < LANES ? groups - first : LANES;
            scales_of_block(weights + first * size, count, size, s, block, whole.data(), scales + first);
        }
    }
#else
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        std::vector<int32_t> whole(size);
#pragma omp for schedule(static)
        for (int64_t g = 0; g < groups; ++g)
            narrow(scale_of_group(weights + g * size, size, s, whole.data()), scales + g);
    }
#endif
}

}  // namespace pst::scale_search
