// Activations as integers, and the interface of an instruction set's kernels.
//
// Layout of Activations, for `tokens` vectors: q (tokens, stride) int16, its low and high bytes as two planes (tokens, stride)
// uint8, scales and sums (tokens, chunks). `stride` is the columns rounded up to a word of 64, with zeros, plus PADDING
// that a load may read past the end. Vectors of 8 bits use only `low`, with a scale per word of columns.
// Jobs (ProductJob, AttentionJob, UpdateJob) only point to arrays: those of x, y and `room` belong to the caller, and
// `room` to the thread that runs the job. Nothing needs an alignment.
#pragma once

#include "matrix.hpp"

namespace pst {

// Quantisation to integers in -levels .. levels: multiply by `inverse` and round to nearest; `scale` is the way back.
// Both are 0 if all numbers are 0 or nearly; with an infinity or a NaN among them the scale is NaN.
struct Rounding {
    float scale = 0;
    float inverse = 0;

    // largest_bits: bits of the largest |x|; the bits of infinities and NaN exceed all others.
    Rounding(int32_t largest_bits, float levels) {
        float largest;
        std::memcpy(&largest, &largest_bits, 4);
        if (largest_bits >= 0x7f800000) scale = __builtin_nanf("");
        else if (largest > 1e-30f) {
            scale = largest / levels;
            inverse = levels / largest;
        }
    }
};

// `tokens` vectors quantised to integers. Each is stored as q, and in planes: q = 256 * high + low, with the low byte
// unsigned and the high one signed. A vector's columns are followed by as many zeros as a load may read past them. Alternatively they are bytes, 8 bits with a scale per word of columns, in `low` only.
struct Activations {
    bool are_bytes = false;
    int64_t stride = 0;  // integers per vector
    int64_t chunks = 0;  // scales per vector
    std::vector<int16_t> q;
    std::vector<uint8_t> low;
    std::vector<uint8_t> high;
    std::vector<float> scales;
    std::vector<int32_t> sums;  // of a chunk's q; for bytes -128 times the sum; for planes and WORDS see excess_of

    void reserve(int64_t tokens, int64_t columns) {
        const size_t most = size_t(tokens * (round_up(columns, WORD) + 2 * PADDING));
        if (q.size() >= most) return;
        q.resize(most);
        low.resize(most);
        high.resize(most);
        scales.resize(most);
        sums.resize(most);
    }
    void begin(const Matrix& m, bool in_bytes = false) {
        are_bytes = in_bytes;
        stride = round_up(m.columns, WORD) + PADDING;
        chunks = in_bytes ? m.words() : m.chunks();
    }
    const int16_t* q_of(int64_t token) const { return q.data() + token * stride; }
    const uint8_t* low_of(int64_t token) const { return low.data() + token * stride; }
    const uint8_t* high_of(int64_t token) const { return high.data() + token * stride; }
    const int32_t* sums_of(int64_t token) const { return sums.data() + token * chunks; }
    const float* scales_of(int64_t token) const { return scales.data() + token * chunks; }
};

// Bytes of 16 expanded rows; vectors that are copied for tiles at a time, at most; and the bytes that a thread needs for a
// product.
inline int64_t panel_bytes(int64_t columns) { return 16 * (round_up(columns, WORD) + WORD) + PADDING; }
inline int64_t vectors_copied(int64_t columns) {
    constexpr int64_t BYTES = 1 << 20;  // half of an L2 cache
    return std::clamp<int64_t>(BYTES / (2 * round_up(columns, WORD) + 1), 64, 256) / 32 * 32;
}
inline int64_t room_for(int64_t columns) {
    return 2 * panel_bytes(columns) + 2 * round_up(columns, WORD) + vectors_copied(columns) * 2 * round_up(columns, WORD) + WORD;
}

// Write products with rows of the blocks from `first` to `last` to y (tokens, y_width). `room`: room_for(m) bytes of
// this thread.
struct ProductJob {
    const Matrix& m;
    const float* x;  // for FLOATS: (tokens, columns)
    const Activations& q;  // for the other layouts
    int64_t tokens;
    int64_t first;
    int64_t last;
    float* y;
    int64_t y_width;
    uint8_t* room;
    // for kernels that apply them (Functions::finishes): of all rows, or null; one of lanes/functions.hpp
    const float* bias = nullptr;
    int64_t activation = 0;
    int64_t panel = panel_bytes(m.columns);  // distance of 16 expanded rows in room
};

// One group of query heads with its keys and values. K and V: (context, padded head), of this key-value head.
struct AttentionJob {
    const float* q;  // (heads of the group, head)
    const void* k;
    const void* v;
    // (context,), for an 8-bit cache; null for others
    const float* k_scales;
    const float* v_scales;
    float* y;        // as q
    int64_t heads;   // of the group
    int64_t head;    // numbers of a head
    int64_t padded;  // numbers of a row of the cache
    int64_t begin;   // positions begin .. end are visible
    int64_t end;
    float scale;
    float cap;
    float* room;  // attention_room(end - begin, padded) floats
};

constexpr int HEADS_TOGETHER = 4;
inline int64_t attention_room(int64_t positions, int64_t padded) { return HEADS_TOGETHER * (round_up(positions, 16) + 2 * padded); }

// y (tokens, y_width) += beta U (V x), the low-rank update of a user. V (rank, columns) and the transpose of U (rank,
// rows) are fp32 or bf16, in rows of a multiple of 16 numbers, zeros at the end.
struct UpdateJob {
    const void* v;
    const void* u;
    int64_t rank;
    int64_t columns;
    int64_t rows;
    int64_t tokens;
    float beta;
    const float* x;  // (tokens, columns)
    float* y;
    int64_t y_width;
    float* room;  // update_room(rank, columns, rows) floats
};

inline int64_t update_room(int64_t rank, int64_t columns, int64_t rows) {
    return HEADS_TOGETHER * (round_up(rank, 16) + round_up(columns, 16) + round_up(rows, 16));
}

constexpr int64_t XIELU = 7;  // an activation with parameters, after those of lanes/functions.hpp

struct Functions {
    bool words;  // layout that it needs from pack()
    bool finishes;  // product() adds the job's bias and applies its activation, except for FLOATS
    void (*quantize)(const Matrix&, const float* x, int64_t token, Activations&);
    void (*quantize_to_bytes)(const Matrix&, const float* x, int64_t token, Activations&);  // null if not supported
    void (*product)(const ProductJob&);
    void (*rms_norm)(const float* x, const float* gain, float epsilon, int64_t width, float* y);
    void (*layer_norm)(const float* x, const float* gain, const float* bias, float epsilon, int64_t width, float* y);
    void (*rotate)(float* x, const float* cosines, const float* sines, int64_t half);
    void (*gate)(int64_t activation, const float* numbers, const float* gates, const float* up, int64_t width, float* y);
    void (*attend)(const AttentionJob&, int64_t bits);  // of keys and values: 8, 16, 32
    void (*update)(const UpdateJob&, int64_t bits);  // of the factors: 16, 32
};

// Store the rows of a block, or as many as the matrix still has.
template <size_t N> inline void store_rows(const float (&rows)[N], const Matrix& m, int64_t block, float* y) {
    const int64_t first = block * int64_t(N);
    const int64_t left = m.rows - first;
    // a constant size compiles without a call
    if (left >= int64_t(N)) std::memcpy(y + first, rows, sizeof rows);
    else std::memcpy(y + first, rows, size_t(left) * sizeof(float));
}

}  // namespace pst
