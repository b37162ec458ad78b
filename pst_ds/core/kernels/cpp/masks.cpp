// Loops of a mask update: plain C functions for ctypes, compiled for this processor. Every function has a torch version
// in core/keys.py, core/units.py or core/bits.py with bit-identical results.
//
// Layout
//   weight   (rows, cols) fp32 or bf16, columns contiguous, rows `stride` elements apart
//   factors  fp32; left (rows, rank) with any strides, right (rank, cols) with contiguous columns
//   keys     int32, one per weight, row by row. A key orders like its fp32 score: the bits of a score order correctly as
//            integers where it is positive, and all but the sign are flipped where it is negative. -0 becomes +0 before.
//   keep     uint8 per weight, 1 keeps it
//   bits     one bit per weight: weight i has bit i % 8 of byte i / 8
//   indices  uint32 positions in a run of keys, so runs have fewer than 2^32 keys
//
// No array needs an alignment: vectors are copied in and out of registers. The caller owns all arrays; nothing is kept
// between calls, no thread is started, and calls on different outputs may run at the same time.
//
// Scores are bit-identical on every processor and in torch: for each weight, components are added in increasing order,
// and products and sums are rounded separately (-ffp-contract=off). How many columns a vector has does not matter.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "bf16.hpp"

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

#ifdef __AVX512F__
constexpr int LANES = 16;
#else
constexpr int LANES = 8;  // wider vectors than the processor has would go through memory
#endif
constexpr int CHUNK = 4;  // vectors of columns per step, for two rows: eight sums stay in registers
typedef float floats __attribute__((vector_size(LANES * 4)));
typedef int32_t ints __attribute__((vector_size(LANES * 4)));
typedef uint16_t halves __attribute__((vector_size(LANES * 2)));

using pst::load;
using pst::widen;

inline floats widen_many(const float* from) { return load<floats>(from); }
inline floats widen_many(const uint16_t* from) {
    typedef uint32_t words __attribute__((vector_size(LANES * 4)));
    return floats(__builtin_convertvector(load<halves>(from), words) << 16);
}

inline int32_t key_of(float score) {
    score += 0.0f;  // -0 + 0 is +0
    int32_t bits;
    std::memcpy(&bits, &score, 4);
    return bits ^ ((bits >> 31) & 0x7fffffff);  // the shift repeats the sign: negative numbers are flipped
}
inline ints keys_of(floats scores) {
    ints bits = ints(scores + 0.0f);
    return bits ^ ((bits >> 31) & 0x7fffffff);
}

// scale * left @ right, one component at a time.
struct Product {
    const float* left;   // (rows, rank)
    const float* right;  // (rank, cols)
    int64_t rank;
    int64_t left_row;    // stride of left from row to row
    int64_t left_rank;   // stride of left from component to component
    int64_t right_rank;  // stride of right from component to component
    float scale;
    // A factor of left. The scale multiplies it before the product, as in torch, and a scale of 1 changes no bit.
    float at(int64_t row, int64_t k) const {
        float value = left[row * left_row + k * left_rank];
        return scale == 1.0f ? value : value * scale;
    }
};

// sum += the product for ROWS rows and CHUNK vectors of columns.
template <int ROWS>
inline void add_product(floats (&sum)[2][CHUNK], const Product& p, int64_t row, int64_t col) {
    for (int64_t k = 0; k < p.rank; ++k) {
        floats right[CHUNK];
        for (int j = 0; j < CHUNK; ++j) right[j] = load<floats>(p.right + k * p.right_rank + col + j * LANES);
        for (int r = 0; r < ROWS; ++r) {
            float left = p.at(row + r, k);
            for (int j = 0; j < CHUNK; ++j) sum[r][j] = sum[r][j] + left * right[j];
        }
    }
}

// The score of a weight W0: |W0 + update| * inverse_scale * row_norm * col_norm + score + row + col.
struct Terms {
    Product update;  // beta U V
    Product score;   // alpha1 A B
    float inverse_scale;  // 1 / mean |W0| of the matrix
    // R and C, multiplied by alpha2: one number per row and per column. Null if absent.
    const float* rows;
    const float* cols;
    // Factors of |W|, such as norms of inputs. Null if absent.
    const float* row_norms;
    const float* col_norms;
};

// Keys of ROWS rows and CHUNK vectors of columns.
template <int ROWS, class T>
inline void chunk_keys(const T* weight, int64_t stride, int64_t row, int64_t col, const Terms& t, int32_t* out,
                       int64_t out_stride) {
    floats sum[2][CHUNK];
    for (int r = 0; r < ROWS; ++r)
        for (int j = 0; j < CHUNK; ++j) sum[r][j] = widen_many(weight + (row + r) * stride + col + j * LANES);
    add_product<ROWS>(sum, t.update, row, col);
    for (int r = 0; r < ROWS; ++r)
        for (int j = 0; j < CHUNK; ++j) {
            sum[r][j] = floats(ints(sum[r][j]) & 0x7fffffff);
            if (t.inverse_scale != 1.0f) sum[r][j] = sum[r][j] * t.inverse_scale;
            if (t.row_norms) sum[r][j] = sum[r][j] * t.row_norms[row + r];
            if (t.col_norms) sum[r][j] = sum[r][j] * load<floats>(t.col_norms + col + j * LANES);
        }
    add_product<ROWS>(sum, t.score, row, col);
    for (int r = 0; r < ROWS; ++r)
        for (int j = 0; j < CHUNK; ++j) {
            if (t.rows) sum[r][j] = sum[r][j] + t.rows[row + r];
            if (t.cols) sum[r][j] = sum[r][j] + load<floats>(t.cols + col + j * LANES);
            ints keys = keys_of(sum[r][j]);
            std::memcpy(out + (row + r) * out_stride + col + j * LANES, &keys, sizeof keys);
        }
}

// The key of one weight, by the operations of chunk_keys in the same order: a row's last columns have the same bits.
template <class T> inline int32_t one_key(T weight, int64_t row, int64_t col, const Terms& t) {
    float sum = widen(weight);
    for (int64_t k = 0; k < t.update.rank; ++k)
        sum = sum + t.update.at(row, k) * t.update.right[k * t.update.right_rank + col];
    sum = __builtin_fabsf(sum);
    if (t.inverse_scale != 1.0f) sum = sum * t.inverse_scale;
    if (t.row_norms) sum = sum * t.row_norms[row];
    if (t.col_norms) sum = sum * t.col_norms[col];
    for (int64_t k = 0; k < t.score.rank; ++k)
        sum = sum + t.score.at(row, k) * t.score.right[k * t.score.right_rank + col];
    if (t.rows) sum = sum + t.rows[row];
    if (t.cols) sum = sum + t.cols[col];
    return key_of(sum);
}

// Keys of a rectangle: two rows at a time, then an odd last row, then the last columns of all rows.
template <class T>
void rect_keys(const T* weight, int64_t stride, int64_t rows, int64_t cols, const Terms& t, int32_t* out) {
    constexpr int64_t step = LANES * CHUNK;
    int64_t whole = cols / step * step;
    int64_t row = 0;
    for (; row + 2 <= rows; row += 2)
        for (int64_t col = 0; col < whole; col += step) chunk_keys<2>(weight, stride, row, col, t, out, cols);
    for (; row < rows; ++row)
        for (int64_t col = 0; col < whole; col += step) chunk_keys<1>(weight, stride, row, col, t, out, cols);
    for (row = 0; row < rows; ++row)
        for (int64_t col = whole; col < cols; ++col)
            out[row * cols + col] = one_key(weight[row * stride + col], row, col, t);
}

// Store the keys in [low, high] and their indices, without branches: every key is written, and the place advances only
// behind keys inside. This writes up to LANES more of each than are inside, for which callers have room.
void collect(const int32_t* keys, int64_t start, int64_t stop, int32_t low, int32_t high, int64_t first,
             int32_t* inside_keys, uint32_t* inside_index) {
    int64_t at = 0;
    int64_t i = start;
#ifdef __AVX512F__
    const __m512i lows = _mm512_set1_epi32(low);
    const __m512i highs = _mm512_set1_epi32(high);
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    for (; i + LANES <= stop; i += LANES) {
        const __m512i values = _mm512_loadu_si512(keys + i);
        const __mmask16 in = _mm512_cmpge_epi32_mask(values, lows) & _mm512_cmple_epi32_mask(values, highs);
        const __m512i index = _mm512_add_epi32(lanes, _mm512_set1_epi32(int32_t(first + i)));
        _mm512_storeu_si512(inside_keys + at, _mm512_maskz_compress_epi32(in, values));
        _mm512_storeu_si512(inside_index + at, _mm512_maskz_compress_epi32(in, index));
        at += __builtin_popcount(in);
    }
#endif
    for (; i < stop; ++i) {
        inside_keys[at] = keys[i];
        inside_index[at] = uint32_t(first + i);
        at += (keys[i] >= low) & (keys[i] <= high);
    }
}

// The key of +infinity; that of -infinity is -INFINITE_KEY - 1. Keys of NaN lie beyond these.
constexpr int32_t INFINITE_KEY = 0x7f800000;

struct Bracket {
    int32_t low;
    int32_t high;
    int64_t room;  // limit for stored keys
};

// Bracket of keys that contains the cut which prunes `prune` of n keys, except about once in a million times, from one
// key in each of 512 to 32768 strata; from every key if there are fewer.
Bracket sampled_bracket(const int32_t* keys, int64_t n, int64_t prune) {
    int64_t size = std::max<int64_t>(512, std::min<int64_t>(32768, n / 64));
    if (size >= n) return {INT32_MIN, INT32_MAX, n};
    std::vector<int32_t> sample(size);
    for (int64_t i = 0; i < size; ++i) {
        int64_t from = i * n / size;
        int64_t width = (i + 1) * n / size - from;
        // a multiplicative hash of i as a fraction of 2^32: a place in the stratum that follows no pattern of the weights
        sample[i] = keys[from + (((i * 0x9E3779B1ll & 0xffffffff) * width) >> 32)];
    }
    // Five standard deviations of the cut's rank in the sample, to either side.
    double share = double(prune) / n;
    int64_t half = int64_t(5 * std::sqrt(share * (1 - share) * size)) + 2;
    int64_t middle = int64_t(share * size);
    int64_t first = middle - half;
    int64_t last = middle + half;
    Bracket bracket{INT32_MIN, INT32_MAX, 4 * half * n / size + 512};  // room for twice the keys expected inside
    if (first > 0) {
        std::nth_element(sample.begin(), sample.begin() + first, sample.end());
        bracket.low = sample[first];
    }
    if (last < size) {
        // the first call moved the smaller elements in front of `first`
        std::nth_element(sample.begin() + std::max<int64_t>(first, 0), sample.begin() + last, sample.end());
        bracket.high = sample[last];
    }
    return bracket;
}

// The keys inside a bracket, and their indices, in increasing order of indices.
struct Inside {
    std::vector<int32_t> keys;
    std::vector<uint32_t> index;
};

struct Counts {
    int64_t below = 0;
    int64_t inside = 0;
    int64_t not_finite = 0;
};

// Write the bits of the n keys above the bracket. Store the keys inside in `stored` while there is room.
Counts sort_about(const int32_t* keys, int64_t n, const Bracket& bracket, uint8_t* bits, Inside& stored) {
    constexpr int64_t BLOCK = 1024;  // so that the flags of a block stay in the first-level cache
    uint8_t above[BLOCK] = {};
    uint8_t inside[BLOCK] = {};
    Counts counts;
    stored.keys.resize(bracket.room);
    stored.index.resize(bracket.room);
    for (int64_t start = 0; start < n; start += BLOCK) {
        int64_t count = std::min(BLOCK, n - start);
        int64_t padded = (count + 7) / 8 * 8;
        int32_t below = 0;
        int32_t bad = 0;
        // without branches, so that the compiler vectorises it
        for (int64_t i = 0; i < count; ++i) {
            int32_t key = keys[start + i];
            above[i] = key > bracket.high;
            inside[i] = (key >= bracket.low) & (key <= bracket.high);
            below += key < bracket.low;
            bad += (key >= INFINITE_KEY) | (key <= -INFINITE_KEY - 1);
        }
        for (int64_t i = count; i < padded; ++i) above[i] = inside[i] = 0;
        for (int64_t i = 0; i < padded; i += 8) {
            // the product moves the lowest bits of eight bytes next to each other, into the highest byte
            bits[(start + i) >> 3] = uint8_t(load<uint64_t>(above + i) * 0x0102040810204080ull >> 56);
            for (uint64_t word = load<uint64_t>(inside + i); word; word &= word - 1) {
                int64_t at = start + i + (__builtin_ctzll(word) >> 3);
                if (counts.inside < bracket.room) {
                    stored.keys[counts.inside] = keys[at];
                    stored.index[counts.inside] = uint32_t(at);
                }
                ++counts.inside;
            }
        }
        counts.below += below;
        counts.not_finite += bad;
    }
    return counts;
}

// Set the bits of all but the `prune` smallest of the n keys inside; of equal keys, the first are pruned.
void keep_inside(const Inside& inside, int64_t n, int64_t prune, uint8_t* bits) {
    int32_t threshold = INT32_MIN;
    int64_t ties = 0;  // this many keys equal to the threshold are pruned
    if (prune > 0) {
        std::vector<int32_t> sorted(inside.keys.begin(), inside.keys.begin() + n);
        std::nth_element(sorted.begin(), sorted.begin() + (prune - 1), sorted.end());
        threshold = sorted[prune - 1];
        ties = prune;
        for (int64_t i = 0; i < n; ++i) ties -= inside.keys[i] < threshold;
    }
    for (int64_t i = 0; i < n; ++i) {
        bool kept = inside.keys[i] > threshold || (inside.keys[i] == threshold && ties-- <= 0);
        bits[inside.index[i] >> 3] |= uint8_t(kept << (inside.index[i] & 7));
    }
}

// The finaliser of splitmix64 (Steele et al., 2014), as in core/bits.py.
uint64_t splitmix64(uint64_t x) {
    x *= 0x9E3779B97F4A7C15ull;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
    return x ^ (x >> 31);
}

}  // namespace

extern "C" {

// Keys of a rectangle of weights, (rows, cols), row by row. Constants are {update scale, 1 / |W| scale, score scale};
// strides of a product are {left row, left component, right component}.
void pst_score_keys(const void* weight, int64_t is_bf16, int64_t stride, int64_t rows, int64_t cols,
                    const float* update_left, const float* update_right, int64_t update_rank, const int64_t* update_strides,
                    const float* score_left, const float* score_right, int64_t score_rank, const int64_t* score_strides,
                    const float* score_rows, const float* score_cols, const float* row_norms, const float* col_norms,
                    const float* constants, int32_t* out) {
    Terms t{{update_left, update_right, update_rank, update_strides[0], update_strides[1], update_strides[2], constants[0]},
            {score_left, score_right, score_rank, score_strides[0], score_strides[1], score_strides[2], constants[2]},
            constants[1], score_rows, score_cols, row_norms, col_norms};
    if (is_bf16) rect_keys(static_cast<const uint16_t*>(weight), stride, rows, cols, t, out);
    else rect_keys(static_cast<const float*>(weight), stride, rows, cols, t, out);
}

// keep[i] = keys[i] > high. Keys in [low, high] are also stored in (inside_keys, inside_index) with index first + i
// while there is room, and up to LANES more of each. counts += {below low, inside, not finite}. Returns how many keys
// were inside, stored or not.
int64_t pst_classify(const int32_t* keys, int64_t n, int32_t low, int32_t high, int64_t first, uint8_t* keep,
                     int32_t* inside_keys, uint32_t* inside_index, int64_t room, int64_t* counts) {
    constexpr int64_t STEP = 256;  // most steps have no key inside and skip `collect`
    int64_t below = 0;
    int64_t not_finite = 0;
    int64_t inside = 0;
    for (int64_t start = 0; start < n; start += STEP) {
        int64_t stop = std::min(start + STEP, n);
        int32_t small = 0;
        int32_t bad = 0;
        int32_t between = 0;
        for (int64_t i = start; i < stop; ++i) {
            int32_t key = keys[i];
            keep[i] = key > high;
            small += key < low;
            between += (key >= low) & (key <= high);
            bad += (key >= INFINITE_KEY) | (key <= -INFINITE_KEY - 1);
        }
        below += small;
        not_finite += bad;
        if (!between) continue;
        // beyond the room only the count matters: the caller then starts again with a wider bracket
        if (inside + between <= room) collect(keys, start, stop, low, high, first, inside_keys + inside, inside_index + inside);
        inside += between;
    }
    counts[0] += below;
    counts[1] += inside;
    counts[2] += not_finite;
    return inside;
}

// counts[(key - low) >> shift] += 1 for every key in [low, low + (bins << shift)).
void pst_histogram(const int32_t* keys, int64_t n, int64_t low, int64_t shift, int64_t bins, int64_t* counts) {
    for (int64_t i = 0; i < n; ++i) {
        int64_t digit = (int64_t(keys[i]) - low) >> shift;
        if (digit >= 0 && digit < bins) ++counts[digit];
    }
}

// Kept bits of the n keys of a whole matrix: all but the `prune` smallest; of equal keys, the first are pruned. A
// sample brackets the cut; if it misses, a second pass treats every key as inside. Returns how many keys are not
// finite.
int64_t pst_select(const int32_t* keys, int64_t n, int64_t prune, uint8_t* bits) {
    Bracket bracket = sampled_bracket(keys, n, prune);
    Inside inside;
    Counts counts = sort_about(keys, n, bracket, bits, inside);
    if (counts.below > prune || counts.below + counts.inside < prune || counts.inside > bracket.room)
        counts = sort_about(keys, n, {INT32_MIN, INT32_MAX, n}, bits, inside);
    keep_inside(inside, counts.inside, prune - counts.below, bits);
    return counts.not_finite;
}

// Prune the `prune` smallest of every group of m keys (`stride` apart; `groups` runs of `stride` groups), the first of
// equal ones.
void pst_keep_n_of_m(const int32_t* keys, int64_t groups, int64_t m, int64_t stride, int64_t prune, uint8_t* keep) {
    for (int64_t g = 0; g < groups; ++g) {
        const int32_t* base = keys + g * m * stride;
        uint8_t* out = keep + g * m * stride;
        for (int64_t c = 0; c < stride; ++c)
            for (int64_t i = 0; i < m; ++i) {
                int64_t smaller = 0;  // the rank of the key in its group; of equal keys, the first has the lowest
                int32_t key = base[i * stride + c];
                for (int64_t j = 0; j < i; ++j) smaller += base[j * stride + c] <= key;
                for (int64_t j = i + 1; j < m; ++j) smaller += base[j * stride + c] < key;
                out[i * stride + c] = smaller >= prune;
            }
    }
}

// Prune the `prune` smallest keys of every row, the first of equal ones.
void pst_keep_in_rows(const int32_t* keys, int64_t rows, int64_t cols, int64_t prune, uint8_t* keep) {
    std::vector<int32_t> sorted(cols);
    for (int64_t row = 0; row < rows; ++row, keys += cols, keep += cols) {
        if (prune <= 0) {
            std::memset(keep, 1, cols);
            continue;
        }
        std::copy(keys, keys + cols, sorted.begin());
        std::nth_element(sorted.begin(), sorted.begin() + (prune - 1), sorted.end());
        int32_t threshold = sorted[prune - 1];
        int64_t below = 0;
        for (int64_t i = 0; i < cols; ++i) {
            below += keys[i] < threshold;
            keep[i] = keys[i] > threshold;
        }
        int64_t ties = prune - below;  // the first of these are pruned; later equal keys stay
        for (int64_t i = 0; i < cols; ++i)
            if (keys[i] == threshold && ties-- <= 0) keep[i] = 1;
    }
}

// Set the bits with these indices.
void pst_set_bits(uint8_t* bits, const uint32_t* index, int64_t n) {
    for (int64_t i = 0; i < n; ++i) bits[index[i] >> 3] |= uint8_t(1u << (index[i] & 7));
}

// Count the bits that differ, and the bits set in `after`: {differ, set}.
void pst_count_bits(const uint8_t* before, const uint8_t* after, int64_t n, int64_t* counts) {
    int64_t differ = 0;
    int64_t set = 0;
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        uint64_t a = load<uint64_t>(before + i);
        uint64_t b = load<uint64_t>(after + i);
        differ += __builtin_popcountll(a ^ b);
        set += __builtin_popcountll(b);
    }
    for (; i < n; ++i) {
        differ += __builtin_popcount(before[i] ^ after[i]);
        set += __builtin_popcount(after[i]);
    }
    counts[0] = differ;
    counts[1] = set;
}

// The checksum of core/bits.py over `count` bits, the first of which is bit `start` of the whole mask.
uint64_t pst_checksum(const uint8_t* bits, int64_t count, int64_t start, int64_t seed) {
    uint64_t total = 0;
    int64_t lead = start & 7;
    int64_t num_bytes = (count + 7) / 8;
    int64_t last = (start + count + 7) / 8;
    for (int64_t byte = start / 8; byte < last; ++byte) {
        // A byte of the whole mask combines bits of two of our bytes, unless `start` is a multiple of 8.
        int64_t place = byte - start / 8;
        uint32_t low = place < num_bytes ? bits[place] : 0;
        uint32_t before = place > 0 ? bits[place - 1] : 0;
        uint64_t value = ((low << lead) | (before >> (8 - lead))) & 0xff;
        total += value * splitmix64(uint64_t(byte) + uint64_t(seed) + 1);
    }
    return total;
}

}  // extern "C"
