// The codes that a matrix is packed from.
#pragma once

#include "../matrix.hpp"

namespace pst {

// What a matrix is packed from: all codes (rows, columns), 0 where pruned.
struct Codes {
    const int8_t* codes;
    int64_t rows;
    int64_t columns;
    int threads = 1;  // that may pack
    int at(int64_t row, int64_t column) const {
        return row < rows && column < columns ? codes[row * columns + column] : 0;
    }
};

inline uint8_t nibbles(int low, int high) { return uint8_t((low & 15) | (high & 15) << 4); }

}  // namespace pst
