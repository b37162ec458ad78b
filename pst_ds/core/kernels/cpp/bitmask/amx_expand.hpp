// For Intel AMX: division of the work, x as tiles, and the expansion of the weight piece by piece. Included inside a
// region that is compiled for AVX-512, after avx512.hpp.
//
// Layout, in working memory aligned to 64 bytes
//   piece  (groups * 32 rows, stride) bf16: expanded weights of some blocks of 32 columns, zeros at pruned places
//   x      tiles [pair of column tiles][block of 32 columns][1 or 2 tiles][16 pairs of columns][16 vectors][2 columns]
// A block is what one tile product consumes of a row: 32 columns, 64 bytes. The packed weight is that of common.hpp; its
// rows end at a byte, not at a block, so the last block reads its mask byte by byte (mask_word).
//
// An Expander belongs to one thread. It remembers for every row of the current group where its next value is, since the
// place of a value depends on all bits before it.
#pragma once

#include "avx512.hpp"

namespace pst::amx {

using avx512::LANES;
constexpr int64_t TILE = 16 * 32;     // bf16 elements of a tile
constexpr int64_t SUMS = 16 * 16;     // fp32 sums of a tile
constexpr int64_t GROUP = 32;         // rows of two tiles
constexpr int64_t MOST_GROUPS = 8;    // of a piece
constexpr int64_t FEW_VECTORS = 128;  // up to here, reading the weight takes longer than multiplying
constexpr int64_t STREAMS = 2;        // rows that are expanded in turn
constexpr int64_t STREAMS_APART = GROUP / STREAMS;

// The weight is expanded in pieces of groups * 32 rows by blocks * 32 columns. With few vectors a piece is 32 whole
// rows (up to 4096 of their columns), so memory is read sequentially. With many vectors it is 256 rows by 256 columns,
// so that x crosses the cache less often and the operands stay in the first-level cache.
struct Plan {
    int64_t groups;      // of 32 rows in a piece
    int64_t blocks;      // of 32 columns in a piece
    int64_t all_blocks;  // of 32 columns in a row
    int64_t pairs;       // of column tiles: 32 vectors of x
    bool few;            // few vectors

    // The blocks of a row are divided evenly, so that its last piece is not a small one.
    Plan(int64_t cols, int64_t n) : all_blocks((cols + LANES - 1) / LANES), pairs((n + 31) / 32), few(n <= FEW_VECTORS) {
        groups = few ? 1 : MOST_GROUPS;
        const int64_t most = few ? 128 : 8;
        const int64_t pieces = (all_blocks + most - 1) / most;
        blocks = (all_blocks + pieces - 1) / pieces;
    }
    int64_t rows() const { return groups * GROUP; }
    int64_t blocks_from(int64_t first) const { return all_blocks - first < blocks ? all_blocks - first : blocks; }
    int64_t stride() const { return blocks * LANES + LANES; }  // of a piece's rows; not a power of two of cache lines
    int64_t piece() const { return rows() * stride(); }
    int64_t x_elements() const { return pairs * all_blocks * 2 * TILE; }
    int64_t sums() const { return pairs * groups * 4 * SUMS; }
};

inline int64_t tiles_in_pair(int64_t n, int64_t pair) { return n - pair * 32 > 16 ? 2 : 1; }

// Transpose 16 rows of 16 numbers of 32 bits: first within quarters of registers, then the quarters.
inline void transpose(__m512i (&r)[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; ++j) {
            r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + 2 + j]);
            r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + 2 + j]);
        }
    for (int half = 0; half < 16; half += 8)
        for (int j = 0; j < 4; ++j) {
            t[half + j] = _mm512_shuffle_i32x4(r[half + j], r[half + 4 + j], 0x88);
            t[half + 4 + j] = _mm512_shuffle_i32x4(r[half + j], r[half + 4 + j], 0xdd);
        }
    for (int j = 0; j < 8; ++j) {
        r[j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0x88);
        r[8 + j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0xdd);
    }
}

// x as tiles of 16 pairs of columns by 16 vectors: [pair of column tiles][block of 32 columns][1 or 2 tiles].
inline void pack_x(const Job<bf16>& job, bf16* out, const Plan& plan) {
    const int64_t cols = job.weight.cols;
    for (int64_t first = 0; first < job.n; first += 16) {
        const int64_t tiles = tiles_in_pair(job.n, first / 32);
        const int64_t vectors = job.n - first < 16 ? job.n - first : 16;
        bf16* to = out + first / 32 * plan.all_blocks * 2 * TILE + first / 16 % 2 * TILE;
        const bf16* from = job.x + first * cols;
        for (int64_t block = 0; block < plan.all_blocks; ++block, to += tiles * TILE) {
            const int64_t left = cols - block * LANES;
            const __mmask32 here = left < LANES ? (__mmask32(1) << left) - 1 : ~__mmask32(0);
            __m512i tile[16];
            for (int64_t v = 0; v < 16; ++v)
                tile[v] = v < vectors ? _mm512_maskz_loadu_epi16(here, from + v * cols + block * LANES)
                                      : _mm512_setzero_si512();
            transpose(tile);
            for (int k = 0; k < 16; ++k) _mm512_store_si512(to + k * 32, tile[k]);
        }
    }
}

// Expands one piece of the weight after another, a slice at a time.
template <int LINES> class Expander {
   public:
    Expander(const Packed<bf16>& weight, const Plan& plan) : w_(weight), plan_(plan), bytes_(weight.bytes_per_row()) {
        const double row = double(w_.count) / double(w_.rows) * sizeof(bf16);
        ahead_ = plan.few ? avx512::AHEAD : int64_t(row * double(plan.blocks) / double(plan.all_blocks));
    }

    // Continue with rows [row0, row0 + rows), from their first column on.
    void begin_rows(int64_t row0, int64_t rows) {
        row0_ = row0;
        rows_ = rows;
        safe_ = rows;
        while (safe_ > 0 && !w_.may_overread(row0 + safe_ - 1, LANES)) --safe_;
        for (int64_t r = 0; r < rows; ++r) {
            values_[r] = w_.values + w_.row_offsets[row0 + r];
            if (!plan_.few) prefetch_piece(values_[r], w_.mask_row(row0 + r), 0);
        }
    }
    void begin_piece(int64_t first_block, bf16* out) {
        first_ = first_block;
        out_ = out;
        row_ = 0;
        at_ = 0;
        count_ = plan_.blocks_from(first_block);
    }
    // Expand at least `blocks` more of the piece, if available.
    void run(int64_t blocks) {
        if (plan_.few) run_along_rows(blocks);
        else run_down_rows((blocks + count_ - 1) / count_);
    }
    void finish() { run(int64_t(1) << 40); }

   private:
    static void prefetch_piece(const bf16* values, const uint8_t* mask, int64_t ahead) {
        const char* at = reinterpret_cast<const char*>(values) + ahead;
        for (int i = 0; i < 2 * LINES; ++i) _mm_prefetch(at + 64 * i, _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(mask), _MM_HINT_T0);
    }

    // STREAMS rows at a time, STREAMS_APART from each other: a single stream would leave the memory idle.
    void run_along_rows(int64_t blocks) {
        while (blocks > 0 && row_ < STREAMS_APART && row_ < rows_) {
            const int64_t wanted = (blocks + STREAMS - 1) / STREAMS;
            const int64_t end = wanted < count_ - at_ ? round_up(at_ + wanted, 4) : count_;  // four blocks per step
            const int64_t stop = end < count_ ? end : count_;
            const int64_t whole = w_.cols / LANES - first_ < stop ? w_.cols / LANES - first_ : stop;
            int64_t block = at_;
            if (row_ + (STREAMS - 1) * STREAMS_APART < safe_) block = expand_streams(at_, whole);
            for (int64_t row = row_; row < rows_; row += STREAMS_APART) expand(row, block, stop);
            blocks -= STREAMS * (stop - at_);
            at_ = stop;
            if (at_ == count_) {
                at_ = 0;
                ++row_;
            }
        }
    }

    // Blocks of STREAMS rows, four at a time as far as possible; returns the first remaining block.
    int64_t expand_streams(int64_t block, int64_t stop) {
        const bf16* values[STREAMS];
        for (int64_t s = 0; s < STREAMS; ++s) values[s] = values_[row_ + s * STREAMS_APART];
        const uint8_t* mask = w_.mask_row(row0_ + row_) + first_ * 4;
        bf16* out = out_ + row_ * plan_.stride();
        for (; block + 4 <= stop; block += 4)
            for (int64_t s = 0; s < STREAMS; ++s) {
                const uint8_t* words = mask + s * STREAMS_APART * bytes_ + block * 4;
                bf16* to = out + s * STREAMS_APART * plan_.stride() + block * LANES;
                avx512::prefetch<LINES>(values[s], words, ahead_);
                for (int i = 0; i < 4; ++i)
                    _mm512_store_si512(to + i * LANES, avx512::expand<true>(avx512::load_word(words + i * 4), values[s]));
            }
        for (int64_t s = 0; s < STREAMS; ++s) values_[row_ + s * STREAMS_APART] = values[s];
        return block;
    }

    // Rows of 8 blocks, one after another; the row after next is prefetched by the distance of a piece's columns.
    void run_down_rows(int64_t rows) {
        const int64_t end = rows < rows_ - row_ ? row_ + rows : rows_;
        const bool whole = count_ == 8 && first_ + 8 <= w_.cols / LANES;
        for (; row_ < end; ++row_) {
            if (!whole || row_ >= safe_) {
                expand(row_, 0, count_);
                continue;
            }
            const bf16* values = values_[row_];
            const uint8_t* mask = w_.mask_row(row0_ + row_) + first_ * 4;
            bf16* out = out_ + row_ * plan_.stride();
            prefetch_piece(values, mask + 32, ahead_);
            for (int i = 0; i < 8; ++i)
                _mm512_store_si512(out + i * LANES, avx512::expand<true>(avx512::load_word(mask + i * 4), values));
            values_[row_] = values;
        }
    }

    void expand(int64_t row, int64_t block, int64_t stop) {
        if (row < safe_) expand<true>(row, block, stop);
        else expand<false>(row, block, stop);
    }
    template <bool OVERREAD> void expand(int64_t row, int64_t block, int64_t stop) {
        const bf16* values = values_[row];
        const uint8_t* mask = w_.mask_row(row0_ + row) + first_ * 4;
        bf16* out = out_ + row * plan_.stride();
        const int64_t whole = w_.cols / LANES - first_;  // blocks whose columns all exist
        for (; block + 4 <= stop && block + 4 <= whole; block += 4) {
            avx512::prefetch<LINES>(values, mask + block * 4, ahead_);
            for (int64_t i = block; i < block + 4; ++i)
                _mm512_store_si512(out + i * LANES, avx512::expand<OVERREAD>(avx512::load_word(mask + i * 4), values));
        }
        for (; block < stop; ++block) {
            const uint32_t word = mask_word(mask, bytes_ - first_ * 4, block * LANES);
            _mm512_store_si512(out + block * LANES, avx512::expand<OVERREAD>(word, values));
        }
        values_[row] = values;
    }

    const Packed<bf16>& w_;
    const Plan& plan_;
    int64_t bytes_;      // of a row's mask
    int64_t ahead_;      // bytes to prefetch ahead of a row's values
    int64_t row0_ = 0;   // first row of the group
    int64_t rows_ = 0;   // rows of the group
    int64_t first_ = 0;  // first block of the piece
    int64_t count_ = 0;  // blocks of the piece
    int64_t safe_ = 0;   // rows from whose end a whole vector may be read
    int64_t row_ = 0;    // where the piece continues: row,
    int64_t at_ = 0;     // and block in it
    bf16* out_ = nullptr;
    const bf16* values_[MOST_GROUPS * GROUP];  // the next value of each row
};

}  // namespace pst::amx
