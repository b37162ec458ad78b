// A linear layer's weight as the decoder multiplies it, and the layouts it is repacked to when a model is opened.
//
//   y[row] = sum over chunks c of  (sum over columns of c: code * q) * (scale of row and c) * (scale of x in c)
//
// q are the activations as integers of -levels .. levels, rounded chunk by chunk (quantize in glue.hpp). Levels are as
// many as keep a chunk's sum inside 32 bits, so it is exact: in any order, for any number of vectors and threads, and
// with any instructions. Rows are taken in blocks of 8, or of 16 for WORDS.
//
// A Matrix owns its arrays, except `floats`, and does not change once packed, so threads share it. Codes and masks are in
// huge pages, each array at a multiple of 64 bytes, with CODE_PADDING bytes behind it that a load may read. Rows of a
// last block that do not exist have codes and scales of 0, and are computed but not stored.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <memory>
#include <vector>

#include "../bitmask/common.hpp"
#include "huge_pages.hpp"

namespace pst {

constexpr int64_t ROWS = 8;
constexpr int64_t WORD_ROWS = 16;
constexpr int64_t WINDOW = 16;
constexpr int64_t WORD = 64;
constexpr int64_t MOST_COLUMNS = 2048;
constexpr int64_t PADDING = 64;        // bytes that a load may read past the end of activations
constexpr int64_t CODE_PADDING = 320;  // bytes that a load may read past the end of codes

enum Layout {
    FLOATS,  // unchanged in memory: rows of fp32 or bf16
    PAIRS,  // all codes; 2 columns of 8 rows are adjacent
    WINDOWS,  // kept codes; 2 per row from each of two windows of 16 columns, for 8 rows, followed by their places
    WORDS,  // kept codes of 4 columns of 16 rows, [row][column], and a word of their bits; or all codes without bits
};

struct Matrix {
    Layout layout = FLOATS;
    int64_t rows = 0;
    int64_t columns = 0;
    int bits = 0;  // per code: 4, 8; per float: 16, 32
    int64_t chunk = 0;       // columns that share a scale
    int64_t height = ROWS;  // rows of a block
    int64_t word = WORD;  // columns that share a scale of bytes, see Activations: 64, or 32 if a chunk is not a multiple of 64
    int32_t levels = 0;
    bool has_bits = false;  // for WORDS
    const void* floats = nullptr;        // not owned
    std::vector<uint16_t> scales;        // [block][chunk][row], bf16
    InHugePages<uint8_t> data;  // codes, for WINDOWS with their places
    std::vector<int64_t> first_byte;     // of every block in data, and the end
    std::vector<uint8_t> moves;          // WINDOWS: columns from one window to the next
    std::vector<int64_t> first_move;     // of every block in moves, and the end
    std::vector<uint16_t> steps;         // WINDOWS: [block][chunk], pairs of windows in a chunk
    InHugePages<uint64_t> masks;         // WORDS: [block][4 columns]
    std::vector<int32_t> list_vectors;   // WORDS: per block, 64 kept codes each if every 64 columns of a row are padded alike
    std::vector<int32_t> offsets;        // WORDS: [block][chunk][row], 2^15 times the sum of a row's codes, modulo 2^32

    int64_t blocks() const { return (rows + height - 1) / height; }
    int64_t chunks() const { return (columns + chunk - 1) / chunk; }
    int64_t chunk_end(int64_t c) const { return std::min(columns, (c + 1) * chunk); }
    int64_t words() const { return (columns + word - 1) / word; }
    int64_t bytes() const {
        const int64_t held = layout == FLOATS ? rows * columns * bits / 8 : int64_t(data.size());
        return held + 2 * int64_t(scales.size() + steps.size()) + 8 * int64_t(masks.size()) + int64_t(moves.size()) +
               4 * int64_t(offsets.size());
    }
};

// What a matrix is packed from: all codes (rows, columns), 0 where pruned.
struct Codes {
    const int8_t* codes;
    int64_t rows;
    int64_t columns;
    int at(int64_t row, int64_t column) const {
        return row < rows && column < columns ? codes[row * columns + column] : 0;
    }
};

inline uint8_t nibbles(int low, int high) { return uint8_t((low & 15) | (high & 15) << 4); }

// 8 bits: codes[row][2] of 2 columns, 16 bytes, always for 4 columns. 4 bits: words of 16 bits, [row][2], each with the
// codes + 8 of 4 pairs of columns, from its lowest bits on: 32 bytes for 8 columns.
inline std::vector<uint8_t> pack_pairs(Matrix& m, const Codes& from) {
    const int64_t step = m.bits == 4 ? 8 : 2;
    std::vector<uint8_t> data;
    m.first_byte.resize(size_t(m.blocks() + 1));
    for (int64_t block = 0; block < m.blocks(); ++block) {
        m.first_byte[size_t(block)] = int64_t(data.size());
        for (int64_t column = 0; column < round_up(m.columns, m.bits == 4 ? 8 : 4); column += step)
            for (int64_t row = block * ROWS; row < (block + 1) * ROWS; ++row)
                for (int64_t i = column; i < column + 2; ++i) {
                    const auto code = [&](int64_t pair) { return from.at(row, i + 2 * pair) + 8; };
                    data.push_back(m.bits == 4 ? nibbles(code(0), code(1)) : uint8_t(from.at(row, i)));
                    if (m.bits == 4) data.push_back(nibbles(code(2), code(3)));
                }
    }
    m.first_byte.back() = int64_t(data.size());
    return data;
}

// The kept columns of the rows of a block, within a chunk.
struct Kept {
    std::vector<int64_t> columns[ROWS];
    size_t taken[ROWS] = {};
    int64_t next() const {  // the first remaining column; -1 if none is left
        int64_t least = -1;
        for (int row = 0; row < ROWS; ++row)
            if (taken[row] < columns[row].size() && (least < 0 || columns[row][taken[row]] < least))
                least = columns[row][taken[row]];
        return least;
    }
};

// A window: at most 2 kept columns per row, row by row.
struct Window {
    uint8_t place[2 * ROWS] = {};
    int code[2 * ROWS] = {};
    Window() = default;
    Window(const Codes& from, int64_t block, int64_t first, Kept& kept) {
        for (int row = 0; row < ROWS; ++row)
            for (int i = 0; i < 2 && kept.taken[row] < kept.columns[row].size(); ++i) {
                const int64_t column = kept.columns[row][kept.taken[row]];
                if (column >= first + WINDOW) break;
                place[2 * row + i] = uint8_t(column - first);
                code[2 * row + i] = from.at(block * ROWS + row, column);
                ++kept.taken[row];
            }
    }
};

// Two windows: their places in the halves of 16 bytes; then the codes of the first 4 rows of both, and of the others.
inline void pack_two_windows(int bits, const Window& a, const Window& b, std::vector<uint8_t>& data) {
    for (int i = 0; i < 16; ++i) data.push_back(nibbles(a.place[i], b.place[i]));
    for (int rows = 0; rows < (bits == 4 ? 8 : 16); rows += 8)
        for (const Window* window : {&a, &b})
            for (int i = rows; i < rows + 8; ++i)
                data.push_back(bits == 4 ? nibbles(window->code[i], window->code[i + 8]) : uint8_t(window->code[i]));
}

inline std::vector<uint8_t> pack_windows(Matrix& m, const Codes& from) {
    std::vector<uint8_t> data;
    for (int64_t block = 0; block < m.blocks(); ++block) {
        m.first_byte.push_back(int64_t(data.size()));
        m.first_move.push_back(int64_t(m.moves.size()));
        for (int64_t c = 0; c < m.chunks(); ++c) {
            Kept kept;
            for (int row = 0; row < ROWS; ++row)
                for (int64_t column = c * m.chunk; column < m.chunk_end(c); ++column)
                    if (from.at(block * ROWS + row, column)) kept.columns[row].push_back(column);
            std::vector<Window> windows;
            for (int64_t at = c * m.chunk, next = kept.next(); next >= 0; next = kept.next()) {
                const int64_t move = std::min<int64_t>(next - at, 255);  // after a move of 255 a window may be empty
                m.moves.push_back(uint8_t(move));
                at += move;
                windows.emplace_back(from, block, at, kept);
            }
            if (windows.size() % 2) {
                windows.emplace_back();
                m.moves.push_back(0);
            }
            for (size_t i = 0; i < windows.size(); i += 2) pack_two_windows(m.bits, windows[i], windows[i + 1], data);
            m.steps.push_back(uint16_t(windows.size() / 2));
        }
    }
    m.first_byte.push_back(int64_t(data.size()));
    m.first_move.push_back(int64_t(m.moves.size()));
    return data;
}

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

// Pack codes (rows, columns) with bf16 scales (rows, groups), groups of `group` columns; 0: one group. `words`: for
// instructions that expand bits. If so many weights are kept that places save less than a quarter, all codes are
// packed.
inline Matrix* pack(const int8_t* codes, const uint16_t* scales, int64_t rows, int64_t columns, int bits, int64_t group,
                    bool words) {
    std::unique_ptr<Matrix> m(new Matrix());
    const Codes from{codes, rows, columns};
    m->rows = rows;
    m->columns = columns;
    m->bits = bits;
    m->chunk = group ? group : std::max<int64_t>(1, std::min(columns, MOST_COLUMNS));
    m->word = m->chunk % WORD && m->chunks() > 1 ? 32 : WORD;
    const int64_t groups = group ? (columns + group - 1) / group : 1;
    const int64_t largest = bits == 4 ? 8 : 127;
    m->levels = int32_t(std::min<int64_t>(32767, 2147483647 / (largest * std::min(m->chunk, std::max<int64_t>(columns, 1)))));
    m->height = words ? WORD_ROWS : ROWS;
    for (int64_t block = 0; block < m->blocks(); ++block)
        for (int64_t c = 0; c < m->chunks(); ++c)
            for (int64_t row = block * m->height; row < (block + 1) * m->height; ++row)
                m->scales.push_back(row < rows ? scales[row * groups + (group ? c : 0)] : 0);
    const int64_t kept = rows * columns - std::count(codes, codes + rows * columns, int8_t(0));
    m->has_bits = words && kept * 8 < rows * columns * 7;
    m->layout = words ? WORDS : kept * 8 < rows * columns * 5 ? WINDOWS : PAIRS;
    std::vector<uint8_t> data;
    if (m->layout == WORDS) data = pack_words(*m, from);
    if (m->layout == WINDOWS) data = pack_windows(*m, from);
    if (m->layout == WINDOWS && int64_t(data.size() + m->moves.size()) * 4 > rows * columns * bits / 8 * 3) {
        m->moves.clear();
        m->steps.clear();
        m->first_byte.clear();
        m->first_move.clear();
        m->layout = PAIRS;
    }
    if (m->layout == PAIRS) data = pack_pairs(*m, from);
    m->data = InHugePages<uint8_t>(data, CODE_PADDING);
    m->moves.shrink_to_fit();
    m->scales.shrink_to_fit();
    m->offsets.shrink_to_fit();
    m->steps.shrink_to_fit();
    return m.release();
}

}  // namespace pst
