// Loops of quantisation: plain C functions for ctypes, compiled for this processor. Each has a torch version in
// core/quantization.py or core/coded_weight.py.
//
// Layout
//   weight, out  a rectangle (rows, cols) of a stored weight, fp32 or bf16; columns contiguous, rows `stride` apart
//   scales       bf16. A group is `tall` rows by `wide` columns of the stored weight, one of which is 1 (a stored weight
//                may be transposed); its scale is scales[row / tall * stride + column / wide].
//   codes        int8, or two signed 4-bit codes per byte: flat weight i has the lower half of byte i / 2 if i is even
//   weights      (groups, size) fp32, contiguous, for sums over each group; `scales` is then (groups,) fp32
//
// No array needs an alignment. The caller owns all of them. Rows or groups are split over `threads` OpenMP threads;
// each writes its own results.
//
// Codes and weights are bit-identical to torch: division, product and rounding (half to even) are those of IEEE, one
// after the other (-ffp-contract=off). pst_grid_moments sums integers, which is exact in any order; pst_grid_losses adds
// doubles in a different order from torch.

#include <cmath>
#include <cstdint>
#include <cstring>

#include "bf16.hpp"
#include "scale_search.hpp"

namespace {

using pst::widen;

inline void narrow(float value, float* to) { *to = value; }
inline void narrow(float value, uint16_t* to) {  // half to even, and NaN to torch's NaN
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    *to = uint16_t(value == value ? rounded : 0x7fc0u);
}

// The smallest and the largest code.
struct Range {
    float least;
    float largest;
};

inline float code_of(float weight, float scale, Range range) {
    float code = std::rint(weight / scale);
    code = code < range.least ? range.least : code;
    return code > range.largest ? range.largest : code;
}

template <class T> inline void round_one(T* weight, float scale, Range range) {
    narrow(code_of(widen(*weight), scale, range) * scale + 0.0f, weight);  // adding 0 turns -0 into +0
}

// Groups in the stored weight: `tall` rows by `wide` columns, one of which is 1.
struct Groups {
    const uint16_t* scales;
    int64_t stride;
    int64_t tall;
    int64_t wide;
    int64_t first_row;
    int64_t first_col;
    Range range;
};

// Quantise one row of a rectangle in place. Groups may start before the rectangle's first column.
template <class T> void round_row(T* weight, int64_t row, int64_t cols, const Groups& g) {
    const uint16_t* scales = g.scales + (g.first_row + row) / g.tall * g.stride;
    if (g.wide == 1) {
        for (int64_t col = 0; col < cols; ++col) round_one(weight + col, widen(scales[g.first_col + col]), g.range);
        return;
    }
    for (int64_t col = 0, group = g.first_col / g.wide; col < cols; ++group) {
        int64_t stop = (group + 1) * g.wide - g.first_col;  // the group's end, counted from the rectangle's first column
        stop = stop < cols ? stop : cols;
        const float scale = widen(scales[group]);
        for (int64_t i = col; i < stop; ++i) round_one(weight + i, scale, g.range);
        col = stop;
    }
}

template <class T>
void round_rows(T* weight, int64_t stride, int64_t rows, int64_t cols, const Groups& g, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t row = 0; row < rows; ++row) round_row(weight + row * stride, row, cols, g);
}

// Copy a row, with 0 where `keep` is 0, and return whether what is copied is finite.
template <class T, bool HAS_MASK> bool keep_row(const T* weight, int64_t cols, const uint8_t* __restrict keep,
                                                float* __restrict out) {
    uint32_t largest = 0;  // magnitude, as bits, which have the order of the numbers
    for (int64_t i = 0; i < cols; ++i) {
        const float wide = widen(weight[i]);
        uint32_t bits;
        std::memcpy(&bits, &wide, 4);
        if (HAS_MASK) bits &= 0u - uint32_t(keep[i]);  // 0 or 1: without a branch, which a random mask would mispredict
        std::memcpy(out + i, &bits, 4);
        const uint32_t magnitude = bits & 0x7fffffffu;
        largest = magnitude > largest ? magnitude : largest;
    }
    return largest < 0x7f800000u;
}

template <class T> bool keep_row(const T* weight, int64_t cols, const uint8_t* keep, float* out) {
    if (keep) return keep_row<T, true>(weight, cols, keep, out);
    return keep_row<T, false>(weight, cols, nullptr, out);
}

// Weights of `count` codes from code `first` on, which share a scale.
template <class T> void expand_run(const uint8_t* codes, int64_t bits, int64_t first, int64_t count, float scale, T* out) {
    if (bits == 8) {
        for (int64_t i = 0; i < count; ++i) narrow(float(int8_t(codes[first + i])) * scale, out + i);
        return;
    }
    int64_t done = 0;
    // A run may start at the upper half of a byte and end at a lower half. Shifting an int8 left and right extends the
    // sign of a 4-bit code.
    if (first % 2 && count) {
        narrow(float(int8_t(codes[first / 2]) >> 4) * scale, out);
        done = 1;
    }
    const uint8_t* pairs = codes + (first + done) / 2;
    const int64_t whole = (count - done) / 2;
    for (int64_t i = 0; i < whole; ++i) {
        narrow(float(int8_t(pairs[i] << 4) >> 4) * scale, out + done + 2 * i);
        narrow(float(int8_t(pairs[i]) >> 4) * scale, out + done + 2 * i + 1);
    }
    if ((count - done) % 2) narrow(float(int8_t(pairs[whole] << 4) >> 4) * scale, out + count - 1);
}

// Codes of flat weights of a stored weight.
struct Codes {
    const uint8_t* data;
    int64_t bits;    // per code: 4 or 8
    int64_t first;   // index of the first flat weight in `data`
    int64_t length;  // of a row of the stored weight
};

// Weights of one row of a rectangle, group by group.
template <class T> void expand_row(const Codes& codes, T* out, int64_t row, int64_t cols, const Groups& g) {
    const uint16_t* scales = g.scales + (g.first_row + row) / g.tall * g.stride;
    const int64_t number = (g.first_row + row) * codes.length + g.first_col - codes.first;  // of the row's first code
    for (int64_t col = 0, group = g.first_col / g.wide; col < cols; ++group) {
        int64_t stop = (group + 1) * g.wide - g.first_col;
        stop = stop < cols ? stop : cols;
        expand_run(codes.data, codes.bits, number + col, stop - col, widen(scales[group]), out + col);
        col = stop;
    }
}

template <class T>
void expand_rows(const Codes& codes, T* out, int64_t stride, int64_t rows, int64_t cols, const Groups& g, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t row = 0; row < rows; ++row) expand_row(codes, out + row * stride, row, cols, g);
}

}  // namespace

extern "C" {

// out = code * scale for a rectangle (rows, cols) of a stored weight, given a run of its flat weights. `groups`: as
// below; the scale of a group is scales[its index in the whole weight - first_scale]. `codes`: {bits per code, index of
// the first flat weight, length of a stored row}.
void pst_expand_codes(const uint8_t* data, const int64_t* codes, const uint16_t* scales, int64_t first_scale,
                      const int64_t* groups, void* out, int64_t is_bf16, int64_t stride, int64_t rows, int64_t cols,
                      int64_t threads) {
    const Codes c{data, codes[0], codes[1], codes[2]};
    const Groups g{scales - first_scale, groups[0], groups[1], groups[2], groups[3], groups[4], {}};
    if (is_bf16) expand_rows(c, static_cast<uint16_t*>(out), stride, rows, cols, g, threads);
    else expand_rows(c, static_cast<float*>(out), stride, rows, cols, g, threads);
}

// weight = code * scale for a rectangle (rows, cols), in place. `groups`: {stride of the scales, rows and columns of a
// group, first row and column of the rectangle}; scales are bf16.
void pst_round_to_grid(void* weight, int64_t is_bf16, int64_t stride, int64_t rows, int64_t cols, const uint16_t* scales,
                       const int64_t* groups, int64_t least, int64_t largest, int64_t threads) {
    const Groups g{scales, groups[0], groups[1], groups[2], groups[3], groups[4], {float(least), float(largest)}};
    if (is_bf16) round_rows(static_cast<uint16_t*>(weight), stride, rows, cols, g, threads);
    else round_rows(static_cast<float*>(weight), stride, rows, cols, g, threads);
}

// Weights as integers: w times its group's factor, a power of two that makes |w| at most about 2^28, rounded half to
// even. Sums of their products with codes are then exact in 64 bits.
void pst_whole_weights(const float* weights, int64_t groups, int64_t size, const double* factors, int32_t* whole,
                       int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t g = 0; g < groups; ++g)
        for (int64_t i = g * size; i < (g + 1) * size; ++i) whole[i] = int32_t(std::rint(double(weights[i]) * factors[g]));
}

// Copy a rectangle (rows, cols) as fp32, contiguous, with 0 where `keep` is 0, and return whether all copied weights are
// finite. `keep`: (rows, cols), a byte per weight that is 0 or 1, or null to keep all.
int64_t pst_kept_weights(const void* weight, int64_t is_bf16, int64_t stride, int64_t rows, int64_t cols,
                         const uint8_t* keep, float* out, int64_t threads) {
    int64_t infinite = 0;  // rows with such a weight
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : infinite) if (threads > 1)
    for (int64_t row = 0; row < rows; ++row) {
        const uint8_t* kept = keep ? keep + row * cols : nullptr;
        float* to = out + row * cols;
        bool is_finite;
        if (is_bf16) is_finite = keep_row(static_cast<const uint16_t*>(weight) + row * stride, cols, kept, to);
        else is_finite = keep_row(static_cast<const float*>(weight) + row * stride, cols, kept, to);
        infinite += !is_finite;
    }
    return infinite == 0;
}

// The code of every weight for the bf16 scale of its group.
void pst_group_codes(const float* weights, int64_t groups, int64_t size, const uint16_t* scales, int64_t least,
                     int64_t largest, int8_t* codes, int64_t threads) {
    const Range range{float(least), float(largest)};
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t g = 0; g < groups; ++g) {
        const float scale = widen(scales[g]);
        for (int64_t i = g * size; i < (g + 1) * size; ++i) codes[i] = int8_t(code_of(weights[i], scale, range));
    }
}

// For every group the sums of (w - code * scale)^2 and of w^2, in no particular order.
void pst_grid_losses(const float* weights, int64_t groups, int64_t size, const float* scales, int64_t least,
                     int64_t largest, double* errors, double* squares, int64_t threads) {
    constexpr int64_t LANES = 8;
    const Range range{float(least), float(largest)};
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t g = 0; g < groups; ++g) {
        const float* of_group = weights + g * size;
        // one sum per lane, for the compiler to vectorise
        double error[LANES] = {};
        double square[LANES] = {};
        for (int64_t first = 0; first < size; first += LANES) {
            const int64_t count = size - first < LANES ? size - first : LANES;
            for (int64_t i = 0; i < count; ++i) {
                const float weight = of_group[first + i];
                const float rounded = code_of(weight, scales[g], range) * scales[g];
                const double off = double(weight) - double(rounded);
                error[i] += off * off;
                square[i] += double(weight) * double(weight);
            }
        }
        for (int64_t i = 1; i < LANES; ++i) {
            error[0] += error[i];
            square[0] += square[i];
        }
        errors[g] = error[0];
        squares[g] = square[0];
    }
}

// For every group of `size` weights the sums of whole * code and of code^2. `whole`: the weights as integers.
void pst_grid_moments(const float* weights, const int32_t* whole, int64_t groups, int64_t size, const float* scales,
                      int64_t least, int64_t largest, double* by_weight, double* by_code, int64_t threads) {
    const Range range{float(least), float(largest)};
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t g = 0; g < groups; ++g) {
        const float* of_group = weights + g * size;
        const int32_t* integers = whole + g * size;
        int64_t weight_sum = 0;
        int64_t code_sum = 0;
        for (int64_t i = 0; i < size; ++i) {
            const int32_t code = int32_t(code_of(of_group[i], scales[g], range));
            weight_sum += int64_t(integers[i]) * code;
            code_sum += code * code;
        }
        by_weight[g] = double(weight_sum);
        by_code[g] = double(code_sum);
    }
}

// The bf16 scale of least squared error of every group. `divisors`: what the largest magnitude is divided by for the
// scales that are tried; the least-squares scales of `refits` rounds follow. `limit`: the largest scale.
void pst_search_scales(const float* weights, int64_t groups, int64_t size, int64_t least, int64_t largest,
                       const float* divisors, int64_t count, int64_t refits, float limit, uint16_t* scales,
                       int64_t threads) {
    const pst::scale_search::Settings settings{least, largest, limit, divisors, count, refits};
    pst::scale_search::scales_of_groups(weights, groups, size, settings, scales, threads);
}

}  // extern "C"
