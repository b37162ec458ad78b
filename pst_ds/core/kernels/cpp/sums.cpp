// Sums over the weights of a tile for the statistics of a layer: plain C functions for ctypes. The torch versions are
// in core/stats.py; both add in double precision, in different orders.

#include <cstdint>
#include <cstring>

#include "bf16.hpp"

namespace {

constexpr int LANES = 8;
typedef float floats __attribute__((vector_size(LANES * 4)));
typedef int32_t ints __attribute__((vector_size(LANES * 4)));
typedef double doubles __attribute__((vector_size(LANES * 8)));

using pst::load;

// The last values of a run, fewer than LANES, padded with zeros.
template <class V, class T> inline V load_rest(const T* from, int64_t count) {
    V value{};
    std::memcpy(&value, from, count * sizeof(T));
    return value;
}

inline doubles wide(floats values) { return __builtin_convertvector(values, doubles); }

inline double total(doubles sum) {
    double all = 0;
    for (int i = 0; i < LANES; ++i) all += sum[i];
    return all;
}

struct Moments {
    doubles x{}, y{}, xx{}, yy{}, xy{};
    void add(ints key, ints weight) {
        doubles score = wide(floats(key ^ ((key >> 31) & 0x7fffffff))), magnitude = wide(floats(weight & 0x7fffffff));
        x += score;
        y += magnitude;
        xx += score * score;
        yy += magnitude * magnitude;
        xy += score * magnitude;
    }
};

}  // namespace

extern "C" {

// For n scores x, given by their keys, and magnitudes y = |weights|: the sums of x, y, x x, y y, x y.
void pst_moments(const int32_t* keys, const float* weights, int64_t n, double* sums) {
    Moments found;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) found.add(load<ints>(keys + i), load<ints>(weights + i));
    if (i < n) found.add(load_rest<ints>(keys + i, n - i), load_rest<ints>(weights + i, n - i));
    const doubles each[] = {found.x, found.y, found.xx, found.yy, found.xy};
    for (int k = 0; k < 5; ++k) sums[k] = total(each[k]);
}
}
