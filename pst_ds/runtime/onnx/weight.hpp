// A sparse matrix as its product wants it, made once from the parts in the file.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

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

// Row `row` at all its columns, zeros where nothing is kept; of codes times their scales if `scaled`. `at`: its first place
// in the values, then the next row's. False where there are too few values.
inline bool expand_row(const Parts& p, int64_t row, int64_t& at, float* out, bool scaled) {
    int64_t in_row = 0;  // 4-bit codes begin a byte in every row
    for (int64_t col = 0; col < p.cols; ++col) {
        out[col] = 0;
        if (!(p.mask[row * ((p.cols + 7) / 8) + col / 8] >> (col % 8) & 1)) continue;
        const int64_t place = at + (p.kind == Parts::CODES4 ? in_row / 2 : in_row);
        if (place >= p.count) return false;
        const float scale = p.scales && scaled ? widen(p.scales[row * p.groups + col / p.group_size()]) : 1.0f;
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

// Its non-zeros, cut into chunks of columns whose activations fit the first cache. In a chunk rows are taken in groups, and
// in a group by how many entries they have, so that a processor foresees where a row's loop ends.
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
    // A row's entries: an even number of them, the last one zero where the row has an odd number.
    struct Row {
        int64_t row;
        const Entry *begin, *end;
    };
    static constexpr int64_t GROUP = 64;  // rows
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
        const int64_t most = std::max<int64_t>(1, chunk_bytes() / (panel * 4));
        chunks = (width() + most - 1) / most, chunk = chunks ? (width() + chunks - 1) / chunks : most;
        std::vector<std::vector<Entry>> found(size_t(rows * chunks));  // of a row and a chunk
        double largest_sum = 1;
        for (int64_t row = 0, at = 0; row < rows; ++row) {
            if (!expand_row(parts, row, at, dense.data(), !in_pairs)) return false;
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
                found[size_t(row * chunks + unit / chunk)].push_back(entry);
            }
            largest_sum = sum > largest_sum ? sum : largest_sum;
            if (row + 1 == rows && at != parts.count) return false;
        }
        limit = float(std::fmin(32767.0, std::floor(2147483647.0 / largest_sum)));
        join(found);
        return rows > 0 || parts.count == 0;
    }
    // The row in a place of a chunk: places of a group hold the rows of that group.
    Row at(int64_t chunk_index, int64_t place) const {
        const size_t i = size_t(chunk_index * rows + place);
        return {order_[i], entries_.data() + starts_[i], entries_.data() + starts_[i + 1]};
    }

   private:
        // What of activations stays in the first cache beside all else.
    static int64_t chunk_bytes() {
        int64_t cache = 0;
#ifdef _SC_LEVEL1_DCACHE_SIZE
        cache = sysconf(_SC_LEVEL1_DCACHE_SIZE);
#endif
        return (cache >= 16 << 10 ? cache : 32 << 10) / 4 * 3;
    }

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

    // Puts the chunks one after the other.
    void join(std::vector<std::vector<Entry>>& found) {
        size_t count = 0;
        for (std::vector<Entry>& of_row : found) {
            if (of_row.size() % 2) of_row.push_back({{0.0f}, of_row.back().offset});
            count += of_row.size();
        }
        entries_.reserve(count), starts_.reserve(size_t(rows * chunks + 1)), order_.reserve(size_t(rows * chunks));
        const auto of = [&](int64_t c, int64_t row) -> const std::vector<Entry>& { return found[size_t(row * chunks + c)]; };
        for (int64_t c = 0; c < chunks; ++c)
            for (int64_t first = 0; first < rows; first += GROUP) {
                const size_t begin = order_.size();
                for (int64_t row = first; row < std::min(rows, first + GROUP); ++row) order_.push_back(int32_t(row));
                std::stable_sort(order_.begin() + int64_t(begin), order_.end(),
                                 [&](int32_t a, int32_t b) { return of(c, a).size() < of(c, b).size(); });
                for (size_t i = begin; i < order_.size(); ++i) {
                    starts_.push_back(uint32_t(entries_.size()));
                    entries_.insert(entries_.end(), of(c, order_[i]).begin(), of(c, order_[i]).end());
                }
            }
        starts_.push_back(uint32_t(entries_.size()));
    }

    std::vector<Entry> entries_;
    std::vector<uint32_t> starts_;  // of every place of every chunk, in order, and the end
    std::vector<int32_t> order_;    // the row in every place
};

}  // namespace pst
