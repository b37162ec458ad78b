// Plain C++ for every processor.
//
// A row is expanded to fp32, 8 columns per byte of its mask, up to a multiple of 8 columns. Elsewhere than at the end of
// `values` all 8 next values are read, kept or not: a load that is not used costs less than a mispredicted branch. `block`
// keeps 8 sums per row and vector, one per lane, and adds them at the end in a fixed order.
#pragma once

#include "common.hpp"

namespace pst::portable {

template <class Type> struct Kernel {
    using T = Type;
    using C = float;
    static constexpr int64_t lanes = 8;
    static constexpr int rows_at_once = 2;
    static constexpr int columns_at_once = 4;

    static void expand(const Packed<T>& w, int64_t row, float* out) {
        const T* values = w.values + w.row_offsets[row];
        const T* end = w.values + w.count;
        const uint8_t* mask = w.mask_row(row);
        for (int64_t i = 0; i < w.bytes_per_row(); ++i, out += 8) {
            if (end - values >= 8)
                for (int bit = 0; bit < 8; ++bit) {
                    const uint32_t keep = mask[i] >> bit & 1;
                    const float value = widen(*values);
                    uint32_t bits;
                    std::memcpy(&bits, &value, 4);
                    bits &= 0u - keep;  // all ones, or 0
                    std::memcpy(out + bit, &bits, 4);
                    values += keep;
                }
            else
                for (int bit = 0; bit < 8; ++bit) out[bit] = mask[i] >> bit & 1 ? widen(*values++) : 0.0f;
        }
    }
    template <int R, int C>
    static void block(const float* a, const float* b, int64_t stride, int64_t length, float* sums) {
        float sum[R][C][lanes] = {};  // one sum per lane, for the compiler to vectorise
        for (int64_t k = 0; k < length; k += lanes)
            for (int r = 0; r < R; ++r)
                for (int c = 0; c < C; ++c)
                    for (int64_t i = 0; i < lanes; ++i) sum[r][c][i] += a[r * stride + k + i] * b[c * stride + k + i];
        for (int r = 0; r < R; ++r)
            for (int c = 0; c < C; ++c) {
                float* s = sum[r][c];
                sums[r * C + c] = ((s[0] + s[4]) + (s[1] + s[5])) + ((s[2] + s[6]) + (s[3] + s[7]));
            }
    }
};

}  // namespace pst::portable
