// A sparse matrix as its product wants it, made once from the parts in the file.
//
// Layout of a Stream (owned, made when a session opens, then read by all threads)
//   words_   entries of non-zeros, 1 or 2 words of 32 bits each (Form), [chunk of columns][place][entry]
//   starts_  (chunks * rows + 1,): first word of each place
//   order_   (chunks * rows,): the row in each place. Groups of 64 rows are sorted by how many entries they have.
// Entries of a row in a chunk are an even number, the last one zero if necessary, since loops take two per step. An entry
// has the offset of its column in a panel of activations, [column or pair][panel tokens] fp32, in bytes: no
// multiplication is needed to find it. Offsets are multiples of 8 and below 512 KiB (chunk_bytes), so that an eighth of
// one fits in 16 bits. Parts point into the session's file and are read only here.
#pragma once

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

#include "../bitmask/common.hpp"

namespace pst {

// The parts of a weight of `rows` by `cols`, as in core/formats: a bitmask, and the values it keeps, row after row.
struct Parts {
    enum Kind { FP32, BF16, CODES8, CODES4 };
    Kind kind;
    const void* values;
    int64_t count;        // of elements of `values`: numbers, codes, or bytes of two codes
    const uint8_t* mask;  // (rows, ceil(cols / 8)), little-endian bits
    const bf16* scales;  // bf16 (rows, groups), of codes
    int64_t groups;
    int64_t rows;
    int64_t cols;

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

// How the entries of a Stream are stored in its words of 32 bits, and what they are summed in.
enum class Form {
    VALUES,  // a value in fp32, and the offset in bytes of its column in a panel of activations; fp32
    CODES,   // a code in bf16, which has it exactly, and an eighth of the offset, in 16 bits each; fp32, times the row's scale
    PAIRS,   // the codes of an even column and of the next, 8 bits each, and an eighth of the offset; exact in 32 bits
};

// Its non-zeros, cut into chunks of columns whose activations fit the first cache. In a chunk rows are taken in groups, and
// in a group by how many entries they have, so that a processor foresees where a row's loop ends.
//
// Codes of 8 bits with a scale a row may be taken two columns at a time, as 16-bit integers: a pair with anything in it is
// one entry.
class Stream {
   public:
    // A row's entries: an even number of them, the last one zero where the row has an odd number.
    struct Row {
        int64_t row;
        const uint32_t* begin;
        const uint32_t* end;
    };
    static constexpr int64_t GROUP = 64;  // rows
    static constexpr int64_t WORD_PAIRS = 32;
    int64_t rows = 0;
    int64_t cols = 0;
    int64_t chunk = 0;  // columns or pairs of a chunk
    int64_t chunks = 0;
    Form form = Form::VALUES;
    float limit = 0;  // of pairs: the largest 16-bit activation whose sums stay within 32 bits
    bool in_bytes = false;  // of pairs: activations have 8 bits, with a scale per chunk, which is a word of 64 columns
    std::vector<float> row_scales;  // of codes and pairs

    int64_t width() const { return form == Form::PAIRS ? (cols + 1) / 2 : cols; }

    // Whether byte activations are possible: their sums are scaled per word, and a row has one scale.
    static bool takes_bytes(const Parts& parts) {
        return (parts.kind == Parts::CODES8 || parts.kind == Parts::CODES4) && parts.groups == 1;
    }

    // `panel`: activations side by side in a panel, for each column or pair. `bytes`: activations have 8 bits, requires
    // takes_bytes(parts). False where parts do not fit each other.
    bool make(const Parts& parts, int64_t panel, bool bytes = false) {
        rows = parts.rows;
        cols = parts.cols;
        in_bytes = bytes;
        if ((parts.kind == Parts::CODES8 || parts.kind == Parts::CODES4) && parts.groups == 1) {
            form = in_bytes || (parts.kind == Parts::CODES8 && pays_in_pairs(parts)) ? Form::PAIRS : Form::CODES;
            for (int64_t row = 0; row < rows; ++row) row_scales.push_back(widen(parts.scales[row]));
        }
        const int64_t most = in_bytes ? WORD_PAIRS : std::max<int64_t>(1, chunk_bytes() / (panel * 4));
        chunks = (width() + most - 1) / most;
        chunk = in_bytes || !chunks ? most : (width() + chunks - 1) / chunks;
        std::vector<std::vector<uint32_t>> found(size_t(rows * chunks));  // of a row and a chunk
        std::vector<float> dense(size_t(cols + 1));
        double largest_sum = 1;
        for (int64_t row = 0, at = 0; row < rows; ++row) {
            if (!expand_row(parts, row, at, dense.data(), form == Form::VALUES)) return false;
            double sum = 0;
            for (int64_t unit = 0; unit < width(); ++unit) {
                const float first = dense[size_t(form == Form::PAIRS ? 2 * unit : unit)];
                const float second = form == Form::PAIRS ? dense[size_t(2 * unit + 1)] : 0;
                sum += std::fabs(first) + std::fabs(second);
                if (first != 0 || second != 0)
                    put(first, second, uint32_t(unit % chunk * panel * 4), found[size_t(row * chunks + unit / chunk)]);
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
        return {order_[i], words_.data() + starts_[i], words_.data() + starts_[i + 1]};
    }

   private:
    // What of activations stays in the first cache beside all else.
    static int64_t chunk_bytes() {
        int64_t cache = 0;
#ifdef _SC_LEVEL1_DCACHE_SIZE
        cache = sysconf(_SC_LEVEL1_DCACHE_SIZE);
#endif
        return (cache >= 16 << 10 && cache <= 512 << 10 ? cache : 32 << 10) / 4 * 3;
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

    void put(float first, float second, uint32_t offset, std::vector<uint32_t>& to) const {
        if (form == Form::PAIRS)
            return to.push_back(uint32_t(uint8_t(int8_t(first))) << 16 | uint32_t(uint8_t(int8_t(second))) << 24 | offset / 8);
        uint32_t bits;
        std::memcpy(&bits, &first, 4);
        to.push_back(form == Form::CODES ? bits | offset / 8 : bits);
        if (form == Form::VALUES) to.push_back(offset);
    }

    // Puts the chunks one after the other.
    void join(std::vector<std::vector<uint32_t>>& found) {
        const size_t words = form == Form::VALUES ? 2 : 1;
        size_t count = 0;
        for (std::vector<uint32_t>& of_row : found) {
            if (of_row.size() / words % 2) of_row.insert(of_row.end(), words, 0);
            count += of_row.size();
        }
        if (count > UINT32_MAX) throw std::length_error("a weight of SparseLinear has more than 2^32 entries");
        words_.reserve(count);
        starts_.reserve(size_t(rows * chunks + 1));
        order_.reserve(size_t(rows * chunks));
        const auto of = [&](int64_t c, int64_t row) -> const std::vector<uint32_t>& { return found[size_t(row * chunks + c)]; };
        for (int64_t c = 0; c < chunks; ++c)
            for (int64_t first = 0; first < rows; first += GROUP) {
                const size_t begin = order_.size();
                for (int64_t row = first; row < std::min(rows, first + GROUP); ++row) order_.push_back(int32_t(row));
                std::stable_sort(order_.begin() + int64_t(begin), order_.end(),
                                 [&](int32_t a, int32_t b) { return of(c, a).size() < of(c, b).size(); });
                for (size_t i = begin; i < order_.size(); ++i) {
                    starts_.push_back(uint32_t(words_.size()));
                    words_.insert(words_.end(), of(c, order_[i]).begin(), of(c, order_[i]).end());
                }
            }
        starts_.push_back(uint32_t(words_.size()));
    }

    std::vector<uint32_t> words_;
    std::vector<uint32_t> starts_;  // of every place of every chunk, in order, and the end
    std::vector<int32_t> order_;    // the row in every place
};

}  // namespace pst
