// One pass of swaps over the rows of a mask: a plain C function for ctypes. The torch version in swaps.py is
// bit-identical: products and sums are rounded separately (-ffp-contract=off), in the same order.

#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace {

#ifdef __AVX512F__
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif
typedef float floats __attribute__((vector_size(LANES * 4)));
typedef int32_t ints __attribute__((vector_size(LANES * 4)));
constexpr float NEVER = std::numeric_limits<float>::infinity();

inline floats load(const float* from) {
    floats value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

// A row: target weights and current weights; the mask; the output error seen from every input; and 0 for a weight that
// may be restored, NEVER for one that is kept.
struct Row {
    const float* wanted;
    float* values;
    uint8_t* keep;
    float* pull;
    float* barred;
};

struct Best {
    float score;
    int64_t at;
};

// Change of the error when a weight is restored: with its target value, or with the value that lowers it most.
template <bool REFIT, class V> inline V score(V pull, V wanted) {
    if (REFIT) return -(pull * pull);
    return wanted * (wanted - (pull + pull));
}

// The best weight in [first, last) to restore once a weight of value `left`, whose input has this row of the Gram
// matrix, is removed; of equal ones the first.
template <bool REFIT> Best best_of(const Row& row, const float* gram, float left, int64_t first, int64_t last) {
    Best best = {NEVER, -1};
    int64_t p = first;
    if (last - first >= LANES) {
        floats lowest = floats{} + NEVER;
        ints where = ints{} - 1, here;
        for (int lane = 0; lane < LANES; ++lane) here[lane] = int32_t(first) + lane;
        for (; p + LANES <= last; p += LANES) {
            floats pull = load(row.pull + p) + left * load(gram + p);
            floats found = score<REFIT>(pull, load(row.wanted + p)) + load(row.barred + p);
            ints is_lower = found < lowest;
            lowest = is_lower ? found : lowest;
            where = is_lower ? here : where;
            here += LANES;
        }
        for (int lane = 0; lane < LANES; ++lane)
            if (lowest[lane] < best.score || (lowest[lane] == best.score && where[lane] < best.at))
                best = {lowest[lane], where[lane]};
    }
    for (; p < last; ++p) {
        float found = score<REFIT>(row.pull[p] + left * gram[p], row.wanted[p]) + row.barred[p];
        if (found < best.score) best = {found, p};
    }
    return best;
}

template <bool REFIT>
int64_t swap_in_row(const Row& row, const float* gram, int64_t inputs, int64_t span, float least) {
    int64_t swaps = 0;
    for (int64_t j = 0; j < inputs; ++j) {
        if (!row.keep[j]) continue;
        const float left = row.values[j], *of_left = gram + j * inputs;
        int64_t first = j / span * span;
        Best best = best_of<REFIT>(row, of_left, left, first, first + span);
        if (!(left * (row.pull[j] + row.pull[j] + left) + best.score < -least)) continue;
        int64_t p = best.at;
        const float back = REFIT ? row.pull[p] + left * of_left[p] : row.wanted[p], *of_back = gram + p * inputs;
        for (int64_t i = 0; i < inputs; ++i) row.pull[i] = (row.pull[i] + left * of_left[i]) - back * of_back[i];
        row.values[j] = 0.0f, row.keep[j] = 0, row.barred[j] = 0.0f;
        row.values[p] = back, row.keep[p] = 1, row.barred[p] = NEVER;
        ++swaps;
    }
    return swaps;
}

}  // namespace

extern "C" {

// Swap every kept weight of every row, from first to last, with the pruned weight of its span that lowers the row's
// error most, if by more than the row's `least`. Returns the number of swaps. All are (rows, inputs) except `gram`,
// (inputs, inputs), and `least`, (rows,); `values`, `keep` and `pull` are written.
int64_t pst_swap_pass(
    const float* wanted, float* values, uint8_t* keep, float* pull, const float* least, const float* gram, int64_t rows,
    int64_t inputs, int64_t span, int64_t refit, int64_t threads
) {
    int64_t swaps = 0;
#pragma omp parallel for schedule(dynamic, 8) num_threads(threads) reduction(+ : swaps)
    for (int64_t r = 0; r < rows; ++r) {
        int64_t at = r * inputs;
        std::vector<float> barred(inputs);
        for (int64_t i = 0; i < inputs; ++i) barred[i] = keep[at + i] ? NEVER : 0.0f;
        Row row = {wanted + at, values + at, keep + at, pull + at, barred.data()};
        swaps += refit ? swap_in_row<true>(row, gram, inputs, span, least[r])
                       : swap_in_row<false>(row, gram, inputs, span, least[r]);
    }
    return swaps;
}

}  // extern "C"
