// A quantised weight of high density, multiplied as in the decoder: zeros of a row are expanded, and its codes meet
// activations of 13 to 16 bits, or of 8 bits with a scale per word of columns. Above a certain density this is faster
// than visiting kept weights only.
//
// The weight is repacked to a Matrix (decoder/matrix.hpp), which this object owns; activations become Activations
// (decoder/activations.hpp) in memory of the calling thread, MOST_TOKENS at a time, or MOST_BYTES. x (tokens, columns) and
// y (tokens, rows) are fp32 tensors of the runtime. Tokens are quantised in PIECES, then blocks of rows are multiplied in
// PIECES; pieces write different parts of y. Sums are exact integers, so results do not depend on threads.
#pragma once

#include <memory>

#include "../decoder/kernels.hpp"
#include "../decoder/packing/pack.hpp"
#include "weight.hpp"

namespace pst {

class CodeProduct {
   public:
    // Whether a weight is multiplied this way: instructions expand bits, its groups have a supported size, and it is dense enough.
    static bool pays(const Parts& parts, bool in_bytes) {
        const bool has_codes = parts.kind == Parts::CODES8 || parts.kind == Parts::CODES4;
        if (!has_codes || !kernels().words || (parts.groups != 1 && parts.group_size() % 32)) return false;
        return is_dense(parts, in_bytes);
    }
    static bool is_dense(const Parts& parts, bool in_bytes) {
        int64_t kept = 0;
        for (int64_t i = 0; i < parts.rows * ((parts.cols + 7) / 8); ++i) kept += __builtin_popcount(parts.mask[i]);
        return double(kept) > (in_bytes ? LEAST_KEPT_FOR_BYTES : LEAST_KEPT) * double(parts.rows * parts.cols);
    }

    // False if parts do not match. in_bytes: 8-bit activations.
    bool make(const Parts& parts, bool in_bytes) {
        in_bytes_ = in_bytes && kernels().quantize_to_bytes;
        std::vector<float> row(size_t(parts.cols + 1));
        std::vector<int8_t> codes;
        codes.reserve(size_t(parts.rows * parts.cols));
        int64_t at = 0;
        for (int64_t r = 0; r < parts.rows; ++r) {
            if (!expand_row(parts, r, at, row.data(), false)) return false;
            for (int64_t c = 0; c < parts.cols; ++c) codes.push_back(int8_t(row[size_t(c)]));
        }
        if (at != parts.count) return false;
        const int bits = parts.kind == Parts::CODES8 ? 8 : 4;
        constexpr int THREADS = 1;  // a session opens its nodes one after the other, and its threads are not ours to use
        matrix_.reset(pack(codes.data(), parts.scales, parts.rows, parts.cols, bits, parts.groups == 1 ? 0 : parts.group_size(),
                           kernels().words, THREADS));
        return true;
    }
    explicit operator bool() const { return bool(matrix_); }

    // y (tokens, rows) = activation(x (tokens, cols) W' + bias); bias may be null.
    template <class Parallel>
    void multiply(const float* x, int64_t tokens, const float* bias, int64_t activation, float* y, const Parallel& parallel) const {
        static thread_local Activations integers;
        const Matrix& m = *matrix_;
        const auto quantize = in_bytes_ ? kernels().quantize_to_bytes : kernels().quantize;
        const int64_t most = in_bytes_ ? std::max(MOST_TOKENS, MOST_BYTES / m.columns) : MOST_TOKENS;
        for (int64_t first = 0; first < tokens; first += most) {
            const int64_t count = std::min(most, tokens - first);
            const float* from = x + first * m.columns;
            Activations& q = integers;
            q.reserve(count, m.columns);
            q.begin(m, in_bytes_);
            parallel(PIECES, [&](int64_t piece) {
                for (int64_t t = count * piece / PIECES; t < count * (piece + 1) / PIECES; ++t)
                    quantize(m, from + t * m.columns, t, q);
            });
            const int64_t steps = (m.blocks() + STEP - 1) / STEP;
            const int64_t pieces = std::min(PIECES, steps);
            parallel(pieces, [&](int64_t piece) {
                static thread_local std::vector<uint8_t> room;
                if (int64_t(room.size()) < room_for(m.columns)) room.resize(size_t(room_for(m.columns)));
                const int64_t begin = STEP * (steps * piece / pieces);
                const int64_t end = std::min(m.blocks(), STEP * (steps * (piece + 1) / pieces));
                float* to = y + first * m.rows;
                kernels().product({m, from, q, count, begin, end, to, m.rows, room.data(), bias, activation});
                if (!kernels().finishes) finish(begin * m.height, std::min(m.rows, end * m.height), count, bias, activation, to);
            });
        }
    }

   private:
    static constexpr double LEAST_KEPT = 0.3;
    static constexpr double LEAST_KEPT_FOR_BYTES = 0.15;
    static constexpr int64_t MOST_TOKENS = 256;
    static constexpr int64_t MOST_BYTES = 400 << 10;  // of tokens that share an expanded block: less than half of an L2 cache
    static constexpr int64_t PIECES = 8;
    static constexpr int64_t STEP = 2;  // blocks that kernels multiply together
    static const Functions& kernels() { return functions(best_level()); }

    void finish(int64_t first, int64_t last, int64_t tokens, const float* bias, int64_t activation, float* y) const {
        for (int64_t t = 0; t < tokens && (bias || activation); ++t) {
            float* row = y + t * matrix_->rows;
            for (int64_t i = first; bias && i < last; ++i) row[i] += bias[i];
            if (activation) kernels().gate(activation, nullptr, row + first, nullptr, last - first, row + first);
        }
    }

    std::unique_ptr<Matrix> matrix_;
    bool in_bytes_ = false;
};

}  // namespace pst
