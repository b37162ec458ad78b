// Apply masks and low-rank updates to weights: plain C functions for ctypes, compiled for this processor.
//
// Layout
//   values       (n,) numbers of 2 or 4 bytes, handled as unsigned integers; bit i % 8 of byte i / 8 of `bits` keeps
//                value i. A pruned value becomes +0.0, also if it is NaN or infinite: bits are masked, not multiplied.
//   weight, out  (rows, cols) bf16, columns contiguous, rows a stride apart; they may be the same array
//   left, right  (rows, rank) and (rank, cols) bf16 with any strides, such as those of a transposed factor
//   bits         (rows, row_bytes) uint8: each row starts at a byte
//
// No array needs an alignment. The caller owns all of them. pst_merge repacks the factors (Product) for one call, and
// splits rows over `threads` OpenMP threads; threads write different rows, and the result does not depend on their number.
//
// The order of a sum over components is fixed per weight, so a weight is bit-identical in every rectangle and for every
// number of rows. It is not that of a BLAS: updated_weight in core/scores.py may differ in the last bit, apply_mask_ in
// core/bits.py never does.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "bf16.hpp"

#ifdef __AVX512BW__
#include <immintrin.h>
#endif

namespace {

// A 32-byte vector of weights of type T, and in lane i of `each` the mask bit of weight i.
template <class T> struct Lanes;
template <> struct Lanes<uint16_t> {
    typedef uint16_t words __attribute__((vector_size(32)));
    static constexpr words each = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768};
};
template <> struct Lanes<uint32_t> {
    typedef uint32_t words __attribute__((vector_size(32)));
    static constexpr words each = {1, 2, 4, 8, 16, 32, 64, 128};
};

#ifdef __AVX512BW__
inline void keep_vector(uint16_t* values, const uint8_t* bits) {
    __mmask32 kept;
    std::memcpy(&kept, bits, sizeof kept);
    _mm512_storeu_si512(values, _mm512_maskz_loadu_epi16(kept, values));
}
inline void keep_vector(uint32_t* values, const uint8_t* bits) {
    __mmask16 kept;
    std::memcpy(&kept, bits, sizeof kept);
    _mm512_storeu_si512(values, _mm512_maskz_loadu_epi32(kept, values));
}
constexpr int VECTOR_BYTES = 64;
#else
template <class T> inline void keep_vector(T* values, const uint8_t* bits) {
    typedef typename Lanes<T>::words words;
    constexpr int num_bytes = 32 / sizeof(T) / 8;
    uint32_t kept = 0;
    std::memcpy(&kept, bits, num_bytes);
    const words spread = Lanes<T>::each - Lanes<T>::each + T(kept);  // all mask bits in every lane
    words vector;
    std::memcpy(&vector, values, sizeof vector);
    vector &= words((spread & Lanes<T>::each) != 0);  // a comparison is all ones or zero
    std::memcpy(values, &vector, sizeof vector);
}
constexpr int VECTOR_BYTES = 32;
#endif

// Keep n values: whole vectors, then the rest one by one. A vector's bits are whole bytes.
template <class T> void keep(T* values, const uint8_t* bits, int64_t n) {
    constexpr int64_t step = VECTOR_BYTES / sizeof(T);
    int64_t i = 0;
    for (; i + step <= n; i += step) keep_vector(values + i, bits + i / 8);
    for (; i < n; ++i)
        if (!(bits[i >> 3] >> (i & 7) & 1)) values[i] = 0;
}

#ifdef __AVX512BW__
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif
// A block of ROWS rows and CHUNK columns: eight vectors of sums, which stay in registers.
constexpr int64_t ROWS = 4;
constexpr int64_t CHUNK = 2 * LANES;
typedef float floats __attribute__((vector_size(LANES * 4)));
typedef uint32_t words __attribute__((vector_size(LANES * 4)));
typedef uint16_t halves __attribute__((vector_size(LANES * 2)));

using pst::load;

#ifdef __AVX512BW__
inline floats widen_many(const uint16_t* from) {
    const __m256i narrow = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return floats(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16));
}
#else
inline floats widen_many(const uint16_t* from) { return floats(__builtin_convertvector(load<halves>(from), words) << 16); }
#endif

// Round to nearest, ties to even; a NaN stays NaN.
inline void narrow_many(floats values, uint16_t* to) {
    const words bits = words(values);
    const words is_nan = words(values != values);
    const words rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    const words wide = is_nan ? (bits >> 16 | 0x40) : rounded;
#ifdef __AVX512BW__
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(__m512i(wide)));
#else
    const halves narrow = __builtin_convertvector(wide, halves);
    std::memcpy(to, &narrow, sizeof narrow);
#endif
}

// Add the products of the two bf16 numbers in `left` with those in each word of `right`, the lower half first.
inline floats add_products(floats sum, uint32_t left, words right) {
#ifdef __AVX512BF16__
    return _mm512_dpbf16_ps(sum, __m512bh(_mm512_set1_epi32(int(left))), __m512bh(right));
#else
    const uint32_t low = left << 16;
    const uint32_t high = left & 0xffff0000;
    return sum + load<float>(&low) * floats(right << 16) + load<float>(&high) * floats(right & 0xffff0000);
#endif
}

// Factors of an update, two components per word of 32 bits, the first in the lower half. Elements beyond the last
// component or column are zero, so that they add nothing and loops need no special case.
struct Product {
    int64_t pairs;                // words per row: ceil(rank / 2)
    std::vector<uint32_t> left;   // (rows, pairs)
    std::vector<uint32_t> right;  // (panels of CHUNK columns, pairs, CHUNK)

    Product(int64_t rows, int64_t cols, int64_t rank, const uint16_t* of_left, const int64_t* left_strides,
            const uint16_t* of_right, const int64_t* right_strides)
        : pairs((rank + 1) / 2), left(rows * pairs), right((cols + CHUNK - 1) / CHUNK * CHUNK * pairs) {
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t k = 0; k < rank; ++k)
                left[r * pairs + k / 2] |= uint32_t(of_left[r * left_strides[0] + k * left_strides[1]]) << k % 2 * 16;
        for (int64_t k = 0; k < rank; ++k)
            for (int64_t c = 0; c < cols; ++c)
                right[(c / CHUNK * pairs + k / 2) * CHUNK + c % CHUNK] |=
                    uint32_t(of_right[k * right_strides[0] + c * right_strides[1]]) << k % 2 * 16;
    }
};

// from + beta `product` for CHUNK columns of N rows, in a fixed order: a weight is bit-identical in any rectangle.
template <int64_t N>
inline void add_chunk(const Product& product, float beta, int64_t row, int64_t col, const uint16_t* from, int64_t stride,
                      uint16_t* to, int64_t to_stride) {
    const int64_t pairs = product.pairs;
    const uint32_t* left = product.left.data() + row * pairs;
    const uint32_t* right = product.right.data() + col * pairs;
    floats sums[N][2] = {};
    for (int64_t k = 0; k < pairs; ++k) {
        const words first = load<words>(right + k * CHUNK);
        const words second = load<words>(right + k * CHUNK + LANES);
        for (int64_t i = 0; i < N; ++i) {
            sums[i][0] = add_products(sums[i][0], left[i * pairs + k], first);
            sums[i][1] = add_products(sums[i][1], left[i * pairs + k], second);
        }
    }
    for (int64_t i = 0; i < N; ++i)
        for (int64_t j = 0; j < 2; ++j)
            narrow_many(widen_many(from + i * stride + j * LANES) + beta * sums[i][j], to + i * to_stride + j * LANES);
}

// Row `row` and the N - 1 after it: all their columns, chunk by chunk.
template <int64_t N>
void add_rows(const Product& product, float beta, int64_t row, int64_t cols, const uint16_t* from, int64_t stride,
              uint16_t* to, int64_t to_stride) {
    int64_t c = 0;
    for (; c + CHUNK <= cols; c += CHUNK) add_chunk<N>(product, beta, row, c, from + c, stride, to + c, to_stride);
    if (c == cols) return;
    // The last columns are padded to a chunk in a copy: neither loads nor stores pass the end of a row.
    uint16_t rest[N * CHUNK] = {};
    for (int64_t i = 0; i < N; ++i) std::memcpy(rest + i * CHUNK, from + i * stride + c, size_t(cols - c) * 2);
    add_chunk<N>(product, beta, row, c, rest, CHUNK, rest, CHUNK);
    for (int64_t i = 0; i < N; ++i) std::memcpy(to + i * to_stride + c, rest + i * CHUNK, size_t(cols - c) * 2);
}

}  // namespace

// Set those of n values of `size` bytes, 2 or 4, to +0.0 whose bit is 0.
extern "C" void pst_apply_bits(void* values, int64_t size, const uint8_t* bits, int64_t n) {
    if (size == 2) keep(static_cast<uint16_t*>(values), bits, n);
    else keep(static_cast<uint32_t*>(values), bits, n);
}

// out = weight + beta left right for a rectangle of bf16, or +0.0 where the bits are 0. `weight` and `out`, which may
// be the same, have contiguous rows. left (rows, rank) and right (rank, cols) have any strides {row, column}. `bits`,
// unless null, has `row_bytes` bytes per row.
extern "C" void pst_merge(const uint16_t* weight, int64_t stride, uint16_t* out, int64_t out_stride, int64_t rows, int64_t cols,
                          const uint16_t* left, const int64_t* left_strides, const uint16_t* right,
                          const int64_t* right_strides, int64_t rank, float beta, const uint8_t* bits, int64_t row_bytes,
                          int threads) {
    const Product product(rows, cols, rank, left, left_strides, right, right_strides);
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows > ROWS) schedule(static)
#endif
    for (int64_t row = 0; row < rows; row += ROWS) {
        const int64_t end = std::min(row + ROWS, rows);
        if (end - row == ROWS)
            add_rows<ROWS>(product, beta, row, cols, weight + row * stride, stride, out + row * out_stride, out_stride);
        for (int64_t r = row; r < end; ++r) {
            if (end - row < ROWS)  // the last rows are fewer than a block
                add_rows<1>(product, beta, r, cols, weight + r * stride, stride, out + r * out_stride, out_stride);
            if (bits) keep(out + r * out_stride, bits + r * row_bytes, cols);
        }
    }
}
