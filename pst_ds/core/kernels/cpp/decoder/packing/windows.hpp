// Packing to the layout WINDOWS.
#pragma once

#include "codes.hpp"

namespace pst {

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

}  // namespace pst
