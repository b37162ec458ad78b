// Packing to the layout WORDS.
#pragma once

#include "codes.hpp"

namespace pst {

// A word is 4 columns of 16 rows. 4-bit codes: a word in the lower halves of bytes, the next in the upper.
inline std::vector<uint8_t> pack_words(Matrix& m, const Codes& from) {
    std::vector<uint8_t> data;
    std::vector<uint64_t> masks;
    for (int64_t block = 0; block < m.blocks(); ++block) {
        m.first_byte.push_back(int64_t(data.size()));
        for (int64_t c = 0; c < m.chunks(); ++c)
            for (int64_t row = block * WORD_ROWS; row < (block + 1) * WORD_ROWS; ++row) {
                uint32_t sum = 0;
                for (int64_t column = c * m.chunk; column < m.chunk_end(c); ++column) sum += uint32_t(from.at(row, column));
                m.offsets.push_back(int32_t(sum << 15));
            }
        m.list_vectors.push_back(0);
        for (int64_t column = 0; m.has_bits && column < m.columns; column += WORD) {
            int most = 0;
            for (int64_t row = block * WORD_ROWS; row < (block + 1) * WORD_ROWS; ++row) {
                int kept = 0;
                for (int64_t i = column; i < column + WORD; ++i) kept += from.at(row, i) != 0;
                most = std::max(most, kept);
            }
            m.list_vectors.back() += (most + 3) / 4;
        }
        std::vector<int> held[2];
        for (int64_t column = 0; column < m.words() * m.word; column += 4) {
            const bool is_second = m.bits == 4 && column % 8;
            uint64_t mask = 0;
            for (int64_t i = 0; i < 64; ++i) {
                const int code = from.at(block * WORD_ROWS + i / 4, column + i % 4);
                if (code) mask |= uint64_t(1) << i;
                if (code || !m.has_bits) held[is_second].push_back(code);
            }
            if (m.has_bits) masks.push_back(mask);
            if (m.bits == 4 && !is_second) continue;
            for (auto& codes : held) codes.resize(std::max(held[0].size(), held[1].size()));
            for (size_t i = 0; i < held[0].size(); ++i)
                data.push_back(m.bits == 4 ? nibbles(held[0][i], held[1][i]) : uint8_t(held[0][i]));
            for (auto& codes : held) codes.clear();
        }
    }
    m.first_byte.push_back(int64_t(data.size()));
    m.masks = InHugePages<uint64_t>(masks, CODE_PADDING);
    return data;
}

}  // namespace pst
