// The tile registers of Intel AMX: whether a process may use them, and their shapes.
//
// Layout: a TileConfig is the 64 bytes, aligned to a cache line, that LDTILECFG reads. Eight registers of 16 rows of 64 bytes
// belong to a thread from LDTILECFG to TILERELEASE; releasing them lets the system save less at a context switch.
// Linux gives a process their 8 KiB of state only after a request, which holds for all its threads and may be repeated.
#pragma once

#include <sys/syscall.h>
#include <unistd.h>

#include "common.hpp"

namespace pst {

// Bits of edx in leaf 7 of cpuid: products of tiles.
constexpr int AMX_BF16 = 22;
constexpr int AMX_INT8 = 25;

// Whether this processor has tiles and these products, and Linux lets the process use them, after asking once.
inline bool may_use_tiles(int products) {
    constexpr long ARCH_REQ_XCOMP_PERM = 0x1023;
    constexpr long XFEATURE_XTILEDATA = 18;
    constexpr int AMX_TILE = 24;
    unsigned eax;
    unsigned ebx;
    unsigned ecx;
    unsigned edx = 0;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
    if (!(edx >> AMX_TILE & edx >> products & 1)) return false;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}

// Palette 1: eight tiles of up to 16 rows of 64 bytes. Unused tiles have neither.
struct alignas(64) TileConfig {
    uint8_t palette = 1;
    uint8_t start_row = 0;
    uint8_t reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
};

}  // namespace pst
