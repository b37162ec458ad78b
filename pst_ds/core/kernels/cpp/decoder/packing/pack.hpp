// pack() chooses the layout of a matrix and packs it.
#pragma once

#include "pairs.hpp"
#include "places.hpp"
#include "windows.hpp"
#include "words.hpp"

namespace pst {

// Count the codes that are not 0.
inline int64_t count_kept(const Codes& from) {
    std::atomic<int64_t> kept{0};
    in_parallel_blocks((from.rows + ROWS - 1) / ROWS, from.threads, [&](int64_t block) {
        const int8_t* const end = from.codes + std::min(from.rows, (block + 1) * ROWS) * from.columns;
        int64_t count = 0;
        for (const int8_t* at = from.codes + block * ROWS * from.columns; at < end;) {
            const int8_t* const part_end = at + std::min<int64_t>(end - at, 255);
            uint8_t part = 0;  // compilers add bytes in vectors of bytes
            for (; at < part_end; ++at) part = uint8_t(part + (*at != 0));
            count += part;
        }
        kept += count;
    });
    return kept;
}

// The layout for instructions that shuffle bytes, of a matrix that keeps `kept` codes. Patterns such as 2:4, 4:8 and
// 8:16 fill the slots of PLACES; others would leave many of them empty. At most 8 slots for 8 bits and 4 for 4 bits,
// because with more, codes and places are as many bits as all codes, or more. A matrix of zeros has no slots, and its
// WINDOWS take no bytes.
inline Layout layout_of_bytes(Matrix& m, const Codes& from, int64_t kept) {
    const int64_t all = m.rows * m.columns;
    if (kept * 8 >= all * 5) return PAIRS;
    if (!READS_PLACES || !kept) return WINDOWS;
    m.slots = slots_of(m, from);
    const bool fills_slots = kept * WINDOW * 4 >= all * m.slots * 3;
    return fills_slots && m.slots <= m.bits ? PLACES : WINDOWS;
}

// Pack codes (rows, columns) with bf16 scales (rows, groups), groups of `group` columns; 0: one group. `words`: for
// instructions that expand bits. If so many weights are kept that places save less than a quarter, all codes are
// packed. `threads` share the work.
inline Matrix* pack(const int8_t* codes, const uint16_t* scales, int64_t rows, int64_t columns, int bits, int64_t group,
                    bool words, int threads) {
    std::unique_ptr<Matrix> m(new Matrix());
    const Codes from{codes, rows, columns, threads};
    m->rows = rows;
    m->columns = columns;
    m->bits = bits;
    m->chunk = group ? group : std::max<int64_t>(1, std::min(columns, MOST_COLUMNS));
    m->word = m->chunk % WORD && m->chunks() > 1 ? 32 : WORD;
    const int64_t groups = group ? (columns + group - 1) / group : 1;
    const int64_t largest = bits == 4 ? 8 : 127;
    m->levels = int32_t(std::min<int64_t>(32767, 2147483647 / (largest * std::min(m->chunk, std::max<int64_t>(columns, 1)))));
    m->height = words ? WORD_ROWS : ROWS;
    m->scales.reserve(size_t(m->blocks() * m->chunks() * m->height));
    for (int64_t block = 0; block < m->blocks(); ++block)
        for (int64_t c = 0; c < m->chunks(); ++c)
            for (int64_t row = block * m->height; row < (block + 1) * m->height; ++row)
                m->scales.push_back(row < rows ? scales[row * groups + (group ? c : 0)] : 0);
    const int64_t kept = count_kept(from);
    m->has_bits = words && kept * 8 < rows * columns * 7;
    m->layout = words ? WORDS : layout_of_bytes(*m, from, kept);
    std::vector<uint8_t> data;
    if (m->layout == WORDS) pack_words(*m, from);
    if (m->layout == PLACES) data = pack_places(*m, from);
    if (m->layout == WINDOWS) data = pack_windows(*m, from);
    if (m->layout == WINDOWS && int64_t(data.size() + m->moves.size()) * 4 > rows * columns * bits / 8 * 3) {
        m->moves.clear();
        m->steps.clear();
        m->first_byte.clear();
        m->first_move.clear();
        m->layout = PAIRS;
    }
    if (m->layout == PAIRS) data = pack_pairs(*m, from);
    if (m->layout != WORDS) m->data = InHugePages<uint8_t>(data, CODE_PADDING);
    m->moves.shrink_to_fit();
    m->scales.shrink_to_fit();
    m->steps.shrink_to_fit();
    return m.release();
}

}  // namespace pst
