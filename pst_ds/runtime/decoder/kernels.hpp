// Products, attention and what lies between them, for each instruction set; functions(level) has those of one.
#pragma once

#include <cmath>

#include "activations.hpp"

namespace pst::decoder_portable {
constexpr bool WORDS_FIRST = false;
#include "../lanes/portable.hpp"
#include "portable.hpp"
#include "attention.hpp"
#include "glue.hpp"
}  // namespace pst::decoder_portable

#if PST_X86
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace pst::decoder_avx2 {
constexpr bool WORDS_FIRST = false;
#include "../lanes/avx2.hpp"
#include "avx2.hpp"
#include "attention.hpp"
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
#include "attention.hpp"
#include "glue.hpp"
}  // namespace pst::decoder_avx_vnni
#pragma GCC pop_options
#undef PST_AVX_VNNI
#endif

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi2,popcnt,fma")
namespace pst::decoder_avx512 {
constexpr bool WORDS_FIRST = true;
#include "../lanes/avx512.hpp"
#include "avx512.hpp"
#include "attention.hpp"
#include "glue.hpp"
}  // namespace pst::decoder_avx512
#pragma GCC pop_options
#endif

namespace pst {

constexpr int PORTABLE = 0, AVX2 = 1, AVX_VNNI = 2, AVX512 = 3, LEVELS = 4;

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
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi2");
#endif
    return false;
}

inline int best_level() {
    int level = LEVELS - 1;
    while (!supports(level)) --level;
    return level;
}

// Of a level that is supported.
inline const Functions& functions(int level) {
#if PST_X86
#if PST_COMPILES_AVX_VNNI
    static const Functions avx_vnni = decoder_avx_vnni::table("avx_vnni");
#else
    static const Functions avx_vnni{};
#endif
    static const Functions tables[LEVELS] = {decoder_portable::table("portable"), decoder_avx2::table("avx2"), avx_vnni,
                                             decoder_avx512::table("avx512")};
    return tables[level];
#else
    static const Functions table = decoder_portable::table("portable");
    return table;
#endif
}

}  // namespace pst
