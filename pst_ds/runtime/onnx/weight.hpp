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
//
// Codes of 8 bits with a scale a row may be taken two columns at a time, as 16-bit integers whose products are summed
// exactly in 32 bits: a pair with anything in it is one entry. All else is summed in fp32, an entry for each value.
class Stream {
   public:
    struct Entry {
        union {
            float value;
            uint32_t pair;  // the codes of an even column and of the next, in its lower and upper half
        };
        uint32_t offset;  // in bytes, of the column or pair in a panel of activations
    };
    int64_t rows = 0, cols = 0, chunk = 0, chunks = 0;  // a chunk is so many columns or pairs
    bool in_pairs = false;
    float limit = 0;  // the largest 16-bit activation whose sums stay within 32 bits
    std::vector<float> row_scales;

    int64_t width() const { return in_pairs ? (cols + 1) / 2 : cols; }

    // `panel`: activations side by side in a panel, for each column or pair. False where parts do not fit each other.
    bool make(const Parts& parts, int64_t panel) {
        rows = parts.rows, cols = parts.cols;
        std::vector<float> dense(size_t(cols + 1));
        if (parts.kind == Parts::CODES8 && parts.groups == 1) {
            in_pairs = pays_in_pairs(parts);
            for (int64_t row = 0; in_pairs && row < rows; ++row) row_scales.push_back(widen(parts.scales[row]));
        }
        chunk = CHUNK_BYTES / (panel * 4), chunks = (width() + chunk - 1) / chunk;
        std::vector<std::vector<Entry>> of_chunk;
        std::vector<std::vector<uint32_t>> ends;
        of_chunk.resize(size_t(chunks)), ends.resize(size_t(chunks));
        double largest_sum = 1;
        for (int64_t row = 0, at = 0; row < rows; ++row) {
            if (!expand(parts, row, at, dense.data())) return false;
            double sum = 0;
            for (int64_t unit = 0; unit < width(); ++unit) {
                Entry entry{};
                if (in_pairs) {
                    const float low = dense[size_t(2 * unit)], high = dense[size_t(2 * unit + 1)];
                    entry.pair = uint32_t(uint16_t(int16_t(low))) | uint32_t(uint16_t(int16_t(high))) << 16;
                    sum += std::fabs(low) + std::fabs(high);
                } else
                    entry.value = dense[size_t(unit)];
                if (in_pairs ? entry.pair == 0 : entry.value == 0) continue;
                entry.offset = uint32_t(unit % chunk * panel * 4);
                of_chunk[size_t(unit / chunk)].push_back(entry);
            }
            largest_sum = sum > largest_sum ? sum : largest_sum;
            for (int64_t c = 0; c < chunks; ++c) ends[size_t(c)].push_back(uint32_t(of_chunk[size_t(c)].size()));
            if (row + 1 == rows && at != parts.count) return false;
        }
        limit = float(std::fmin(32767.0, std::floor(2147483647.0 / largest_sum)));
        join(of_chunk, ends);
        return rows > 0 || parts.count == 0;
    }
    const Entry* begin(int64_t chunk_index, int64_t row) const { return entries_.data() + starts_[size_t(chunk_index * rows + row)]; }
    const Entry* end(int64_t chunk_index, int64_t row) const { return entries_.data() + starts_[size_t(chunk_index * rows + row + 1)]; }

   private:
    static constexpr int64_t CHUNK_BYTES = 24 << 10;

    // An entry of a pair takes as long as one of a value; where they are few, sums in fp32 are as fast, and round less.
    static bool pays_in_pairs(const Parts& parts) {
        int64_t pairs = 0;
        for (int64_t row = 0; row < parts.rows; ++row)
            for (int64_t byte = 0; byte < (parts.cols + 7) / 8; ++byte) {
                const int bits = parts.mask[row * ((parts.cols + 7) / 8) + byte];
                pairs += __builtin_popcount((bits | bits >> 1) & 0x55);
            }
        return double(pairs) < 0.9 * double(parts.count);
    }

    // Row `row` at all its columns, zeros where nothing is kept; its codes where they are in pairs. `at`: its first place
    // in the values, then the next row's.
    bool expand(const Parts& p, int64_t row, int64_t& at, float* out) const {
        int64_t in_row = 0;  // 4-bit codes begin a byte in every row
        for (int64_t col = 0; col < cols; ++col) {
            out[col] = 0;
            if (!(p.mask[row * ((cols + 7) / 8) + col / 8] >> (col % 8) & 1)) continue;
            const int64_t place = at + (p.kind == Parts::CODES4 ? in_row / 2 : in_row);
            if (place >= p.count) return false;
            const float scale = p.scales && !in_pairs ? widen(p.scales[row * p.groups + col / p.group_size()]) : 1.0f;
            switch (p.kind) {
                case Parts::FP32: out[col] = static_cast<const float*>(p.values)[place]; break;
                case Parts::BF16: out[col] = widen(static_cast<const bf16*>(p.values)[place]); break;
                case Parts::CODES8: out[col] = float(static_cast<const int8_t*>(p.values)[place]) * scale; break;
                case Parts::CODES4:
                    out[col] = float(nibble(static_cast<const uint8_t*>(p.values)[place], in_row & 1)) * scale;
            }
            ++in_row;
        }
        at += p.kind == Parts::CODES4 ? (in_row + 1) / 2 : in_row;
        return true;
    }

    // Puts the chunks one after the other. ends: of every chunk and row, its entries in the chunk so far.
    void join(const std::vector<std::vector<Entry>>& of_chunk, const std::vector<std::vector<uint32_t>>& ends) {
        uint32_t base = 0;
        starts_.push_back(0);
        for (size_t c = 0; c < of_chunk.size(); ++c) {
            for (uint32_t end : ends[c]) starts_.push_back(base + end);
            entries_.insert(entries_.end(), of_chunk[c].begin(), of_chunk[c].end());
            base += uint32_t(of_chunk[c].size());
        }
    }

    std::vector<Entry> entries_;
    std::vector<uint32_t> starts_;  // of every row of every chunk, in order, and the end
};

}  // namespace pst
