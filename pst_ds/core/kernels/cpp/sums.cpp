// Sums over the weights of a tile for the statistics of a layer: plain C functions for ctypes. The torch versions are
// in core/stats.py.
//
// Layout
//   keys     (n,) int32, keys of scores (masks.cpp)
//   weights  (n,) fp32 in the same order
//   values   (rows, cols) fp32 or bf16, columns contiguous, rows `stride` elements apart
//   sums     (5,) double
//
// No array needs an alignment, and none is read past its end: the last values of a run are copied into a padded vector.
// The caller owns all arrays; no thread is started. Sums are in double precision, in which a product
// of two fp32 numbers is exact. Torch adds in another order, so the last bits may differ.

#include <cstdint>
#include <cstring>

#include "bf16.hpp"

namespace {

constexpr int LANES = 8;
typedef float floats __attribute__((vector_size(LANES * 4)));
typedef int32_t ints __attribute__((vector_size(LANES * 4)));
typedef uint16_t halves __attribute__((vector_size(LANES * 2)));
typedef double doubles __attribute__((vector_size(LANES * 8)));

using pst::load;

// The last values of a run, fewer than LANES, padded with zeros.
template <class V, class T> inline V load_rest(const T* from, int64_t count) {
    V value{};
    std::memcpy(&value, from, count * sizeof(T));
    return value;
}

inline doubles wide(floats values) { return __builtin_convertvector(values, doubles); }
inline doubles wide(halves bf16) { return wide(floats(__builtin_convertvector(bf16, ints) << 16)); }

inline double total(doubles sum) {
    double all = 0;
    for (int i = 0; i < LANES; ++i) all += sum[i];
    return all;
}

// Eight partial sums of each moment.
struct Moments {
    doubles x{};
    doubles y{};
    doubles xx{};
    doubles yy{};
    doubles xy{};
    void add(ints key, ints weight) {
        doubles score = wide(floats(key ^ ((key >> 31) & 0x7fffffff)));  // the inverse of key_of in masks.cpp
        doubles magnitude = wide(floats(weight & 0x7fffffff));           // without the sign
        x += score;
        y += magnitude;
        xx += score * score;
        yy += magnitude * magnitude;
        xy += score * magnitude;
    }
};

// The sum of squares of a rectangle. V: a vector of LANES elements of type T.
template <class V, class T> double squares(const T* values, int64_t stride, int64_t rows, int64_t cols) {
    // Two sums: each addition to one sum would wait for the previous one.
    doubles even{};
    doubles odd{};
    for (int64_t row = 0; row < rows; ++row) {
        const T* from = values + row * stride;
        int64_t col = 0;
        for (; col + 2 * LANES <= cols; col += 2 * LANES) {
            doubles first = wide(load<V>(from + col));
            doubles second = wide(load<V>(from + col + LANES));
            even += first * first;
            odd += second * second;
        }
        for (; col < cols; col += LANES) {
            doubles value = wide(load_rest<V>(from + col, cols - col < LANES ? cols - col : LANES));
            even += value * value;
        }
    }
    return total(even + odd);
}

}  // namespace

extern "C" {

// For n scores x, given by their keys, and magnitudes y = |weights|: the sums of x, y, x x, y y, x y.
void pst_moments(const int32_t* keys, const float* weights, int64_t n, double* sums) {
    Moments moments;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) moments.add(load<ints>(keys + i), load<ints>(weights + i));
    // padding is key 0 and weight 0, a score and a magnitude of 0, which add nothing
    if (i < n) moments.add(load_rest<ints>(keys + i, n - i), load_rest<ints>(weights + i, n - i));
    const doubles each[] = {moments.x, moments.y, moments.xx, moments.yy, moments.xy};
    for (int k = 0; k < 5; ++k) sums[k] = total(each[k]);
}

// The sum of squares of a rectangle whose rows are `stride` apart: fp32 (0) or bf16 (1).
double pst_squares(const void* values, int64_t dtype, int64_t stride, int64_t rows, int64_t cols) {
    if (dtype) return squares<halves>(static_cast<const uint16_t*>(values), stride, rows, cols);
    return squares<floats>(static_cast<const float*>(values), stride, rows, cols);
}
}
