// Convert between a dense matrix and its kept values: plain C functions for ctypes, which choose the instructions of this
// processor. The numpy versions in pst_ds/formats/rows.py return the same bytes.
//
// Layout
//   weight, out  (rows, columns), contiguous: numbers of 1, 2, 4 or 8 bytes, handled as unsigned integers of that size
//   bits         (rows, ceil(columns / 8)) uint8, little-endian: weight i of a row has bit i % 8 of byte i / 8. Each row
//                starts at a byte, and the padding bits of its last byte are zero; callers have checked this.
//   values       (total,): the kept weights, row by row, with +0 where the weight is -0
//   counts       (rows,) int64: set bits per row
//   columns      `out` of pst_columns, (total,) integers of `size` bytes: the column of each kept weight, row by row
//
// No array needs an alignment. The caller owns all of them; nothing is kept between calls, no thread is started, and
// calls on different outputs may run at the same time.

#include <algorithm>

#include "bitmask/common.hpp"

namespace pst::pack {

// Call ``run`` with a zero of the unsigned type of ``size`` bytes: its type selects the loop.
template <class F> inline void for_size(int64_t size, F run) {
    if (size == 1) run(uint8_t());
    if (size == 2) run(uint16_t());
    if (size == 4) run(uint32_t());
    if (size == 8) run(uint64_t());
}

namespace plain {
#define PST_WIDE 0
#include "pack_loops.hpp"
#undef PST_WIDE
}  // namespace plain

// clang ignores the pragma, so it would compile AVX-512 code that every processor runs. PST_PLAIN: a build for tests.
#if PST_X86 && !defined(__clang__) && !PST_PLAIN
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vbmi2,popcnt,bmi,bmi2")
namespace wide {
#define PST_WIDE 1
#include "pack_loops.hpp"
#undef PST_WIDE
}  // namespace wide
#pragma GCC pop_options

inline bool is_wide() {
    static const bool supported = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                  __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("popcnt") &&
                                  __builtin_cpu_supports("bmi2");
    return supported;
}
#define PST_BEST(CALL) pst::pack::is_wide() ? pst::pack::wide::CALL : pst::pack::plain::CALL
#else
#define PST_BEST(CALL) pst::pack::plain::CALL
#endif

}  // namespace pst::pack

extern "C" {

// Set the bit of every weight that is neither +0 nor -0.
void pst_row_bits(const void* weight, int64_t size, int64_t rows, int64_t columns, uint8_t* bits) {
    PST_BEST(row_bits(weight, size, rows, columns, bits));
}

// Count the set bits of each row.
void pst_row_counts(const uint8_t* bits, int64_t rows, int64_t row_bytes, int64_t* counts) {
    PST_BEST(row_counts(bits, rows, row_bytes, counts));
}

// Write the weights whose bits are set to `values`. total: number of set bits, and of places in `values`.
void pst_gather(const void* weight, const uint8_t* bits, int64_t size, int64_t rows, int64_t columns, void* values,
                int64_t total) {
    PST_BEST(gather(weight, bits, size, rows, columns, values, total));
}

// Write `values` to the places of the set bits of `out`, and +0 to the others. Inverse of pst_gather.
void pst_scatter(const void* values, const uint8_t* bits, int64_t size, int64_t rows, int64_t columns, void* out,
                 int64_t total) {
    PST_BEST(scatter(values, bits, size, rows, columns, out, total));
}

// As pst_scatter, to int8, from signed 4-bit codes, two per byte, the first in its lower half; every row starts with a new
// byte. bits: null if all weights are kept. row_codes: working memory of columns + 1 bytes.
void pst_scatter_nibbles(const uint8_t* packed, const uint8_t* bits, int64_t rows, int64_t columns, uint8_t* row_codes,
                         uint8_t* out) {
    PST_BEST(scatter_nibbles(packed, bits, rows, columns, row_codes, out));
}

// Write the column of each set bit. size: bytes of a column number in `out`.
void pst_columns(const uint8_t* bits, int64_t rows, int64_t columns, int64_t size, void* out, int64_t total) {
    PST_BEST(columns_of(bits, rows, columns, size, out, total));
}
}
