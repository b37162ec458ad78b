// Convert between a dense matrix and its kept values: plain C functions for ctypes, which choose the instructions of this
// processor; the numpy versions are in formats/rows.py.
// Weights are unsigned integers of their width. Bits are little-endian, every row starts at a byte boundary, and
// padding bits are zero: the callers have checked this.

#include <algorithm>

#include "bitmask/common.hpp"

namespace pst::pack {

// Call ``run`` with a zero of the unsigned type of ``size`` bytes.
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

// clang ignores the pragma. PST_PLAIN: a build for tests.
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
    static const bool found = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                              __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("popcnt") &&
                              __builtin_cpu_supports("bmi2");
    return found;
}
#define PST_BEST(CALL) pst::pack::is_wide() ? pst::pack::wide::CALL : pst::pack::plain::CALL
#else
#define PST_BEST(CALL) pst::pack::plain::CALL
#endif

}  // namespace pst::pack

extern "C" {

void pst_row_bits(const void* weight, int64_t size, int64_t rows, int64_t columns, uint8_t* bits) {
    PST_BEST(row_bits(weight, size, rows, columns, bits));
}

void pst_row_counts(const uint8_t* bits, int64_t rows, int64_t row_bytes, int64_t* counts) {
    PST_BEST(row_counts(bits, rows, row_bytes, counts));
}

void pst_gather(const void* weight, const uint8_t* bits, int64_t size, int64_t rows, int64_t columns, void* values,
                int64_t total) {
    PST_BEST(gather(weight, bits, size, rows, columns, values, total));
}

void pst_scatter(const void* values, const uint8_t* bits, int64_t size, int64_t rows, int64_t columns, void* out,
                 int64_t total) {
    PST_BEST(scatter(values, bits, size, rows, columns, out, total));
}

void pst_columns(const uint8_t* bits, int64_t rows, int64_t columns, int64_t size, void* out, int64_t total) {
    PST_BEST(columns_of(bits, rows, columns, size, out, total));
}
}
