// Packing to the layout WORDS.
#pragma once

#include "codes.hpp"
#include "parallel.hpp"

namespace pst {

namespace words_plain {
#define PST_WIDE 0
#include "word_loops.hpp"
#undef PST_WIDE
}  // namespace words_plain

// PST_PLAIN_PACKING: a build for tests.
#if PST_X86 && !PST_PLAIN_PACKING
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512vbmi2,popcnt")
namespace words_wide {
#define PST_WIDE 1
#include "word_loops.hpp"
#undef PST_WIDE
}  // namespace words_wide
#pragma GCC pop_options
#endif

inline bool packs_words_wide() {
#if PST_X86 && !PST_PLAIN_PACKING
    static const bool wide = [] {
        __builtin_cpu_init();
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("popcnt");
    }();
    return wide;
#else
    return false;
#endif
}

// A word is 4 columns of 16 rows. 4-bit codes + 8: a word in the lower halves of bytes, the next in the upper. Two passes,
// so that codes are written once, to their place: the first writes masks, from which the place of each block follows.
inline void pack_words(Matrix& m, const Codes& from) {
    auto* masks_of = words_plain::pack_masks;
    auto* codes_of = words_plain::pack_codes;
#if PST_X86 && !PST_PLAIN_PACKING
    if (packs_words_wide()) {
        masks_of = words_wide::pack_masks;
        codes_of = words_wide::pack_codes;
    }
#endif
    const int64_t blocks = m.blocks();
    const int64_t words = m.has_bits ? m.words() * m.word / 4 : 0;  // masks of a block
    m.masks = InHugePages<uint64_t>(size_t(blocks * words), CODE_PADDING);
    m.list_vectors.resize(size_t(blocks));
    m.first_byte.resize(size_t(blocks + 1));
    uint64_t* const masks = m.masks.writable();
    in_parallel_blocks(blocks, from.threads, [&](int64_t block) {
        m.first_byte[size_t(block + 1)] =
            masks_of(m, from, block, masks + block * words, &m.list_vectors[size_t(block)]);
    });
    for (int64_t block = 0; block < blocks; ++block) m.first_byte[size_t(block + 1)] += m.first_byte[size_t(block)];
    m.data = InHugePages<uint8_t>(size_t(m.first_byte.back()), CODE_PADDING);
    uint8_t* const data = m.data.writable();
    in_parallel_blocks(blocks, from.threads, [&](int64_t block) {
        codes_of(m, from, block, masks + block * words, data + m.first_byte[size_t(block)],
                 data + m.first_byte[size_t(block + 1)]);
    });
}

}  // namespace pst
