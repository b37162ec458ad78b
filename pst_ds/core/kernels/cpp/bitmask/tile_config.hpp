// The tile registers of Intel AMX: whether a process may use them, and their shapes.
#pragma once

#include <sys/syscall.h>
#include <unistd.h>

#include "common.hpp"

namespace pst {

// Bits of edx in leaf 7 of cpuid: products of tiles.
constexpr int AMX_BF16 = 22, AMX_INT8 = 25;

// Whether this processor has tiles and these products, and Linux lets the process use them, after asking once.
inline bool may_use_tiles(int products) {
    constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    constexpr int AMX_TILE = 24;
    unsigned a, b, c, d = 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> AMX_TILE & d >> products & 1)) return false;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}

// Palette 1: eight tiles of up to 16 rows of 64 bytes. Unused tiles have neither.
struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
};

}  // namespace pst
