// Packing to the layout WINDOWS.
#pragma once

#include <limits>

#include "codes.hpp"
#include "parallel.hpp"

namespace pst {

// The kept columns of the rows of a block, within a chunk. Room for a chunk is taken once.
class Kept {
  public:
    explicit Kept(int64_t chunk) : columns(size_t(ROWS * (chunk + 1))), stride(chunk + 1) {}

    void start(const Codes& from, int64_t block, int64_t first, int64_t end) {
        for (int64_t row = 0; row < ROWS; ++row) {
            int64_t* const found = &columns[size_t(row * stride)];
            remaining[row] = found;
            int64_t count = 0;
            if (block * ROWS + row < from.rows) {
                const int8_t* const codes = from.codes + (block * ROWS + row) * from.columns;
                for (int64_t column = first; column < end; ++column) {  // a branch would be mispredicted
                    found[count] = column;
                    count += codes[column] != 0;
                }
            }
            found[count] = NONE;
        }
    }
    int64_t next() const {  // the first remaining column; NONE if none is left
        int64_t least = NONE;
        for (const int64_t* column : remaining) least = std::min(least, *column);
        return least;
    }

    static constexpr int64_t NONE = std::numeric_limits<int64_t>::max();
    const int64_t* remaining[ROWS];

  private:
    std::vector<int64_t> columns;  // of each row, followed by NONE
    int64_t stride;
};

// A window: at most 2 kept columns per row, row by row.
struct Window {
    uint8_t place[2 * ROWS] = {};
    int code[2 * ROWS] = {};
    Window() = default;
    Window(const Codes& from, int64_t block, int64_t first, Kept& kept) {
        for (int row = 0; row < ROWS; ++row) {
            const int64_t*& column = kept.remaining[row];
            for (int i = 0; i < 2 && *column < first + WINDOW; ++i, ++column) {
                place[2 * row + i] = uint8_t(*column - first);
                code[2 * row + i] = from.codes[(block * ROWS + row) * from.columns + *column];
            }
        }
    }
};

// Two windows: their places in the halves of 16 bytes; then the codes of the first 4 rows of both, and of the others.
inline void pack_two_windows(int bits, const Window& a, const Window& b, std::vector<uint8_t>& data) {
    uint8_t packed[48];
    uint8_t* to = packed;
    for (int i = 0; i < 16; ++i) *to++ = nibbles(a.place[i], b.place[i]);
    for (int rows = 0; rows < (bits == 4 ? 8 : 16); rows += 8)
        for (const Window* window : {&a, &b})
            for (int i = rows; i < rows + 8; ++i)
                *to++ = bits == 4 ? nibbles(window->code[i], window->code[i + 8]) : uint8_t(window->code[i]);
    data.insert(data.end(), packed, to);
}

// What consecutive blocks append to the arrays of a matrix.
struct PackedWindows {
    std::vector<uint8_t> data;
    std::vector<uint8_t> moves;
    std::vector<uint16_t> steps;
    std::vector<int64_t> first_byte;  // of each block
    std::vector<int64_t> first_move;

    void pack(const Matrix& m, const Codes& from, int64_t block, Kept& kept) {
        first_byte.push_back(int64_t(data.size()));
        first_move.push_back(int64_t(moves.size()));
        for (int64_t c = 0; c < m.chunks(); ++c) {
            kept.start(from, block, c * m.chunk, m.chunk_end(c));
            int64_t windows = 0;
            Window first;
            for (int64_t at = c * m.chunk, next = kept.next(); next != Kept::NONE; next = kept.next(), ++windows) {
                const int64_t move = std::min<int64_t>(next - at, 255);  // after a move of 255 a window may be empty
                moves.push_back(uint8_t(move));
                at += move;
                const Window window(from, block, at, kept);
                if (windows % 2)
                    pack_two_windows(m.bits, first, window, data);
                else
                    first = window;
            }
            if (windows % 2) {
                pack_two_windows(m.bits, first, Window(), data);
                moves.push_back(0);
            }
            steps.push_back(uint16_t((windows + 1) / 2));
        }
    }
};

// Append `part` to `all`.
template <class T> inline void append(const std::vector<T>& part, std::vector<T>& all, T offset = 0) {
    for (const T& value : part) all.push_back(T(value + offset));
}

inline std::vector<uint8_t> pack_windows(Matrix& m, const Codes& from) {
    constexpr int64_t PIECE = 8;  // blocks that are packed by one thread
    std::vector<PackedWindows> parts(size_t((m.blocks() + PIECE - 1) / PIECE));
    std::atomic<bool> is_short{false};
    in_parallel_blocks(int64_t(parts.size()), from.threads, [&](int64_t part) {
        try {
            Kept kept(m.chunk);
            for (int64_t block = part * PIECE; block < std::min(m.blocks(), (part + 1) * PIECE); ++block)
                parts[size_t(part)].pack(m, from, block, kept);
        } catch (const std::bad_alloc&) {  // thrown below, as a thread may not
            is_short = true;
        }
    }, 1);
    if (is_short) throw std::bad_alloc();
    std::vector<uint8_t> data;
    for (PackedWindows& part : parts) {
        append(part.first_byte, m.first_byte, int64_t(data.size()));
        append(part.first_move, m.first_move, int64_t(m.moves.size()));
        data.insert(data.end(), part.data.begin(), part.data.end());
        m.moves.insert(m.moves.end(), part.moves.begin(), part.moves.end());
        append(part.steps, m.steps);
        part = PackedWindows();
    }
    m.first_byte.push_back(int64_t(data.size()));
    m.first_move.push_back(int64_t(m.moves.size()));
    return data;
}

}  // namespace pst
