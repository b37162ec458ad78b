// Intel AMX: the weight is expanded, some rows and columns at a time, into tiles of 16 rows by 32 columns, and these are
// multiplied with tiles of x. While one piece is multiplied the next is expanded: the tile unit, the vector unit and the
// memory work at the same time. Included inside a region that is compiled for AVX-512 and AMX, after avx512.hpp.
#pragma once

#include <sys/syscall.h>
#include <unistd.h>

#include "avx512.hpp"

namespace pst::amx {

using avx512::LANES;
constexpr int64_t TILE = 16 * 32, SUMS = 16 * 16, GROUP = 32;  // elements of a tile and of its sums; rows of two tiles

// Linux lets a process use the tile registers once it has asked for them.
inline bool allowed() {
    constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    static const bool yes = syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
    return yes;
}

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
};

inline void configure() {
    TileConfig config;
    for (int i = 0; i < 8; ++i) config.bytes[i] = 64, config.rows[i] = 16;
    _tile_loadconfig(&config);
}

// How the work is cut: pieces of `groups` * 32 rows by `blocks` * 32 columns, so that a piece, the next one, the part of
// x they meet and the sums stay in a second-level cache of 2 MB.
struct Plan {
    int64_t groups, blocks, all_blocks, pairs;  // pairs: of column tiles, 32 vectors of x

    Plan(int64_t cols, int64_t n) : all_blocks((cols + LANES - 1) / LANES), pairs((n + 31) / 32) {
        groups = n <= 32 ? 1 : n <= 128 ? 4 : 8;
        const int64_t most = n <= 32 ? 128 : n <= 128 ? 32 : 16;
        const int64_t pieces = (all_blocks + most - 1) / most;
        blocks = pieces ? (all_blocks + pieces - 1) / pieces : 1;
    }
    int64_t stride() const { return blocks * LANES + LANES; }  // of a piece's rows; not a power of two of cache lines
    int64_t piece() const { return groups * GROUP * stride(); }
    int64_t x_elements() const { return pairs * all_blocks * 2 * TILE; }
    int64_t sums() const { return pairs * groups * 4 * SUMS; }
};

inline int64_t tiles_in_pair(int64_t n, int64_t pair) { return n - pair * 32 > 16 ? 2 : 1; }

// x as tiles of 16 pairs of columns by 16 vectors: [pair of column tiles][block of 32 columns][1 or 2 tiles].
inline void pack_x(const Job<bf16>& job, bf16* out, const Plan& plan) {
    const int64_t cols = job.weight.cols;
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i at = _mm512_mullo_epi32(lane, _mm512_set1_epi32(int(cols)));
    for (int64_t first = 0; first < job.n; first += 16) {
        const int64_t tiles = tiles_in_pair(job.n, first / 32), vectors = job.n - first < 16 ? job.n - first : 16;
        bf16* to = out + first / 32 * plan.all_blocks * 2 * TILE + first / 16 % 2 * TILE;
        const bf16* from = job.x + first * cols;
        for (int64_t block = 0; block < plan.all_blocks; ++block, to += tiles * TILE) {
            for (int64_t k = 0; k < LANES; k += 2) {
                const int64_t col = block * LANES + k;
                __m512i two = _mm512_setzero_si512();
                if (col + 1 < cols)
                    two = _mm512_mask_i32gather_epi32(two, __mmask16((1u << vectors) - 1), at, from + col, 2);
                else if (col < cols) {
                    alignas(64) uint32_t last[16] = {};
                    for (int64_t v = 0; v < vectors; ++v) last[v] = from[v * cols + col];
                    two = _mm512_load_si512(last);
                }
                _mm512_store_si512(to + k * 16, two);
            }
        }
    }
}

// Expands one piece of the weight after another, a slice at a time.
template <int LINES> class Expander {
   public:
    Expander(const Packed<bf16>& weight, const Plan& plan) : w_(weight), plan_(plan), bytes_(weight.bytes_per_row()) {}

    // Rows [row0, row0 + rows) come next, from their first column on.
    void begin_rows(int64_t row0, int64_t rows) {
        row0_ = row0, rows_ = rows;
        for (int64_t r = 0; r < rows; ++r) values_[r] = w_.values + w_.row_offsets[row0 + r];
    }
    void begin_piece(int64_t first_block, bf16* out) {
        first_ = first_block, out_ = out, row_ = 0, at_ = 0;
        count_ = plan_.all_blocks - first_block < plan_.blocks ? plan_.all_blocks - first_block : plan_.blocks;
    }
    // At least `blocks` more of the piece, if it has them.
    void run(int64_t blocks) {
        while (blocks > 0 && row_ < rows_) {
            const int64_t end = at_ + blocks < count_ ? round_up(at_ + blocks, 4) : count_;
            const int64_t stop = end < count_ ? end : count_;
            w_.may_overread(row0_ + row_, LANES) ? expand<true>(stop) : expand<false>(stop);
            blocks -= stop - at_;
            at_ = stop;
            if (at_ == count_) at_ = 0, ++row_;
        }
    }
    void finish() { run(int64_t(1) << 40); }

   private:
    template <bool OVERREAD> void expand(int64_t stop) {
        const bf16* values = values_[row_];
        const uint8_t* mask = w_.mask_row(row0_ + row_) + first_ * 4;
        bf16* out = out_ + row_ * plan_.stride();
        const int64_t whole = w_.cols / LANES - first_;  // blocks all of whose columns exist
        int64_t block = at_;
        for (; block + 4 <= stop && block + 4 <= whole; block += 4) {
            avx512::prefetch<LINES>(values, mask + block * 4);
            for (int i = 0; i < 4; ++i) {
                uint32_t word;
                std::memcpy(&word, mask + (block + i) * 4, 4);
                _mm512_store_si512(out + (block + i) * LANES, avx512::expand<OVERREAD>(word, values));
            }
        }
        for (; block < stop; ++block)
            _mm512_store_si512(out + block * LANES, avx512::expand<OVERREAD>(
                mask_word(mask, bytes_ - first_ * 4, block * LANES), values));
        values_[row_] = values;
    }

    const Packed<bf16>& w_;
    const Plan& plan_;
    int64_t bytes_, row0_ = 0, rows_ = 0, first_ = 0, count_ = 0, row_ = 0, at_ = 0;
    bf16* out_ = nullptr;
    const bf16* values_[8 * GROUP];
};

template <int COLUMN_TILES> inline void load_sums(const float* from, bool none) {
    if (none) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        return;
    }
    _tile_loadd(0, from, 64);
    _tile_loadd(1, from + SUMS, 64);
    if (COLUMN_TILES < 2) return;
    _tile_loadd(2, from + 2 * SUMS, 64);
    _tile_loadd(3, from + 3 * SUMS, 64);
}
template <int COLUMN_TILES> inline void store_sums(float* to) {
    _tile_stored(0, to, 64);
    _tile_stored(1, to + SUMS, 64);
    if (COLUMN_TILES < 2) return;
    _tile_stored(2, to + 2 * SUMS, 64);
    _tile_stored(3, to + 3 * SUMS, 64);
}

// Sums (tile = row tile + 2 * column tile) += 32 rows of a piece times x, over some blocks; expands beside it.
template <int COLUMN_TILES, class E>
inline void multiply_blocks(const bf16* piece, int64_t stride, const bf16* x, int64_t blocks, E& next, int64_t slice) {
    constexpr int64_t STEP = 4;
    for (int64_t k = 0; k < blocks; ++k, piece += LANES, x += COLUMN_TILES * TILE) {
        _tile_loadd(4, piece, stride * 2);
        _tile_loadd(6, x, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, piece + 16 * stride, stride * 2);
        _tile_dpbf16ps(1, 5, 6);
        if (COLUMN_TILES == 2) {
            _tile_loadd(7, x + TILE, 64);
            _tile_dpbf16ps(2, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
        if (k % STEP == STEP - 1) next.run(slice);
    }
}

template <int LINES> class Worker {
   public:
    Worker(const Job<bf16>& job, const Plan& plan, const bf16* x, bf16* pieces, float* sums)
        : job_(job), plan_(plan), x_(x), sums_(sums), next_(job.weight, plan) {
        pieces_[0] = pieces, pieces_[1] = pieces + plan.piece();
    }

    // Rows [first, last) of y.
    void rows(int64_t first, int64_t last) {
        const int64_t step = plan_.groups * GROUP;
        begin_rows(first, last);
        next_.begin_piece(0, pieces_[0]);
        next_.finish();
        int turn = 0;
        for (int64_t row = first; row < last; row += step) {
            const int64_t rows = row + step < last ? step : last - row;
            for (int64_t block = 0; block < plan_.all_blocks; block += plan_.blocks, turn ^= 1) {
                if (block + plan_.blocks < plan_.all_blocks)
                    next_.begin_piece(block + plan_.blocks, pieces_[turn ^ 1]);
                else {
                    begin_rows(row + step, last);
                    next_.begin_piece(0, pieces_[turn ^ 1]);
                }
                multiply_piece(pieces_[turn], rows, block);
                next_.finish();
            }
            store(row, rows);
        }
    }

   private:
    void begin_rows(int64_t row, int64_t last) {
        const int64_t step = plan_.groups * GROUP;
        next_.begin_rows(row, row >= last ? 0 : row + step < last ? step : last - row);
    }

    void multiply_piece(const bf16* piece, int64_t rows, int64_t first) {
        const int64_t left = plan_.all_blocks - first, blocks = left < plan_.blocks ? left : plan_.blocks;
        const int64_t groups = (rows + GROUP - 1) / GROUP;
        const int64_t slice = (4 * GROUP * plan_.groups + plan_.pairs * groups - 1) / (plan_.pairs * groups);
        for (int64_t pair = 0; pair < plan_.pairs; ++pair) {
            const int64_t tiles = tiles_in_pair(job_.n, pair);
            const bf16* x = x_ + (pair * plan_.all_blocks * 2 + first * tiles) * TILE;
            for (int64_t g = 0; g < groups; ++g) {
                float* sums = sums_ + (pair * plan_.groups + g) * 4 * SUMS;
                const bf16* a = piece + g * GROUP * plan_.stride();
                if (tiles == 2) {
                    load_sums<2>(sums, first == 0);
                    multiply_blocks<2>(a, plan_.stride(), x, blocks, next_, slice);
                    store_sums<2>(sums);
                } else {
                    load_sums<1>(sums, first == 0);
                    multiply_blocks<1>(a, plan_.stride(), x, blocks, next_, slice);
                    store_sums<1>(sums);
                }
            }
        }
    }

    void store(int64_t row0, int64_t rows) {
        const __m512i down = _mm512_setr_epi32(0, 16, 32, 48, 64, 80, 96, 112, 128, 144, 160, 176, 192, 208, 224, 240);
        for (int64_t c = 0; c < job_.n; ++c)
            for (int64_t r = 0; r < rows; r += 16) {
                const int64_t group = (c / 32 * plan_.groups + r / GROUP) * 4, tile = r % GROUP / 16 + c / 16 % 2 * 2;
                __m512 sum = _mm512_i32gather_ps(down, sums_ + (group + tile) * SUMS + c % 16, 4);
                const __mmask16 here = rows - r < 16 ? __mmask16((1u << (rows - r)) - 1) : __mmask16(0xffff);
                if (job_.bias) {
                    __m256i bias = _mm256_maskz_loadu_epi16(here, job_.bias + row0 + r);
                    sum = _mm512_add_ps(sum, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bias), 16)));
                }
                _mm256_mask_storeu_epi16(job_.y + c * job_.weight.rows + row0 + r, here, (__m256i)_mm512_cvtneps_pbh(sum));
            }
    }

    const Job<bf16>& job_;
    const Plan& plan_;
    const bf16* x_;
    bf16* pieces_[2];
    float* sums_;
    Expander<LINES> next_;
};

template <int LINES> bool multiply(const Job<bf16>& job, int threads) {
    static thread_local Scratch x_memory;
    const Plan plan(job.weight.cols, job.n);
    bf16* x = x_memory.get<bf16>(plan.x_elements());
    if (!x) return false;
    pack_x(job, x, plan);
    bool enough = true;
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(&& : enough)
    {
        static thread_local Scratch pieces, sums;
        enough = pieces.get<bf16>(2 * plan.piece()) && sums.get<float>(plan.sums());
        if (enough) {
            const int64_t groups = (job.weight.rows + 15) / 16, me = omp_get_thread_num(), all = omp_get_num_threads();
            const int64_t first = groups * me / all * 16, last = groups * (me + 1) / all * 16;
            configure();
            if (first < job.weight.rows)
                Worker<LINES>(job, plan, x, pieces.get<bf16>(0), sums.get<float>(0))
                    .rows(first, last < job.weight.rows ? last : job.weight.rows);
            _tile_release();
        }
    }
    return enough;
}

}  // namespace pst::amx
