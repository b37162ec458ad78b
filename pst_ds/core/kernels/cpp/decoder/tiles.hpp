// The tile registers of Intel AMX and their products of bytes; a product adds, for 16 rows of x and 16 columns of codes,
//   sums[row][column] += sum over 4 i + j of  x[row][4 i + j] * codes[i][4 column + j]      x signed or not, codes signed
//
// A register has up to 16 rows of up to 64 bytes, as its TileConfig says; loads read rows `stride` bytes apart, without
// an alignment; sums are int32, which wrap around. Registers belong to a thread while a Tiles object exists.
//
// Where PST_PRETENDED_TILES is 1 the registers are arrays, so that tests run these kernels on any processor.
// Included inside a region that is compiled for AMX.
#pragma once

#include "../bitmask/tile_config.hpp"

namespace pst {

#if PST_PRETENDED_TILES

// What the processor answers with a fault ends the process.
class Tiles {
   public:
    static bool available() { return true; }

    explicit Tiles(const TileConfig& config) : config_(config) {
        for (int t = 0; t < 8; ++t)
            require(config.rows[t] <= 16 && config.bytes[t] <= 64 && (config.rows[t] > 0) == (config.bytes[t] > 0));
    }

    template <int T> void clear() { at<T>() = {}; }
    template <int T> void load(const void* from, int64_t stride) {
        Register& tile = at<T>() = {};
        for (int r = 0; r < config_.rows[T]; ++r)
            std::memcpy(tile.bytes[r], static_cast<const uint8_t*>(from) + r * stride, config_.bytes[T]);
    }
    template <int T> void store(int32_t* to) {
        const Register& tile = at<T>();
        for (int r = 0; r < config_.rows[T]; ++r) std::memcpy(to + 16 * r, tile.bytes[r], config_.bytes[T]);
    }
    template <bool SIGNED, int SUMS, int X, int CODES> void add_product() {
        Register& sums = at<SUMS>();
        const Register& x = at<X>();
        const Register& codes = at<CODES>();
        require(config_.rows[SUMS] == config_.rows[X] && config_.bytes[SUMS] == config_.bytes[CODES] &&
                config_.bytes[X] == 4 * config_.rows[CODES]);
        for (int row = 0; row < config_.rows[SUMS]; ++row)
            for (int column = 0; column < config_.bytes[SUMS] / 4; ++column) {
                uint32_t sum;
                std::memcpy(&sum, sums.bytes[row] + 4 * column, 4);
                for (int i = 0; i < config_.bytes[X]; ++i) {
                    const int number = SIGNED ? int8_t(x.bytes[row][i]) : x.bytes[row][i];
                    sum += uint32_t(number * int8_t(codes.bytes[i / 4][4 * column + i % 4]));
                }
                std::memcpy(sums.bytes[row] + 4 * column, &sum, 4);
            }
    }

   private:
    struct Register {
        uint8_t bytes[16][64];
    };
    static void require(bool holds) {
        if (!holds) std::abort();
    }
    template <int T> Register& at() {
        require(config_.rows[T] > 0);
        return registers_[T];
    }
    TileConfig config_;
    Register registers_[8] = {};
};

#else

// The registers of this thread, for the lifetime of the object. The compiler's intrinsics take a register number as
// text, which a template argument is not, and GCC 12 does not declare that a load reads memory.
class Tiles {
   public:
    static bool available() { return may_use_tiles(AMX_INT8); }

    explicit Tiles(const TileConfig& config) { _tile_loadconfig(&config); }
    ~Tiles() { _tile_release(); }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;

    template <int T> void clear() { asm volatile("tilezero %%tmm%c0" : : "i"(T)); }
    template <int T> void load(const void* from, int64_t stride) {
        asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(T) : "memory");
    }
    template <int T> void store(int32_t* to) {
        asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(int64_t(64)), "i"(T) : "memory");
    }
    template <bool SIGNED, int SUMS, int X, int CODES> void add_product() {
        if (SIGNED) asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(SUMS), "i"(X), "i"(CODES));
        else asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(SUMS), "i"(X), "i"(CODES));
    }
};

#endif

}  // namespace pst
