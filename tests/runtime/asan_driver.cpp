// Runs the kernels of the runtime and the loops of the packed formats on arrays of exactly their size, for a build with
// -fsanitize=address,undefined. Every result is compared with a loop written out. Prints what it found wrong.
// Arguments: number of random cases, seed.

#include "../../pst_ds/core/kernels/cpp/bitmask/bitmask.cpp"

#include "../../pst_ds/core/kernels/cpp/pack.cpp"

#include <cstdio>
#include <memory>
#include <random>
#include <vector>

namespace driver {

template <class T> using Exact = std::unique_ptr<T[]>;  // a std::vector may have room to spare
template <class T> Exact<T> exact(int64_t count) { return Exact<T>(new T[size_t(count)]()); }

using Random = std::mt19937_64;
int64_t between(Random& random, int64_t low, int64_t high) {
    return low + int64_t(random() % uint64_t(high - low + 1));
}
int64_t one_of(Random& random, std::initializer_list<int64_t> choices) {
    return choices.begin()[random() % choices.size()];
}

uint16_t as(float value, uint16_t) {
    uint16_t to;
    pst::narrow(value, &to);
    return to;
}
float as(float value, float) { return value; }

struct Shape {
    int64_t rows, cols, n;
    unsigned keep_of_16;
};

Shape random_shape(Random& random) {
    const int64_t n = one_of(random, {1, 1, 2, 3, 4, 5, 8, 9, 16, 17, 31, 32, 33, 48, 64, 129, 130, 513});
    int64_t cols = one_of(random, {1, 7, 8, 9, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 300, 4097, 4160});
    if (random() % 2) cols = between(random, 1, 700);
    const int64_t most = std::max<int64_t>(1, 300000 / (cols * n));
    int64_t rows = between(random, 1, std::min<int64_t>(most, 300));
    if (random() % 16 == 0) rows = between(random, 1, 300);  // more than 256 rows of more than 128 vectors
    return {rows, cols, n, unsigned(one_of(random, {0, 1, 3, 8, 13, 16}))};
}

// A packed matrix and its dense twin, of small whole numbers: their products add up exactly.
template <class T> struct Case {
    Shape shape;
    int64_t count = 0, row_bytes;
    Exact<uint8_t> mask;
    Exact<int64_t> offsets;
    Exact<T> values, x, bias;
    std::vector<float> dense;

    Case(Random& random, Shape s)
        : shape(s), row_bytes((s.cols + 7) / 8), mask(exact<uint8_t>(s.rows * row_bytes)), offsets(exact<int64_t>(s.rows)),
          x(exact<T>(s.n * s.cols)), bias(exact<T>(s.rows)), dense(size_t(s.rows * s.cols)) {
        std::vector<T> kept;
        for (int64_t row = 0; row < s.rows; ++row) {
            offsets[row] = int64_t(kept.size());
            for (int64_t col = 0; col < s.cols; ++col) {
                if (random() % 16 >= s.keep_of_16) continue;
                const float value = float(between(random, 1, 3));
                kept.push_back(as(value, T()));
                dense[row * s.cols + col] = value;
                mask[row * row_bytes + col / 8] |= uint8_t(1 << col % 8);
            }
        }
        count = int64_t(kept.size());
        values = exact<T>(count);
        std::copy(kept.begin(), kept.end(), values.get());
        for (int64_t i = 0; i < s.n * s.cols; ++i) x[i] = as(float(between(random, -2, 2)), T());
        for (int64_t i = 0; i < s.rows; ++i) bias[i] = as(float(between(random, -9, 9)), T());
    }
    float sum(int64_t vector, int64_t row, bool with_bias) const {
        float total = with_bias ? pst::widen(bias[row]) : 0.0f;
        for (int64_t k = 0; k < shape.cols; ++k) total += dense[row * shape.cols + k] * pst::widen(x[vector * shape.cols + k]);
        return total;
    }
};

template <class T> bool right(const Case<T>& c, const T* y, bool with_bias) {
    for (int64_t vector = 0; vector < c.shape.n; vector += c.shape.n > 40 ? 7 : 1)
        for (int64_t row = 0; row < c.shape.rows; ++row)
            if (y[vector * c.shape.rows + row] != as(c.sum(vector, row, with_bias), T())) return false;
    return true;
}

template <class T> int products(Random& random) {
    const Case<T> c(random, random_shape(random));
    int wrong = 0;
    for (int level = 0; level <= pst_best_level(); ++level) {
        const bool with_bias = random() % 2;
        const Exact<T> y = exact<T>(c.shape.n * c.shape.rows);
        const int threads = int(between(random, 1, 2));
        const int code = pst_bitmask_linear(c.values.get(), c.mask.get(), c.offsets.get(), c.shape.rows, c.shape.cols, c.count,
                                            c.x.get(), with_bias ? c.bias.get() : nullptr, y.get(), c.shape.n, sizeof(T),
                                            threads, level);
        if (code == 0 && right(c, y.get(), with_bias)) continue;
        std::printf("level %d, %d bytes, %ld x %ld, %ld vectors: wrong\n", level, int(sizeof(T)), long(c.shape.rows),
                    long(c.shape.cols), long(c.shape.n));
        ++wrong;
    }
    return wrong;
}

template <class T, class Index> int moves(Random& random) {
    Shape shape = random_shape(random);
    const Case<T> c(random, shape);
    const int64_t all = shape.rows * shape.cols, size = sizeof(T);
    const Exact<T> dense = exact<T>(all), gathered = exact<T>(c.count), again = exact<T>(all);
    const Exact<uint8_t> bits = exact<uint8_t>(shape.rows * c.row_bytes);
    const Exact<int64_t> counts = exact<int64_t>(shape.rows), starts = exact<int64_t>(shape.rows + 1);
    const Exact<Index> columns = exact<Index>(c.count);
    pst_scatter(c.values.get(), c.mask.get(), size, shape.rows, shape.cols, dense.get(), c.count);
    pst_gather(dense.get(), c.mask.get(), size, shape.rows, shape.cols, gathered.get(), c.count);
    pst_row_bits(dense.get(), size, shape.rows, shape.cols, bits.get());
    pst_row_counts(bits.get(), shape.rows, c.row_bytes, counts.get());
    pst_columns(bits.get(), shape.rows, shape.cols, sizeof(Index), columns.get(), c.count);
    for (int64_t row = 0; row < shape.rows; ++row) starts[row + 1] = starts[row] + counts[row];
    for (int64_t row = 0; row < shape.rows; ++row)
        for (int64_t at = starts[row]; at < starts[row + 1]; ++at) again[row * shape.cols + columns[at]] = gathered[at];
    bool good = starts[shape.rows] == c.count;
    for (int64_t i = 0; i < all; ++i) good = good && dense[i] == as(c.dense[i], T()) && again[i] == dense[i];
    for (int64_t i = 0; i < shape.rows * c.row_bytes; ++i) good = good && bits[i] == c.mask[i];
    for (int64_t i = 0; i < c.count; ++i) good = good && gathered[i] == c.values[i];
    if (!good) std::printf("moves of %ld x %ld, %d bytes: wrong\n", long(shape.rows), long(shape.cols), int(size));
    return !good;
}

}  // namespace driver

int main(int, char** arguments) {
    const int cases = std::atoi(arguments[1]);
    driver::Random random(std::atoi(arguments[2]));
    int wrong = 0;
    for (int i = 0; i < cases; ++i) {
        wrong += driver::products<uint16_t>(random) + driver::products<float>(random);
        wrong += driver::moves<uint16_t, uint16_t>(random) + driver::moves<float, uint32_t>(random);
    }
    std::printf("%d cases, %d levels, %d wrong\n", cases, pst_best_level() + 1, wrong);
    return wrong != 0;
}
