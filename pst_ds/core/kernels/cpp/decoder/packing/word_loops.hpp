// Loops of pack_words. Included by words.hpp once per instruction set, inside a region compiled for it; PST_WIDE is 1
// for AVX-512 with VBMI2. All sets write the same bytes.
//
// A tile is 16 rows of 64 columns, of 16 words: word w has the columns 4 w .. 4 w + 3 of all rows.

constexpr int64_t TILE_WORDS = WORD / 4;

// The rows of a tile from `column` on. Rows and columns that do not exist are zeros in `copies`.
struct TileRows {
    const int8_t* row[WORD_ROWS];
    int8_t copies[WORD_ROWS][WORD];

    TileRows(const Codes& from, int64_t first, int64_t column) {
        const int64_t columns = std::min(WORD, from.columns - column);
        for (int64_t i = 0; i < WORD_ROWS; ++i) {
            const int8_t* codes = first + i < from.rows ? from.codes + (first + i) * from.columns + column : nullptr;
            row[i] = codes;
            if (codes && columns == WORD) continue;
            std::memset(copies[i], 0, WORD);
            if (codes) std::memcpy(copies[i], codes, size_t(columns));
            row[i] = copies[i];
        }
    }
};

#if PST_WIDE

struct Tile {
    __m512i word[TILE_WORDS];
    int kept[WORD_ROWS];  // codes of each row

    explicit Tile(const TileRows& rows) {
        __m512i a[16];
        __m512i b[16];
        for (int i = 0; i < 16; ++i) {
            a[i] = _mm512_loadu_si512(rows.row[i]);
            kept[i] = int(_mm_popcnt_u64(_mm512_test_epi8_mask(a[i], a[i])));
        }
        // 16 x 16 numbers of 4 bytes are transposed: within lanes of 16 bytes, then between lanes
        for (int i = 0; i < 16; i += 2) {
            b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
            b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
        }
        for (int i = 0; i < 16; i += 4) {  // a[i + j] has the numbers j, j + 4, j + 8, j + 12 of the rows i .. i + 3
            a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
            a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
            a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
            a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
        }
        for (int j = 0; j < 4; ++j) {
            const __m512i first = _mm512_shuffle_i32x4(a[j], a[j + 4], 0x44);  // numbers j, j + 4 of 8 rows
            const __m512i second = _mm512_shuffle_i32x4(a[j], a[j + 4], 0xee);
            const __m512i third = _mm512_shuffle_i32x4(a[j + 8], a[j + 12], 0x44);
            const __m512i fourth = _mm512_shuffle_i32x4(a[j + 8], a[j + 12], 0xee);
            word[j] = _mm512_shuffle_i32x4(first, third, 0x88);
            word[j + 4] = _mm512_shuffle_i32x4(first, third, 0xdd);
            word[j + 8] = _mm512_shuffle_i32x4(second, fourth, 0x88);
            word[j + 12] = _mm512_shuffle_i32x4(second, fourth, 0xdd);
        }
    }

    uint64_t mask(int64_t w) const { return _mm512_test_epi8_mask(word[w], word[w]); }

    // Write the codes of a word that have a bit, in order. A store of 64 bytes ends before `end`.
    uint8_t* put(int64_t w, uint64_t bits, uint8_t* to, const uint8_t* end) const {
        return store(_mm512_maskz_compress_epi8(bits, word[w]), int(_mm_popcnt_u64(bits)), to, end);
    }

    // The same for two words of 4-bit codes, in the lower and the upper halves of bytes: codes + 8, whose lowest 4 bits
    // are those of code ^ 8.
    uint8_t* put_two(int64_t w, uint64_t low, uint64_t high, uint8_t* to, const uint8_t* end) const {
        const __m512i halves = _mm512_set1_epi8(15);
        const __m512i lower = _mm512_and_si512(_mm512_maskz_compress_epi8(low, word[w]), halves);
        const __m512i upper = _mm512_and_si512(_mm512_maskz_compress_epi8(high, word[w + 1]), halves);
        const __m512i both = _mm512_or_si512(lower, _mm512_slli_epi16(upper, 4));
        const int count = int(std::max(_mm_popcnt_u64(low), _mm_popcnt_u64(high)));
        return store(_mm512_xor_si512(both, _mm512_set1_epi8(char(0x88))), count, to, end);
    }

    static uint8_t* store(__m512i bytes, int count, uint8_t* to, const uint8_t* end) {
        if (end - to >= 64)
            _mm512_storeu_si512(to, bytes);  // the bytes behind the codes are overwritten by the next words
        else
            _mm512_mask_storeu_epi8(to, count < 64 ? (uint64_t(1) << count) - 1 : ~uint64_t(0), bytes);
        return to + count;
    }
};

#else

struct Tile {
    uint8_t word[TILE_WORDS][64];
    int kept[WORD_ROWS];

    explicit Tile(const TileRows& rows) {
        for (int64_t i = 0; i < WORD_ROWS; ++i) {
            kept[i] = 0;
            for (int64_t j = 0; j < WORD; ++j) kept[i] += rows.row[i][j] != 0;
            for (int64_t w = 0; w < TILE_WORDS; ++w) std::memcpy(word[w] + 4 * i, rows.row[i] + 4 * w, 4);
        }
    }

    uint64_t mask(int64_t w) const {
        uint64_t bits = 0;
        for (int64_t i = 0; i < 64; ++i) bits |= uint64_t(word[w][i] != 0) << i;
        return bits;
    }

    static int64_t compress(const uint8_t* codes, uint64_t bits, uint8_t* to) {
        int64_t count = 0;
        for (int64_t i = 0; i < 64; ++i) {  // without a branch, which would be mispredicted
            to[count] = codes[i];
            count += bits >> i & 1;
        }
        return count;
    }

    uint8_t* put(int64_t w, uint64_t bits, uint8_t* to, const uint8_t*) const {
        uint8_t codes[64];
        const int64_t count = compress(word[w], bits, codes);
        std::memcpy(to, codes, size_t(count));
        return to + count;
    }

    uint8_t* put_two(int64_t w, uint64_t low, uint64_t high, uint8_t* to, const uint8_t*) const {
        uint8_t lower[64];
        uint8_t upper[64];
        const int64_t lowers = compress(word[w], low, lower);
        const int64_t uppers = compress(word[w + 1], high, upper);
        const int64_t count = std::max(lowers, uppers);
        for (int64_t i = 0; i < count; ++i)
            to[i] = nibbles(i < lowers ? lower[i] + 8 : 8, i < uppers ? upper[i] + 8 : 8);
        return to + count;
    }
};

#endif

// Write what a block has besides codes: `masks` if the matrix has bits, and `list_vectors`. Returns the bytes of its codes.
inline int64_t pack_masks(const Matrix& m, const Codes& from, int64_t block, uint64_t* masks, int32_t* list_vectors) {
    const int64_t first = block * WORD_ROWS;
    *list_vectors = 0;
    const int64_t words = m.words() * m.word / 4;
    if (!m.has_bits) return words * (m.bits == 4 ? 32 : 64);
    int64_t bytes = 0;
    for (int64_t w = 0; w < words; w += TILE_WORDS) {
        const Tile tile(TileRows(from, first, 4 * w));
        *list_vectors += (*std::max_element(tile.kept, tile.kept + WORD_ROWS) + 3) / 4;
        const int64_t count = std::min(TILE_WORDS, words - w);
        for (int64_t i = 0; i < count; ++i) masks[w + i] = tile.mask(i);
        for (int64_t i = 0; m.bits == 4 && i < count; i += 2)
            bytes += std::max(__builtin_popcountll(masks[w + i]), __builtin_popcountll(masks[w + i + 1]));
        for (int64_t i = 0; m.bits != 4 && i < count; ++i) bytes += __builtin_popcountll(masks[w + i]);
    }
    return bytes;
}

// Write the codes of a block to the bytes from `to` to `end`, which are as many as pack_masks has returned.
inline void pack_codes(const Matrix& m, const Codes& from, int64_t block, const uint64_t* masks, uint8_t* to,
                       const uint8_t* end) {
    const int64_t words = m.words() * m.word / 4;
    const auto bits = [&](int64_t w) { return m.has_bits ? masks[w] : ~uint64_t(0); };
    for (int64_t w = 0; w < words; w += TILE_WORDS) {
        const Tile tile(TileRows(from, block * WORD_ROWS, 4 * w));
        const int64_t count = std::min(TILE_WORDS, words - w);
        for (int64_t i = 0; m.bits == 4 && i < count; i += 2) to = tile.put_two(i, bits(w + i), bits(w + i + 1), to, end);
        for (int64_t i = 0; m.bits != 4 && i < count; ++i) to = tile.put(i, bits(w + i), to, end);
    }
}
