// Shared by the kernels of every instruction set: the packed matrix, scratch memory, and rounding.
//
// Layout of a packed matrix of `rows` by `cols`, made and checked by pst_ds/formats:
//   mask         (rows, ceil(cols / 8)) uint8, little-endian bits: column i of a row has bit i % 8 of byte i / 8. Each row
//                starts at a byte, and padding bits are zero.
//   values       (count,) bf16 or fp32: the kept weights, row by row, without gaps between rows
//   row_offsets  (rows,) int64: the place of each row's first value
//
// The arrays are the bytes of a file, mapped into memory: no alignment is assumed, nothing is written, and a load must
// stay inside them (may_overread, mask_word). Working memory (Scratch) is aligned to 64 bytes, and rows in it are padded
// with zeros to whole vectors. in_parallel splits rows among OpenMP threads at multiples of 16 rows, so that two
// threads rarely write to one cache line of y.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "../bf16.hpp"

#ifdef _OPENMP
#include <omp.h>
#endif

#if defined(__x86_64__) && defined(__GNUC__)
#define PST_X86 1
#include <cpuid.h>
#include <immintrin.h>
#endif
#if defined(__aarch64__) && defined(__GNUC__) && !defined(__ARM_BIG_ENDIAN)
#include <arm_neon.h>
// GCC compiles a region for instructions that the rest may not use; clang only has those of its command line.
#if (!defined(__clang__) && __GNUC__ >= 10) || defined(__ARM_FEATURE_DOTPROD)
#define PST_COMPILES_DOTPROD 1
#endif
#if PST_COMPILES_DOTPROD && (!defined(__clang__) || defined(__ARM_FEATURE_MATMUL_INT8))
#define PST_COMPILES_I8MM 1
#endif
#endif
#define PST_COMPILES_AVX_VNNI (PST_X86 && __GNUC__ >= 11)  // clang reports version 4
#define PST_COMPILES_AVX512_BF16 (PST_X86 && (__GNUC__ >= 10 || __clang_major__ >= 9))
// PST_PRETENDED_TILES: a build for tests, with arrays in place of the AMX registers, see decoder/tiles.hpp.
#if PST_X86 && defined(__linux__) && (__GNUC__ >= 11 || PST_PRETENDED_TILES)
#define PST_COMPILES_TILES 1
#endif

namespace pst {

// From the type of the weight to the type computed with.
template <class T> inline void convert(T value, T* to) { *to = value; }
inline void convert(bf16 value, float* to) { *to = widen(value); }

// A matrix of `rows` by `cols` that stores only the values kept by the mask, row by row.
template <class T> struct Packed {
    const T* values;
    const uint8_t* mask;  // bytes_per_row() per row, little-endian bits, padding bits zero
    const int64_t* row_offsets;  // first value of each row
    int64_t rows;
    int64_t cols;
    int64_t count;

    int64_t bytes_per_row() const { return (cols + 7) / 8; }
    const uint8_t* mask_row(int64_t row) const { return mask + row * bytes_per_row(); }
    // Whether reading a whole vector of `lanes` values at any place of this row stays inside the array.
    bool may_overread(int64_t row, int64_t lanes) const {
        int64_t end = row + 1 < rows ? row_offsets[row + 1] : count;
        return end + lanes <= count;
    }
    // Average number of values in 128 columns, in cache lines of 64 bytes, rounded up: the amount to prefetch per step.
    int lines_in_128() const {
        double bytes = double(count) / double(rows > 0 && cols > 0 ? rows * cols : 1) * 128 * sizeof(T);
        return int(bytes / 64) + 1;
    }
};

// 32 mask bits from column `col` (a multiple of 32) on; zeros beyond the end of the row, whose bytes are not read.
inline uint32_t mask_word(const uint8_t* row, int64_t bytes_per_row, int64_t col) {
    uint32_t word = 0;
    const uint8_t* from = row + col / 8;
    const int64_t left = bytes_per_row - col / 8;
    if (left >= 4)
        std::memcpy(&word, from, 4);  // a constant size compiles to one load instead of a call
    else
        for (int64_t i = 0; i < left; ++i) word |= uint32_t(from[i]) << 8 * i;
    return word;
}

// The lower or upper of the two signed 4-bit codes of a byte; (n ^ 8) - 8 extends the sign.
inline int nibble(uint8_t pair, int64_t upper) { return ((upper ? pair >> 4 : pair & 15) ^ 8) - 8; }

inline int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

// Memory that a thread keeps between calls, aligned to a cache line. Its contents are lost when it grows.
class Scratch {
   public:
    Scratch() = default;
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    ~Scratch() { std::free(data_); }

    // Returns null if memory is short.
    template <class C> C* get(int64_t count) {
        if (count < 0 || count > (INT64_MAX - 63) / int64_t(sizeof(C))) return nullptr;
        size_t bytes = size_t(round_up(count * int64_t(sizeof(C)), 64));
        if (bytes > size_) {
            std::free(data_);
            data_ = std::aligned_alloc(64, bytes);
            size_ = data_ ? bytes : 0;
        }
        return static_cast<C*>(data_);
    }

   private:
    void* data_ = nullptr;
    size_t size_ = 0;
};

// A product: y (n, rows) = x (n, cols) W' + bias; the rows of x and y are consecutive.
template <class T> struct Job {
    Packed<T> weight;
    const T* x;
    const T* bias;  // or null
    T* y;
    int64_t n;

    void store(int64_t column, int64_t row, float sum) const {
        narrow(bias ? sum + widen(bias[row]) : sum, y + column * weight.rows + row);
    }
};

// Call work(first, last) for each thread's part of the rows, split at multiples of 16. False if any call returns false.
template <class Work> bool in_parallel(int64_t rows, int threads, const Work& work) {
    const int64_t groups = (rows + 15) / 16;
    if (threads > groups) threads = int(groups);
#ifdef _OPENMP
    if (threads > 1) {
        bool done = true;
#pragma omp parallel num_threads(threads) reduction(&& : done)
        {
            const int64_t thread = omp_get_thread_num();
            const int64_t team = omp_get_num_threads();  // may be fewer than asked for
            const int64_t first = groups * thread / team * 16;
            const int64_t last = groups * (thread + 1) / team * 16;
            done = work(first, last < rows ? last : rows);
        }
        return done;
    }
#endif
    return work(int64_t(0), rows);
}

}  // namespace pst
