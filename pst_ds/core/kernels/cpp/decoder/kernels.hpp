// The kernels (products, attention, updates and the operations between them) of each instruction set; functions(level)
// returns one set.
//
// The same files are included once per instruction set, in a namespace and a region compiled for it, in the order in
// which they need each other: lanes, products with codes, attention, updates, glue. WORDS_FIRST says which layout of
// matrix.hpp the products of a set read. Each set is a table of function pointers (Functions): code that is compiled for
// instructions which the processor lacks is never called, because only supports(level) leads to its table.
#pragma once

#include <cmath>
#include <cstdlib>

#include "activations.hpp"
#if PST_COMPILES_TILES
#include "../bitmask/tile_config.hpp"
#endif

namespace pst::decoder_portable {
constexpr bool WORDS_FIRST = false;
#include "../lanes/portable.hpp"
#include "portable.hpp"
#include "attention.hpp"
#include "update.hpp"
#include "glue.hpp"
}  // namespace pst::decoder_portable

#if PST_X86
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace pst::decoder_avx2 {
constexpr bool WORDS_FIRST = false;
#include "../lanes/avx2.hpp"
#include "avx2.hpp"
#include "vectors.hpp"
#include "attention.hpp"
#include "update.hpp"
#include "glue.hpp"
}  // namespace pst::decoder_avx2
#pragma GCC pop_options

#if PST_COMPILES_AVX_VNNI
#define PST_AVX_VNNI
#pragma GCC push_options
#pragma GCC target("avx2,fma,avxvnni")
namespace pst::decoder_avx_vnni {
constexpr bool WORDS_FIRST = false;
#include "../lanes/avx2.hpp"
#include "avx2.hpp"
#include "vectors.hpp"
#include "attention.hpp"
#include "update.hpp"
#include "glue.hpp"
}  // namespace pst::decoder_avx_vnni
#pragma GCC pop_options
#undef PST_AVX_VNNI
#endif

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,avx512vbmi2,popcnt,fma")
namespace pst::decoder_avx512 {
constexpr bool WORDS_FIRST = true;
#include "../lanes/avx512.hpp"
#include "avx512.hpp"
#include "attention.hpp"
#include "update.hpp"
#include "glue.hpp"
}  // namespace pst::decoder_avx512

#if PST_COMPILES_TILES
#if !PST_PRETENDED_TILES
#pragma GCC target("amx-tile,amx-int8")
#endif
#include "tiles.hpp"
namespace pst::decoder_avx512 {
#include "amx.hpp"
}  // namespace pst::decoder_avx512
#endif
#pragma GCC pop_options
#endif

#if PST_COMPILES_DOTPROD
#include "arm.hpp"
#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+dotprod")
namespace pst::decoder_neon_dotprod {
constexpr bool WORDS_FIRST = false;
#include "../lanes/neon.hpp"
#include "neon.hpp"
#include "vectors.hpp"
#include "attention.hpp"
#include "update.hpp"
#include "glue.hpp"
}  // namespace pst::decoder_neon_dotprod
#pragma GCC pop_options
#endif

#if PST_COMPILES_I8MM
#define PST_I8MM
#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+dotprod+i8mm")
namespace pst::decoder_neon_i8mm {
constexpr bool WORDS_FIRST = false;
#include "../lanes/neon.hpp"
#include "neon.hpp"
#include "vectors.hpp"
#include "attention.hpp"
#include "update.hpp"
#include "glue.hpp"
}  // namespace pst::decoder_neon_i8mm
#pragma GCC pop_options
#undef PST_I8MM
#endif

namespace pst {

// The best of a kind of processor comes last.
constexpr int PORTABLE = 0;
constexpr int AVX2 = 1;
constexpr int AVX_VNNI = 2;
constexpr int AVX512 = 3;
constexpr int AMX = 4;
constexpr int NEON_DOTPROD = 5;
constexpr int NEON_I8MM = 6;
constexpr int LEVELS = 7;
constexpr const char* NAMES[LEVELS] = {"portable", "avx2", "avx_vnni", "avx512", "amx", "neon_dotprod", "neon_i8mm"};

inline bool supports(int level) {
    if (level == PORTABLE) return true;
#if PST_X86
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (level == AVX2) return avx2;
#if PST_COMPILES_AVX_VNNI
    if (level == AVX_VNNI) return avx2 && __builtin_cpu_supports("avxvnni");
#endif
    if (level == AVX512)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi") &&
               __builtin_cpu_supports("avx512vbmi2");
#if PST_COMPILES_TILES
    if (level == AMX) {
        using namespace decoder_avx512;
        static const bool holds = supports(AVX512) && Tiles::available() && tiles_hold<false>() && tiles_hold<true>();
        return holds;
    }
#endif
#endif
#if PST_COMPILES_DOTPROD
    if (level == NEON_DOTPROD) return has_dotprod();
#endif
#if PST_COMPILES_I8MM
    if (level == NEON_I8MM) return has_dotprod() && has_i8mm();
#endif
    return false;
}

// The level that PST_DS_INSTRUCTIONS names, if it is supported; otherwise -1.
inline int asked_level() {
    const char* asked = std::getenv("PST_DS_INSTRUCTIONS");
    for (int level = 0; asked && level < LEVELS; ++level)
        if (!std::strcmp(asked, NAMES[level]) && supports(level)) return level;
    return -1;
}

// The level that was asked for, or the best. AMX multiplies only as many vectors as gain by it (LEAST_VECTORS), and leaves
// the others to AVX-512.
inline int best_level() {
    static const int best = [] {
        if (asked_level() >= 0) return asked_level();
        int level = LEVELS - 1;
        while (!supports(level)) --level;
        return level;
    }();
    return best;
}

// A table is created on first use, because creating it may execute instructions of its level.
template <Functions (*MAKE)()> inline const Functions& made() {
    static const Functions found = MAKE();
    return found;
}

// Requires a supported level.
inline const Functions& functions(int level) {
    switch (level) {
#if PST_X86
        case AVX2: return made<decoder_avx2::table>();
#if PST_COMPILES_AVX_VNNI
        case AVX_VNNI: return made<decoder_avx_vnni::table>();
#endif
        case AVX512: return made<decoder_avx512::table>();
#if PST_COMPILES_TILES
        case AMX: return made<decoder_avx512::tile_table>();
#endif
#endif
#if PST_COMPILES_DOTPROD
        case NEON_DOTPROD: return made<decoder_neon_dotprod::table>();
#endif
#if PST_COMPILES_I8MM
        case NEON_I8MM: return made<decoder_neon_i8mm::table>();
#endif
        default: return made<decoder_portable::table>();
    }
}

}  // namespace pst
