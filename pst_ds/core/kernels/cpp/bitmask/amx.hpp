// Intel AMX: pieces of the weight are expanded and multiplied with tiles of x. The next piece is expanded while one is
// multiplied, so the tile unit, the vector unit and the memory work at the same time. Included inside a region that is
// compiled for AVX-512 and AMX, after amx_expand.hpp.
//
// Layout, per thread unless noted; all aligned to 64 bytes
//   x       tiles of all vectors, packed once per call and read by all threads (pack_x)
//   pieces  two pieces of the weight (Plan::piece), in turn expanded and multiplied
//   sums    fp32 [pair of column tiles][group of 32 rows][4 tiles][16 rows][16 vectors], kept in memory between the
//           pieces of a row
// Tile registers: 0 .. 3 are sums (row tile + 2 * column tile), 4 and 5 are 16 rows each of a piece, 6 and 7 are x. A row of
// a piece's tile has 32 bf16 weights; a row of an x tile has 16 vectors of a pair of columns. TDPBF16PS adds the products
// to fp32 sums. The registers belong to a thread while a Tiles object exists.
#pragma once

#include "amx_expand.hpp"
#include "tile_config.hpp"

namespace pst::amx {

// The tile registers of this thread, for the lifetime of the object.
class Tiles {
   public:
    Tiles() {
        TileConfig config;
        for (int i = 0; i < 8; ++i) {
            config.bytes[i] = 64;
            config.rows[i] = 16;
        }
        _tile_loadconfig(&config);
    }
    ~Tiles() { _tile_release(); }
};

// Load the sums of a group, or clear them for its first piece.
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

// Sums (tile = row tile + 2 * column tile) += 32 rows of a piece times x, over some blocks, while `next` expands.
template <int COLUMN_TILES, class Next>
inline void multiply_blocks(const bf16* piece, int64_t stride, const bf16* x, int64_t blocks, Next& next, int64_t slice) {
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
        if (k % 4 == 3) next.run(slice);  // vector instructions between tile instructions
    }
}

// Multiplies some rows of the weight with all vectors, in one thread.
template <int LINES> class Worker {
   public:
    Worker(const Job<bf16>& job, const Plan& plan, const bf16* x, bf16* pieces, float* sums)
        : job_(job), plan_(plan), x_(x), pieces_{pieces, pieces + plan.piece()}, sums_(sums), next_(job.weight, plan) {}

    // Rows [first, last) of the weight: columns of y. The first piece is expanded before anything is multiplied; from
    // then on each piece is expanded during the product before it, also across the end of a row.
    void rows(int64_t first, int64_t last) {
        begin_rows(first, last);
        next_.begin_piece(0, pieces_[0]);
        next_.finish();
        int turn = 0;
        for (int64_t row = first; row < last; row += plan_.rows()) {
            const int64_t rows = row + plan_.rows() < last ? plan_.rows() : last - row;
            for (int64_t block = 0; block < plan_.all_blocks; block += plan_.blocks, turn ^= 1) {
                const int64_t after = block + plan_.blocks;
                if (after >= plan_.all_blocks) begin_rows(row + plan_.rows(), last);
                next_.begin_piece(after < plan_.all_blocks ? after : 0, pieces_[turn ^ 1]);
                multiply_piece(pieces_[turn], rows, block);
                next_.finish();
            }
            store(row, rows);
        }
    }

   private:
    // Let the expansion continue with the rows from `row` on, if any are left before `last`.
    void begin_rows(int64_t row, int64_t last) {
        const int64_t left = row < last ? last - row : 0;
        next_.begin_rows(row, left < plan_.rows() ? left : plan_.rows());
    }

    void multiply_piece(const bf16* piece, int64_t rows, int64_t first) {
        const int64_t groups = (rows + GROUP - 1) / GROUP;
        const int64_t turns = plan_.pairs * groups;
        const int64_t slice = (4 * plan_.rows() + turns - 1) / turns;  // so that the next piece is ready at the end
        for (int64_t pair = 0; pair < plan_.pairs; ++pair)
            for (int64_t g = 0; g < groups; ++g) {
                const bf16* a = piece + g * GROUP * plan_.stride();
                float* sums = sums_ + (pair * plan_.groups + g) * 4 * SUMS;
                if (tiles_in_pair(job_.n, pair) == 2) multiply_group<2>(a, pair, first, sums, slice);
                else multiply_group<1>(a, pair, first, sums, slice);
            }
    }

    template <int COLUMN_TILES>
    void multiply_group(const bf16* piece, int64_t pair, int64_t first, float* sums, int64_t slice) {
        const bf16* x = x_ + (pair * plan_.all_blocks * 2 + first * COLUMN_TILES) * TILE;
        load_sums<COLUMN_TILES>(sums, first == 0);
        multiply_blocks<COLUMN_TILES>(piece, plan_.stride(), x, plan_.blocks_from(first), next_, slice);
        store_sums<COLUMN_TILES>(sums);
    }

    // Write the finished sums to y, tile by tile.
    void store(int64_t row0, int64_t rows) {
        for (int64_t first = 0; first < job_.n; first += 16)
            for (int64_t r = 0; r < rows; r += 16) {
                const int64_t group = (first / 32 * plan_.groups + r / GROUP) * 4;
                store_tile(sums_ + (group + r % GROUP / 16 + first / 16 % 2 * 2) * SUMS, first, row0 + r,
                           rows - r < 16 ? __mmask16((1u << (rows - r)) - 1) : __mmask16(0xffff));
            }
    }

    // A tile is [row][vector] and y is (vectors, rows): transpose it, add the bias, round to bf16. here: rows that exist.
    void store_tile(const float* sums, int64_t first, int64_t row, __mmask16 here) {
        __m512i tile[16];
        for (int r = 0; r < 16; ++r) tile[r] = _mm512_load_si512(sums + r * 16);
        transpose(tile);
        __m512 bias = _mm512_setzero_ps();
        if (job_.bias) {
            const __m512i values = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(here, job_.bias + row));
            bias = _mm512_castsi512_ps(_mm512_slli_epi32(values, 16));
        }
        const int64_t vectors = job_.n - first < 16 ? job_.n - first : 16;
        for (int64_t v = 0; v < vectors; ++v) {
            __m512 sum = _mm512_add_ps(_mm512_castsi512_ps(tile[v]), bias);
            _mm256_mask_storeu_epi16(job_.y + (first + v) * job_.weight.rows + row, here, (__m256i)_mm512_cvtneps_pbh(sum));
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
    return in_parallel(job.weight.rows, threads, [&](int64_t first, int64_t last) {
        static thread_local Scratch pieces;
        static thread_local Scratch sums;
        bf16* piece = pieces.get<bf16>(2 * plan.piece());
        float* sum = sums.get<float>(plan.sums());
        if (!piece || !sum) return false;
        Tiles tiles;
        Worker<LINES>(job, plan, x, piece, sum).rows(first, last);
        return true;
    });
}

}  // namespace pst::amx
