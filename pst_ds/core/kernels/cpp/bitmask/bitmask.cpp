// y = x W' + bias with W as a bitmask: plain C functions for ctypes, which choose the instructions of this processor.
//
// Layout
//   W     values, mask and row_offsets of a packed matrix (rows, cols), see common.hpp; bf16 or fp32
//   x     (n, cols) and y (n, rows), contiguous, of the dtype of W; bias (rows,) of the same dtype, or null
//
// A kernel expands some rows of W into working memory of its thread, with zeros at pruned places, and multiplies them
// with all vectors of x while they are in a cache: the packed weight is read from memory once per MOST_VECTORS vectors.
// Sums are in fp32, also for bf16 weights; their order depends on the instruction set and on n, so results of two levels
// agree up to rounding. They do not depend on the number of threads, which split the rows of W.
// No array needs an alignment. The caller owns all of them; working memory belongs to the calling thread and to those of
// OpenMP. Each instruction set includes panel.hpp in its namespace, inside a region compiled for it.
#include "common.hpp"
#include "portable.hpp"

namespace pst::portable {
#include "panel.hpp"
}

#if PST_X86
#pragma GCC push_options
#pragma GCC target("avx2,fma,popcnt")
#include "avx2.hpp"
namespace pst::avx2 {
#include "panel.hpp"
}
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,avx512bf16,popcnt,bmi,bmi2,fma")
#include "avx512.hpp"
namespace pst::avx512 {
#include "panel.hpp"
}
#include "few_vectors.hpp"
#include "amx_expand.hpp"
#pragma GCC target("amx-tile,amx-bf16")
#include "amx.hpp"
#pragma GCC pop_options
#endif

namespace pst {
namespace {

enum Level { PORTABLE = 0, AVX2 = 1, AVX512 = 2, AMX = 3 };
constexpr int64_t MOST_VECTORS = 512;  // per pass: more would not leave the caches room for their sums

int best_level() {
#if PST_X86
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512bf16") &&
                        __builtin_cpu_supports("bmi2");
    if (avx512) return may_use_tiles(AMX_BF16) ? AMX : AVX512;
    return avx2 ? AVX2 : PORTABLE;
#else
    return PORTABLE;
#endif
}

#if PST_X86
template <int LINES> bool run_avx512(const Job<bf16>& job, int threads, int level) {
    if (level == AMX) {
        if (job.n == 1) return avx512::one_vector_fp32<LINES>(job, threads);
        return amx::multiply<LINES>(job, threads);
    }
    if (job.n < avx512::MANY_VECTORS) return avx512::few_vectors<LINES>(job, threads);
    return avx512::multiply<avx512::Bf16<LINES>>(job, threads);
}
// The number of cache lines to prefetch per step depends on the density, and is a constant of the compiled loops.
bool run_avx512(const Job<bf16>& job, int threads, int level) {
    switch (job.weight.lines_in_128()) {
        case 1: return run_avx512<1>(job, threads, level);
        case 2: return run_avx512<2>(job, threads, level);
        case 3: return run_avx512<3>(job, threads, level);
        default: return run_avx512<4>(job, threads, level);
    }
}
bool run_avx512(const Job<float>& job, int threads, int) { return avx512::multiply<avx512::Fp32>(job, threads); }
#endif

template <class T> bool run_part(const Job<T>& job, int threads, int level) {
#if PST_X86
    if (level >= AVX512) return run_avx512(job, threads, level);
    if (level == AVX2) return avx2::multiply<avx2::Kernel<T>>(job, threads);
#endif
    return portable::multiply<portable::Kernel<T>>(job, threads);
}

// Multiply in passes of nearly equal numbers of vectors.
template <class T> bool run(Job<T> job, int threads, int level) {
    if (job.weight.rows == 0 || job.n == 0) return true;
    const int64_t all = job.n;
    const int64_t parts = (all + MOST_VECTORS - 1) / MOST_VECTORS;
    const T* x = job.x;
    T* y = job.y;
    for (int64_t i = 0; i < parts; ++i) {
        const int64_t first = all * i / parts;
        job.n = all * (i + 1) / parts - first;
        job.x = x + first * job.weight.cols;
        job.y = y + first * job.weight.rows;
        if (!run_part(job, threads, level)) return false;
    }
    return true;
}

template <class T>
bool run(const void* values, const uint8_t* mask, const int64_t* row_offsets, int64_t rows, int64_t cols, int64_t count,
         const void* x, const void* bias, void* y, int64_t n, int threads, int level) {
    return run(Job<T>{{static_cast<const T*>(values), mask, row_offsets, rows, cols, count},
                      static_cast<const T*>(x), static_cast<const T*>(bias), static_cast<T*>(y), n},
               threads, level);
}

}  // namespace
}  // namespace pst

// The best of: 0 plain C++, 1 AVX2, 2 AVX-512 with VBMI2 and BF16, 3 the same with AMX.
extern "C" int pst_best_level() {
    static const int best = pst::best_level();
    return best;
}

// x (n, cols), y (n, rows), bias (rows,) or null. bytes: per element, 2 for bf16 and 4 for fp32. level: at most
// pst_best_level(). The parts of the weight are trusted: they have passed the checks of pst_ds/formats. Returns 0, 1 if
// memory is short, 2 for wrong arguments.
extern "C" int pst_bitmask_linear(const void* values, const uint8_t* mask, const int64_t* row_offsets, int64_t rows,
                                  int64_t cols, int64_t count, const void* x, const void* bias, void* y, int64_t n,
                                  int bytes, int threads, int level) {
    if (rows < 0 || cols <= 0 || count < 0 || n < 0 || threads < 1 || level < 0 || level > pst_best_level()) return 2;
    if (bytes == 2)
        return !pst::run<pst::bf16>(values, mask, row_offsets, rows, cols, count, x, bias, y, n, threads, level);
    if (bytes == 4)
        return !pst::run<float>(values, mask, row_offsets, rows, cols, count, x, bias, y, n, threads, level);
    return 2;
}

// The same for the experts of a stack whose masks and row_offsets are consecutive, `rows` each; row_offsets count from
// an expert's first value. runs: (num_runs, 5) of an expert, its first value, its number of values, and its rows of
// x and y: the first, and how many.
extern "C" int pst_bitmask_experts(const void* values, const uint8_t* mask, const int64_t* row_offsets, int64_t rows,
                                   int64_t cols, const int64_t* runs, int64_t num_runs, const void* x, void* y, int bytes,
                                   int threads, int level) {
    const auto at = [](const void* from, int64_t element, int size) { return static_cast<const char*>(from) + element * size; };
    for (const int64_t* run = runs; run < runs + 5 * num_runs; run += 5) {
        const int64_t row = run[0] * rows;
        const int64_t first = run[3];
        char* to = static_cast<char*>(y) + first * rows * bytes;
        const int failed =
            pst_bitmask_linear(at(values, run[1], bytes), mask + row * ((cols + 7) / 8), row_offsets + row, rows, cols, run[2],
                               at(x, first * cols, bytes), nullptr, to, run[4], bytes, threads, level);
        if (failed) return failed;
    }
    return 0;
}
