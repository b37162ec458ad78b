// A linear layer's weight as the decoder multiplies it, and the layouts it is repacked to
// (packing/) when a model is opened.
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
    PLACES,  // kept codes; 4 or 8 per row from every 16 columns, for 8 rows; 4 per row follow their places
    WORDS,  // kept codes of 4 columns of 16 rows, [row][column], and a word of their bits; or all codes without bits. 4-bit codes + 8
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
    int64_t slots = 0;                   // PLACES: codes per row of 16 columns, 4 or 8
    InHugePages<uint64_t> masks;         // WORDS: [block][4 columns]
    std::vector<int32_t> list_vectors;   // WORDS: per block, 64 kept codes each if every 64 columns of a row are padded alike

    int64_t blocks() const { return (rows + height - 1) / height; }
    int64_t chunks() const { return (columns + chunk - 1) / chunk; }
    int64_t chunk_end(int64_t c) const { return std::min(columns, (c + 1) * chunk); }
    int64_t words() const { return (columns + word - 1) / word; }
    int64_t bytes() const {
        const int64_t held = layout == FLOATS ? rows * columns * bits / 8 : int64_t(data.size());
        return held + 2 * int64_t(scales.size() + steps.size()) + 8 * int64_t(masks.size()) + int64_t(moves.size());
    }
};

}  // namespace pst
