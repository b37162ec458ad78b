// Vectors as integers, and what an instruction set's kernels are called by.
#pragma once

#include "matrix.hpp"

namespace pst {

// How numbers become integers of -levels .. levels: times `inverse`, to nearest; `scale` takes them back. Both are 0 where all
// numbers are, or nearly; with an infinity or a NaN among them the scale is NaN.
struct Rounding {
    float scale = 0, inverse = 0;

    // largest_bits: of the largest |x|, of which those of infinities and NaN are the largest of all.
    Rounding(int32_t largest_bits, float levels) {
        float largest;
        std::memcpy(&largest, &largest_bits, 4);
        if (largest_bits >= 0x7f800000) scale = __builtin_nanf("");
        else if (largest > 1e-30f) scale = largest / levels, inverse = levels / largest;
    }
};

// `tokens` vectors rounded to integers. Each is q, and in planes: the low byte and the high one, which kernels of WORDS
// take as unsigned (q + 2^15). Zeros follow a vector's columns, as many as a load may read past them. Or they are bytes,
// of 8 bits with a scale for each word of columns: low alone has them.
struct Activations {
    bool are_bytes = false;
    int64_t stride = 0, chunks = 0;  // of a vector: in integers, and in scales
    std::vector<int16_t> q;
    std::vector<uint8_t> low, high;
    std::vector<float> scales;
    std::vector<int32_t> sums;  // of a chunk's q; of bytes -128 times the sum

    void reserve(int64_t tokens, int64_t columns) {
        const size_t most = size_t(tokens * (round_up(columns, WORD) + 2 * PADDING));
        if (q.size() >= most) return;
        q.resize(most), low.resize(most), high.resize(most);
        scales.resize(most), sums.resize(most);
    }
    void begin(const Matrix& m, bool in_bytes = false) {
        are_bytes = in_bytes, stride = round_up(m.columns, WORD) + PADDING, chunks = in_bytes ? m.words() : m.chunks();
    }
    const int16_t* q_of(int64_t token) const { return q.data() + token * stride; }
    const uint8_t* low_of(int64_t token) const { return low.data() + token * stride; }
    const uint8_t* high_of(int64_t token) const { return high.data() + token * stride; }
    const int32_t* sums_of(int64_t token) const { return sums.data() + token * chunks; }
    const float* scales_of(int64_t token) const { return scales.data() + token * chunks; }
};

// Bytes of 16 rows, expanded; and those that a thread needs beside a product.
inline int64_t panel_bytes(int64_t columns) { return 16 * (round_up(columns, WORD) + WORD) + PADDING; }
inline int64_t room_for(int64_t columns) { return 2 * panel_bytes(columns); }

// y (tokens, y_width) gets the products with rows of the blocks from `first` to `last`; `room`: of this thread,
// room_for(m) bytes.
struct ProductJob {
    const Matrix& m;
    const float* x;         // of FLOATS: (tokens, columns)
    const Activations& q;   // of others
    int64_t tokens, first, last;
    float* y;
    int64_t y_width;
    uint8_t* room;
    int64_t panel = panel_bytes(m.columns);  // from 16 expanded rows in room to the next
};

// One query head group and what it attends to. K and V: (context, padded head), of this key-value head.
struct AttentionJob {
    const float* q;    // (heads of the group, head)
    const void *k, *v;
    const float *k_scales, *v_scales;  // (context,), of a cache of 8 bits; null of others
    float* y;
    int64_t heads, head, padded, begin, end;  // positions begin .. end
    float scale, cap;
    float* room;  // attention_room(end - begin, padded) floats
};

constexpr int HEADS_TOGETHER = 4;
inline int64_t attention_room(int64_t positions, int64_t padded) { return HEADS_TOGETHER * (round_up(positions, 16) + 2 * padded); }

struct Functions {
    bool words;  // what it wants of pack()
    void (*quantize)(const Matrix&, const float* x, int64_t token, Activations&);
    void (*quantize_to_bytes)(const Matrix&, const float* x, int64_t token, Activations&);  // null: it does not
    void (*product)(const ProductJob&);
    void (*rms_norm)(const float* x, const float* gain, float epsilon, int64_t width, float* y);
    void (*rotate)(float* x, const float* cosines, const float* sines, int64_t half);
    void (*gate)(int64_t activation, const float* gates, const float* up, int64_t width, float* y);
    void (*attend)(const AttentionJob&, int64_t bits);  // of keys and values: 8, 16, 32
};

// Eight rows of a block, or those that the matrix still has.
inline void store_rows(const float* rows, const Matrix& m, int64_t block, float* y) {
    const int64_t left = m.rows - block * ROWS;
    if (left >= ROWS) std::memcpy(y + block * ROWS, rows, ROWS * sizeof(float));  // of a known size: no call
    else std::memcpy(y + block * ROWS, rows, size_t(left) * sizeof(float));
}

}  // namespace pst
