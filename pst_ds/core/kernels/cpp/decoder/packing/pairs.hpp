// Packing to the layout PAIRS.
#pragma once

#include "codes.hpp"
#include "parallel.hpp"

namespace pst {

// 8 bits: codes[row][2] of 2 columns, 16 bytes, always for 4 columns. 4 bits: words of 16 bits, [row][2], each with the
// codes + 8 of 4 pairs of columns, from its lowest bits on: 32 bytes for 8 columns.
inline std::vector<uint8_t> pack_pairs(Matrix& m, const Codes& from) {
    const int64_t step = m.bits == 4 ? 8 : 2;
    const int64_t block_bytes = round_up(m.columns, m.bits == 4 ? 8 : 4) / step * (m.bits == 4 ? 4 : 2) * ROWS;
    std::vector<uint8_t> data(size_t(m.blocks() * block_bytes));
    m.first_byte.resize(size_t(m.blocks() + 1));
    for (int64_t block = 0; block <= m.blocks(); ++block) m.first_byte[size_t(block)] = block * block_bytes;
    in_parallel_blocks(m.blocks(), from.threads, [&](int64_t block) {
        uint8_t* to = data.data() + block * block_bytes;
        for (int64_t column = 0; column < round_up(m.columns, m.bits == 4 ? 8 : 4); column += step)
            for (int64_t row = block * ROWS; row < (block + 1) * ROWS; ++row)
                for (int64_t i = column; i < column + 2; ++i) {
                    const auto code = [&](int64_t pair) { return from.at(row, i + 2 * pair) + 8; };
                    *to++ = m.bits == 4 ? nibbles(code(0), code(1)) : uint8_t(from.at(row, i));
                    if (m.bits == 4) *to++ = nibbles(code(2), code(3));
                }
    });
    return data;
}

}  // namespace pst
