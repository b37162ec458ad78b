// A sparse matrix as its product wants it, made once from the parts in the file.
#pragma once

#include <cmath>
#include <vector>

#include "../kernels/common.hpp"

namespace pst {

// The lower or upper of two 4-bit codes of a byte.
inline int nibble(uint8_t pair, int64_t upper) { return int((upper ? pair >> 4 : pair & 15) ^ 8) - 8; }

// The parts of a weight of `rows` by `cols`, as in core/formats: a bitmask, and the values it keeps, row after row.
struct Parts {
    enum Kind { FP32, BF16, CODES8, CODES4 };
    Kind kind;
    const void* values;
    int64_t count;        // of elements of `values`: numbers, codes, or bytes of two codes
    const uint8_t* mask;  // (rows, ceil(cols / 8)), little-endian bits
    const bf16* scales;  // bf16 (rows, groups), of codes
    int64_t groups, rows, cols;

    int64_t group_size() const { return groups ? (cols + groups - 1) / groups : cols; }
};

// Its non-zeros, cut into chunks of columns whose activations fit the first cache, each row by row.
class Stream {
   public:
    struct Entry {
        float value;
        uint32_t offset;  // in bytes, of the column in a panel of activations
    };
    int64_t rows = 0, cols = 0, chunk = 0, chunks = 0;

    // `panel`: activations side by side in a panel, for each column. False where the parts do not fit each other.
    bool make(const Parts& parts, int64_t panel) {
        rows = parts.rows, cols = parts.cols;
        chunk = CHUNK_BYTES / (panel * 4), chunks = (cols + chunk - 1) / chunk;
        std::vector<std::vector<Entry>> of_chunk;
        std::vector<std::vector<uint32_t>> ends;
        of_chunk.resize(size_t(chunks)), ends.resize(size_t(chunks));
        int64_t at = 0;
        for (int64_t row = 0; row < rows; ++row) {
            int64_t read_in_row = 0;
            for (int64_t col = 0; col < cols; ++col) {
                if (!(parts.mask[row * ((cols + 7) / 8) + col / 8] >> (col % 8) & 1)) continue;
                float value;
                if (!read(parts, row, col, at, read_in_row, &value)) return false;
                if (value != 0) of_chunk[size_t(col / chunk)].push_back({value, uint32_t(col % chunk * panel * 4)});
            }
            at += parts.kind == Parts::CODES4 ? (read_in_row + 1) / 2 : 0;
            for (int64_t c = 0; c < chunks; ++c) ends[size_t(c)].push_back(uint32_t(of_chunk[size_t(c)].size()));
        }
        uint32_t base = 0;
        for (int64_t c = 0; c < chunks; ++c) {
            starts_.push_back(base);
            for (uint32_t end : ends[size_t(c)]) starts_.push_back(base + end);
            starts_.pop_back();
            entries_.insert(entries_.end(), of_chunk[size_t(c)].begin(), of_chunk[size_t(c)].end());
            base += uint32_t(of_chunk[size_t(c)].size());
        }
        starts_.push_back(base);
        return at == parts.count;
    }
    const Entry* begin(int64_t chunk_index, int64_t row) const { return entries_.data() + starts_[size_t(chunk_index * rows + row)]; }
    const Entry* end(int64_t chunk_index, int64_t row) const { return entries_.data() + starts_[size_t(chunk_index * rows + row + 1)]; }

   private:
    static constexpr int64_t CHUNK_BYTES = 24 << 10;

    // The value at the next place; `at` moves on, but for 4-bit codes, which `read_in_row` counts.
    static bool read(const Parts& p, int64_t row, int64_t col, int64_t& at, int64_t& read_in_row, float* out) {
        const int64_t place = p.kind == Parts::CODES4 ? at + read_in_row / 2 : at;
        if (place >= p.count) return false;
        if (p.kind == Parts::FP32) {
            *out = static_cast<const float*>(p.values)[at++];
            return true;
        }
        if (p.kind == Parts::BF16) {
            *out = widen(static_cast<const bf16*>(p.values)[at++]);
            return true;
        }
        int code;
        if (p.kind == Parts::CODES8)
            code = static_cast<const int8_t*>(p.values)[at++];
        else
            code = nibble(static_cast<const uint8_t*>(p.values)[place], read_in_row++ & 1);
        *out = float(code) * widen(p.scales[row * p.groups + col / p.group_size()]);
        return true;
    }

    std::vector<Entry> entries_;
    std::vector<uint32_t> starts_;  // of every row of every chunk, in order, and the end
};

}  // namespace pst
