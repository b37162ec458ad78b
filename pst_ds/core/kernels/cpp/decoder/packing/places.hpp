// Packing to the layout PLACES.
#pragma once

#include "codes.hpp"

namespace pst {

// Whether all kernels of this kind of processor read PLACES: those of NEON do not.
#if PST_X86
constexpr bool READS_PLACES = true;
#else
constexpr bool READS_PLACES = false;
#endif

// The most codes that a row keeps of any WINDOW columns, rounded up to whole steps of 4.
inline int64_t slots_of(const Matrix& m, const Codes& from) {
    int64_t most = 0;
    for (int64_t row = 0; row < m.rows; ++row)
        for (int64_t first = 0; first < m.columns; first += WINDOW) {
            int64_t kept = 0;
            for (int64_t column = first; column < first + WINDOW; ++column) kept += from.at(row, column) != 0;
            most = std::max(most, kept);
        }
    return round_up(most, 4);
}

// A step holds 4 codes per row: 16 bytes of places, in the lower halves those of rows 0 to 3 and in the upper those of
// rows 4 to 7, as [2][row][2]; then the codes as [2][row][2] of 8 rows. 4-bit codes: the second 16 in the upper halves
// of the first. A row with fewer codes has zeros at place 0.
inline std::vector<uint8_t> pack_places(Matrix& m, const Codes& from) {
    std::vector<uint8_t> data;
    for (int64_t block = 0; block < m.blocks(); ++block) {
        m.first_byte.push_back(int64_t(data.size()));
        for (int64_t first = 0; first < m.columns; first += WINDOW) {
            std::vector<int64_t> kept[ROWS];
            for (int row = 0; row < ROWS; ++row)
                for (int64_t place = 0; place < WINDOW; ++place)
                    if (from.at(block * ROWS + row, first + place)) kept[row].push_back(place);
            for (int64_t slot = 0; slot < m.slots; slot += 4) {
                const auto place = [&](int row, int64_t i) { return i < int64_t(kept[row].size()) ? int(kept[row][size_t(i)]) : 0; };
                const auto code = [&](int row, int64_t i) {
                    return i < int64_t(kept[row].size()) ? from.at(block * ROWS + row, first + kept[row][size_t(i)]) : 0;
                };
                for (int i = 0; i < 16; ++i) {
                    const int64_t of_row = slot + i / 8 * 2 + i % 2;
                    data.push_back(nibbles(place(i / 2 % 4, of_row), place(4 + i / 2 % 4, of_row)));
                }
                for (int i = 0; i < (m.bits == 4 ? 16 : 32); ++i) {
                    const int64_t of_row = slot + i / 16 * 2 + i % 2;
                    const int row = i / 2 % ROWS;
                    data.push_back(m.bits == 4 ? nibbles(code(row, of_row), code(row, of_row + 2)) : uint8_t(code(row, of_row)));
                }
            }
        }
    }
    m.first_byte.push_back(int64_t(data.size()));
    return data;
}

}  // namespace pst
