// Products with codes for AVX-512 with VBMI2 and VNNI: a word of mask bits expands 4 columns of 16 rows. q is read in two
// planes of bytes, q = 256 * high + low, with `high` signed and `low` unsigned.
//
// Layout
//   codes   layout WORDS of matrix.hpp: per block of 16 rows the kept codes of 4 columns at a time, and 64 mask bits
//   vector  64 bytes [16 rows][4 columns]: the operand of vpdpbusd, which adds 4 products to each of 16 int32 sums
//   panel   a block with its zeros, [column / 4][row][column % 4], panel_bytes() bytes in memory of a thread
//   list    only the kept codes of a block, per 64 columns: vectors of codes, then as many vectors of their columns
//   q       low and high planes of bytes of Activations, `stride` apart
// Loads are unaligned; up to CODE_PADDING bytes are read past the codes and PADDING past a vector.
//
// vpdpbusd multiplies unsigned bytes with signed ones. The low plane is unsigned, so its codes are signed; the high plane is
// signed, so its codes are unsigned: code + 128, or code + 8 of 4-bit codes, which are 0 .. 15 and serve as either. What
// this adds to a sum depends on the vector only, not on the row (excess_of in glue.hpp): nothing is read for it from memory
// besides the weights, as row sums would be.
//
// All sums are integers modulo 2^32 and the exact ones fit, so the order of their terms is free; floats are added chunk by
// chunk (with_planes). Hence few_vectors, panel_rows, listed_rows and the kernels of AMX return the same bits, for any number
// of tokens.

constexpr int64_t AHEAD = 4096;  // bytes to prefetch

inline __m512i bytes_at(const uint8_t* from) {
    __m512i bytes = _mm512_loadu_si512(from);
    asm("" : "+v"(bytes));  // keeps it in a register: as a memory operand the expansion would take twice as long
    return bytes;
}

// sum + 4 products each of unsigned bytes with signed ones.
inline __m512i dot(__m512i sum, __m512i unsigned_bytes, __m512i signed_bytes) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(unsigned_bytes), "v"(signed_bytes));
    return sum;
}

// dot with 4 signed bytes in memory for all rows: the instruction broadcasts them itself, which it cannot do with the
// unsigned operand.
inline __m512i dot_all(__m512i sum, __m512i unsigned_bytes, const uint8_t* four) {
    typedef int32_t Four __attribute__((may_alias, aligned(1)));
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(unsigned_bytes), "m"(*reinterpret_cast<const Four*>(four)));
    return sum;
}

// Codes as Codes16 returns them: 8 bits signed, 4 bits + 8. In the forms that products need:
template <int BITS> inline __m512i signed_codes(__m512i codes) {
    return BITS == 8 ? codes : _mm512_sub_epi8(codes, _mm512_set1_epi8(8));
}
template <int BITS> inline __m512i codes_plus_128(__m512i codes) {
    return BITS == 8 ? _mm512_xor_si512(codes, _mm512_set1_epi8(char(0x80))) : _mm512_add_epi8(codes, _mm512_set1_epi8(120));
}
template <int BITS> inline __m512i codes_for_high(__m512i codes) { return BITS == 8 ? codes_plus_128<8>(codes) : codes; }

// The codes of a block in the order of their columns.
template <int BITS, bool MASKED> struct Codes16 {
    const uint8_t* data;
    const uint64_t* masks;
    Codes16(const Matrix& m, int64_t block)
        : data(m.data.data() + m.first_byte[size_t(block)]), masks(m.masks.data() + (MASKED ? block * m.words() * m.word / 4 : 0)) {}

    // The next 16 columns, each vector [row][column]: signed codes of 8 bits, 4-bit codes + 8. The code is 0 where pruned.
    void next(__m512i (&codes)[4]) {
#pragma GCC unroll 4
        for (int line = 0; line < (MASKED ? BITS / 4 : BITS / 2); ++line)  // half of the codes have as many
            _mm_prefetch(reinterpret_cast<const char*>(data) + AHEAD + 64 * line, _MM_HINT_T0);
        if (BITS == 8) {
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                codes[i] = expanded(bytes_at(data), i);
                data += count(i);
            }
        } else {
            const __m512i fifteen = _mm512_set1_epi8(15);
#pragma GCC unroll 2
            for (int i = 0; i < 4; i += 2) {
                const __m512i both = bytes_at(data);
                codes[i] = expanded(_mm512_and_si512(both, fifteen), i);
                codes[i + 1] = expanded(_mm512_and_si512(_mm512_srli_epi16(both, 4), fifteen), i + 1);
                data += std::max(count(i), count(i + 1));
            }
        }
        if (MASKED) masks += 4;
    }

   private:
    __m512i expanded(__m512i kept, int i) const {
        if (!MASKED) return kept;
        return BITS == 8 ? _mm512_maskz_expand_epi8(masks[i], kept) : _mm512_mask_expand_epi8(_mm512_set1_epi8(8), masks[i], kept);
    }
    int count(int i) const { return MASKED ? __builtin_popcountll(masks[i]) : 64; }
};

inline __m512 scales_at(const uint16_t* scales) {
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}
inline __m512 scales_of(const Matrix& m, int64_t block, int64_t chunk) {
    return scales_at(m.scales.data() + (block * m.chunks() + chunk) * WORD_ROWS);
}

inline __m512i four_columns(const uint8_t* x) {
    int32_t four;
    std::memcpy(&four, x, 4);
    return _mm512_set1_epi32(four);
}

// total + the contribution of a chunk of 16 rows to a vector: its sums with the high and the low plane, and by how much
// both together exceed the exact sum.
inline __m512 with_planes(__m512 total, __m512i high, __m512i low, __m512i excess, __m512 scales, float x_scale) {
    const __m512i sum = _mm512_sub_epi32(_mm512_add_epi32(_mm512_slli_epi32(high, 8), low), excess);
    return _mm512_add_ps(total, _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_mul_ps(scales, _mm512_set1_ps(x_scale))));
}

// Store a block of rows for TOKENS vectors, with the job's bias and activation.
template <int TOKENS> inline void store_block(const ProductJob& job, int64_t block, int64_t token, const __m512* total) {
    const int64_t first = block * WORD_ROWS;
    const int64_t left = job.m.rows - first;
    const __mmask16 rows = left >= WORD_ROWS ? 0xffff : __mmask16((1 << left) - 1);
    const __m512 bias = job.bias ? _mm512_maskz_loadu_ps(rows, job.bias + first) : _mm512_setzero_ps();
    float* y = job.y + token * job.y_width + first;
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; ++t) {
        __m512 value = job.bias ? _mm512_add_ps(total[t], bias) : total[t];
        if (job.activation != NONE) value = (__m512)activate(job.activation, (Floats)value);
        _mm512_mask_storeu_ps(y + t * job.y_width, rows, value);
    }
}

// A few vectors with blocks, whose codes are expanded in registers: those of the next columns while these are multiplied.
template <int BITS, bool MASKED, int TOKENS> inline void few_vectors(const ProductJob& job) {
    constexpr int CHAINS = TOKENS == 1 ? 4 : TOKENS <= 3 ? 2 : 1;  // independent sums hide the latency of products
    const Matrix& m = job.m;
    const int64_t chunks = m.chunks();
    const int64_t columns = m.words() * m.word;
    const int64_t high = job.q.high_of(0) - job.q.low_of(0);
    const uint8_t* x[TOKENS];
    for (int t = 0; t < TOKENS; ++t) x[t] = job.q.low_of(t);
    Codes16<BITS, MASKED> stream(m, job.first);
    __m512i next[4];
    stream.next(next);
    for (int64_t block = job.first; block < job.last; ++block) {
        __m512 total[TOKENS];
        for (__m512& sum : total) sum = _mm512_setzero_ps();
        for (int64_t c = 0; c < chunks; ++c) {
            __m512i h[TOKENS][CHAINS];
            __m512i l[TOKENS][CHAINS];
#pragma GCC unroll 8
            for (int t = 0; t < TOKENS; ++t)
#pragma GCC unroll 4
                for (int i = 0; i < CHAINS; ++i) h[t][i] = l[t][i] = _mm512_setzero_si512();
            const int64_t end = c + 1 == chunks ? columns : (c + 1) * m.chunk;
            for (int64_t column = c * m.chunk; column < end; column += 16) {
                const __m512i codes[4] = {next[0], next[1], next[2], next[3]};
                stream.next(next);
#pragma GCC unroll 4
                for (int i = 0; i < 4; ++i) {
                    const __m512i for_high = codes_for_high<BITS>(codes[i]);
#pragma GCC unroll 8
                    for (int t = 0; t < TOKENS; ++t) {
                        const uint8_t* at = x[t] + column + 4 * i;
                        h[t][i % CHAINS] = dot_all(h[t][i % CHAINS], for_high, at + high);
                        l[t][i % CHAINS] = dot(l[t][i % CHAINS], four_columns(at), codes[i]);
                    }
                }
            }
            const __m512 scales = scales_of(m, block, c);
#pragma GCC unroll 8
            for (int t = 0; t < TOKENS; ++t) {
#pragma GCC unroll 4
                for (int i = 1; i < CHAINS; ++i) {
                    h[t][0] = _mm512_add_epi32(h[t][0], h[t][i]);
                    l[t][0] = _mm512_add_epi32(l[t][0], l[t][i]);
                }
                const __m512i excess = _mm512_set1_epi32(job.q.sums_of(t)[c]);
                total[t] = with_planes(total[t], h[t][0], l[t][0], excess, scales, job.q.scales_of(t)[c]);
            }
        }
        store_block<TOKENS>(job, block, 0, total);
    }
}

// Codes of a panel: as Codes16 returns them, signed, or + 128.
enum class Form { STREAM, SIGNED, PLUS_128 };

// Expand a block to panel[column / 4][row][column % 4].
template <int BITS, bool MASKED, Form FORM> inline void expand_16(const Matrix& m, int64_t block, uint8_t* panel) {
    Codes16<BITS, MASKED> stream(m, block);
    for (uint8_t* const end = panel + m.words() * m.word * 16; panel < end; panel += 256) {
        __m512i codes[4];
        stream.next(codes);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i)
            _mm512_storeu_si512(panel + 64 * i, FORM == Form::STREAM   ? codes[i]
                                                : FORM == Form::SIGNED ? signed_codes<BITS>(codes[i])
                                                                       : codes_plus_128<BITS>(codes[i]));
    }
}

// What the first tile of vectors prefetches while it computes: the codes of the next panels. Other tiles: what is near.
template <int PANELS> inline const uint8_t* after(const ProductJob& job, int64_t block, int64_t token) {
    return token ? job.room : job.m.data.data() + job.m.first_byte[size_t(block + PANELS)];
}
inline void fetch_next(const uint8_t* ahead, int64_t column) {
    _mm_prefetch(reinterpret_cast<const char*>(ahead) + 32 * column, _MM_HINT_T1);
    _mm_prefetch(reinterpret_cast<const char*>(ahead) + 32 * column + 64, _MM_HINT_T1);
}

// Vectors with PANELS times 16 expanded rows, from `block` on.
template <int BITS, int TOKENS, int PANELS> inline void panel_rows(const ProductJob& job, int64_t block, int64_t token) {
    const Matrix& m = job.m;
    const int64_t chunks = m.chunks();
    const int64_t columns = m.words() * m.word;
    const int64_t high = job.q.high_of(0) - job.q.low_of(0);
    const uint8_t* ahead = after<PANELS>(job, block, token);
    const uint8_t* x[TOKENS];
    for (int t = 0; t < TOKENS; ++t) x[t] = job.q.low_of(token + t);
    __m512 total[PANELS][TOKENS];
    for (auto& of_panel : total)
        for (__m512& sum : of_panel) sum = _mm512_setzero_ps();
    for (int64_t c = 0; c < chunks; ++c) {
        __m512i h[PANELS][TOKENS];
        __m512i l[PANELS][TOKENS];
#pragma GCC unroll 2
        for (int p = 0; p < PANELS; ++p)
#pragma GCC unroll 8
            for (int t = 0; t < TOKENS; ++t) h[p][t] = l[p][t] = _mm512_setzero_si512();
        const int64_t end = c + 1 == chunks ? columns : (c + 1) * m.chunk;
        for (int64_t i = c * m.chunk; i < end; i += 4) {
            __m512i codes[PANELS];
            __m512i for_high[PANELS];
            fetch_next(ahead, i);
#pragma GCC unroll 2
            for (int p = 0; p < PANELS; ++p) {
                codes[p] = _mm512_loadu_si512(job.room + p * job.panel + i * 16);
                for_high[p] = codes_for_high<BITS>(codes[p]);
            }
#pragma GCC unroll 8
            for (int t = 0; t < TOKENS; ++t) {
                const __m512i of_high = four_columns(x[t] + i + high);
                const __m512i of_low = four_columns(x[t] + i);
#pragma GCC unroll 2
                for (int p = 0; p < PANELS; ++p) {
                    h[p][t] = dot(h[p][t], for_high[p], of_high);
                    l[p][t] = dot(l[p][t], of_low, codes[p]);
                }
            }
        }
#pragma GCC unroll 2
        for (int p = 0; p < PANELS; ++p) {
            const __m512 scales = scales_of(m, block + p, c);
#pragma GCC unroll 8
            for (int t = 0; t < TOKENS; ++t) {
                const __m512i excess = _mm512_set1_epi32(job.q.sums_of(token + t)[c]);
                total[p][t] = with_planes(total[p][t], h[p][t], l[p][t], excess, scales, job.q.scales_of(token + t)[c]);
            }
        }
    }
    for (int p = 0; p < PANELS; ++p) store_block<TOKENS>(job, block + p, token, total[p]);
}

// Codes that the next blocks read, from memory or a far cache: they are fetched into the near one a little at a time, while
// all but the first vectors are multiplied.
struct CodesAhead {
    const uint8_t* next;
    const uint8_t* end;

    CodesAhead(const Matrix& m, int64_t block, int panels) {
        const int64_t last = std::min(m.blocks(), block + panels);
        next = m.data.data() + m.first_byte[size_t(block)];
        end = m.data.data() + m.first_byte[size_t(last)];
        if (!m.has_bits) return;
        const int64_t masks = m.words() * m.word / 4;
        for (const uint64_t* at = m.masks.data() + block * masks; at < m.masks.data() + last * masks; at += 8)
            _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T1);
    }
    void fetch() {
        if (next >= end) return;
#pragma GCC unroll 4
        for (int line = 0; line < 4; ++line) _mm_prefetch(reinterpret_cast<const char*>(next) + 64 * line, _MM_HINT_T1);
        next += 256;
    }
};

// Where byte_rows reads the unsigned codes of 4 columns, in increasing order: from expanded panels.
template <int PANELS> struct FromPanels {
    const uint8_t* codes;
    int64_t panel;
    CodesAhead& ahead;

    FromPanels(const ProductJob& job, int64_t, CodesAhead& ahead) : codes(job.room), panel(job.panel), ahead(ahead) {}
    void next(__m512i (&of_panel)[PANELS]) {
#pragma GCC unroll 2
        for (int p = 0; p < PANELS; ++p) of_panel[p] = _mm512_loadu_si512(codes + p * panel);
        codes += 64;
    }
    void fetch() { ahead.fetch(); }
};

// From blocks of masked 8-bit codes, which are expanded to panels for the following vectors while the first are multiplied:
// the expansion and the stores use other units of the processor than the products.
template <int PANELS> struct ExpandingPanels {
    uint8_t* codes;
    int64_t panel;
    const uint64_t* masks[PANELS];
    const uint8_t* data[PANELS];

    ExpandingPanels(const ProductJob& job, int64_t block, CodesAhead&) : codes(job.room), panel(job.panel) {
        const Matrix& m = job.m;
        for (int p = 0; p < PANELS; ++p) {
            masks[p] = m.masks.data() + (block + p) * m.words() * m.word / 4;
            data[p] = m.data.data() + m.first_byte[size_t(block + p)];
        }
    }
    void next(__m512i (&of_panel)[PANELS]) {
#pragma GCC unroll 2
        for (int p = 0; p < PANELS; ++p) {
            const uint64_t mask = *masks[p]++;
            of_panel[p] = _mm512_xor_si512(_mm512_maskz_expand_epi8(mask, bytes_at(data[p])), _mm512_set1_epi8(char(0x80)));
            data[p] += __builtin_popcountll(mask);
            _mm512_storeu_si512(codes + p * panel, of_panel[p]);
        }
        codes += 64;
    }
    // What 32 columns take, as in Codes16::next.
    void fetch() const {
#pragma GCC unroll 2
        for (int p = 0; p < PANELS; ++p)
#pragma GCC unroll 4
            for (int line = 0; line < 4; ++line) _mm_prefetch(reinterpret_cast<const char*>(data[p]) + AHEAD + 64 * line, _MM_HINT_T0);
    }
};

// The products of words [first, last) with PANELS times 16 rows, for vectors of bytes from `token` on. Codes are
// unsigned: each word's integers start with the correction for that. They are converted and scaled once per word. TOKENS
// times PANELS sums hide the latency of vpdpbusd; with the totals they are 24 registers at most, so that no loop spills.
template <int TOKENS, int PANELS, class Source>
__attribute__((always_inline)) inline void add_words(const ProductJob& job, int64_t token, int64_t first, int64_t last, int64_t words,
                                                     Source& source, __m512 (&total)[PANELS][TOKENS]) {
    const int64_t columns = job.m.word;
    const int64_t stride = job.q.stride;
    const float* scales = job.q.scales.data() + token * words;
    const int32_t* corrections = job.q.sums.data() + token * words;
    const uint8_t* x = job.q.low_of(token) + first * columns;
#pragma GCC unroll 2
    for (int p = 0; p < PANELS; ++p)
#pragma GCC unroll 8
        for (int t = 0; t < TOKENS; ++t) total[p][t] = _mm512_setzero_ps();
    for (int64_t word = first; word < last; ++word) {
        __m512i sum[PANELS][TOKENS];
#pragma GCC unroll 8
        for (int t = 0; t < TOKENS; ++t)
#pragma GCC unroll 2
            for (int p = 0; p < PANELS; ++p) sum[p][t] = _mm512_set1_epi32(corrections[t * words + word]);
        for (const uint8_t* const end = x + columns; x < end; x += 32) {
            source.fetch();
#pragma GCC unroll 8
            for (int i = 0; i < 32; i += 4) {
                __m512i of_panel[PANELS];
                source.next(of_panel);
#pragma GCC unroll 8
                for (int t = 0; t < TOKENS; ++t) {
                    const __m512i four = four_columns(x + t * stride + i);
#pragma GCC unroll 2
                    for (int p = 0; p < PANELS; ++p) sum[p][t] = dot(sum[p][t], of_panel[p], four);
                }
            }
        }
#pragma GCC unroll 8
        for (int t = 0; t < TOKENS; ++t) {
            const __m512 scale = _mm512_set1_ps(scales[t * words + word]);
#pragma GCC unroll 2
            for (int p = 0; p < PANELS; ++p) total[p][t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[p][t]), scale, total[p][t]);
        }
    }
}

// Vectors of bytes [token, end), TOKENS at a time, with PANELS times 16 rows from `block` on; end - token is a multiple of TOKENS.
template <int TOKENS, int PANELS, class Source = FromPanels<PANELS>>
inline void byte_rows(const ProductJob& job, int64_t block, int64_t token, int64_t end, CodesAhead& ahead) {
    const Matrix& m = job.m;
    const int64_t words = m.words();
    const int64_t chunks = m.chunks();
    const int64_t words_in_chunk = std::max<int64_t>(1, m.chunk / m.word);
    for (; token < end; token += TOKENS) {
        for (int t = 0; t < TOKENS; ++t)  // rows of y are far apart, and in no near cache
            for (int p = 0; p < PANELS; ++p) __builtin_prefetch(job.y + (token + t) * job.y_width + (block + p) * WORD_ROWS, 1);
        Source source(job, block, ahead);
        __m512 total[PANELS][TOKENS];
        if (chunks == 1) {
            add_words<TOKENS, PANELS>(job, token, 0, words, words, source, total);
#pragma GCC unroll 2
            for (int p = 0; p < PANELS; ++p) {
                const __m512 scales = scales_of(m, block + p, 0);
#pragma GCC unroll 8
                for (int t = 0; t < TOKENS; ++t) total[p][t] = _mm512_fmadd_ps(total[p][t], scales, _mm512_setzero_ps());
            }
        } else {
            for (auto& of_panel : total)
                for (__m512& sum : of_panel) sum = _mm512_setzero_ps();
            for (int64_t c = 0; c < chunks; ++c) {
                __m512 of_chunk[PANELS][TOKENS];
                const int64_t last = c + 1 == chunks ? words : (c + 1) * words_in_chunk;
                add_words<TOKENS, PANELS>(job, token, c * words_in_chunk, last, words, source, of_chunk);
                for (int p = 0; p < PANELS; ++p) {
                    const __m512 scales = scales_of(m, block + p, c);
                    for (int t = 0; t < TOKENS; ++t) total[p][t] = _mm512_fmadd_ps(of_chunk[p][t], scales, total[p][t]);
                }
            }
        }
#pragma GCC unroll 2
        for (int p = 0; p < PANELS; ++p) store_block<TOKENS>(job, block + p, token, total[p]);
    }
}

// All vectors of bytes, six or five at a time: with fewer, loads would take longer than products. Some of up to 19 remain.
template <int BITS, bool MASKED, int PANELS> inline void all_byte_rows(const ProductJob& job, int64_t block) {
    const int64_t tiles = (job.tokens + 5) / 6;
    const bool fills_tiles = job.tokens >= 5 * tiles;
    const int64_t sixes = fills_tiles ? job.tokens - 5 * tiles : job.tokens / 6;
    const int64_t end_of_fives = fills_tiles ? job.tokens : 6 * sixes;
    int64_t token = 0;
    CodesAhead ahead(job.m, std::min(block + PANELS, job.m.blocks()), PANELS);
    if (BITS == 8 && MASKED && sixes) {
        byte_rows<6, PANELS, ExpandingPanels<PANELS>>(job, block, 0, 6, ahead);
        token = 6;
    } else {
        for (int p = 0; p < PANELS; ++p) expand_16<BITS, MASKED, Form::PLUS_128>(job.m, block + p, job.room + p * job.panel);
    }
    byte_rows<6, PANELS>(job, block, token, 6 * sixes, ahead);
    byte_rows<5, PANELS>(job, block, 6 * sixes, end_of_fives, ahead);
    switch (job.tokens - end_of_fives) {
        case 4: byte_rows<4, PANELS>(job, block, end_of_fives, job.tokens, ahead); break;
        case 3: byte_rows<3, PANELS>(job, block, end_of_fives, job.tokens, ahead); break;
        case 2: byte_rows<2, PANELS>(job, block, end_of_fives, job.tokens, ahead); break;
        case 1: byte_rows<1, PANELS>(job, block, end_of_fives, job.tokens, ahead); break;
        default: break;
    }
}

// Vectors in tiles of equal sizes or nearly, of at most MOST: kernels[n - 1](job, block, token) for n vectors.
template <size_t MOST> inline void in_tiles(const ProductJob& job, int64_t block, void (*const (&kernels)[MOST])(const ProductJob&, int64_t, int64_t)) {
    for (int64_t tiles = (job.tokens + int64_t(MOST) - 1) / int64_t(MOST), i = 0; i < tiles; ++i) {
        const int64_t token = job.tokens * i / tiles;
        const int64_t end = job.tokens * (i + 1) / tiles;
        kernels[end - token - 1](job, block, token);
    }
}

// Transpose 16 x 16 words of 32 bits to memory.
inline void store_transposed(const __m512i (&a)[16], uint8_t* to) {
    __m512i t[16];
    __m512i u[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; ++j) {
            u[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
            u[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
        }
    for (int j = 0; j < 4; ++j) {
        const __m512i p = _mm512_shuffle_i32x4(u[j], u[4 + j], 0x88);
        const __m512i q = _mm512_shuffle_i32x4(u[8 + j], u[12 + j], 0x88);
        const __m512i r = _mm512_shuffle_i32x4(u[j], u[4 + j], 0xdd);
        const __m512i s = _mm512_shuffle_i32x4(u[8 + j], u[12 + j], 0xdd);
        _mm512_storeu_si512(to + 64 * j, _mm512_shuffle_i32x4(p, q, 0x88));
        _mm512_storeu_si512(to + 64 * (j + 4), _mm512_shuffle_i32x4(r, s, 0x88));
        _mm512_storeu_si512(to + 64 * (j + 8), _mm512_shuffle_i32x4(p, q, 0xdd));
        _mm512_storeu_si512(to + 64 * (j + 12), _mm512_shuffle_i32x4(r, s, 0xdd));
    }
}

// The parts of a thread's room that lists use: the list; vectors per 64 columns; for each chunk the sums of its 16 rows.
struct ListRoom {
    uint8_t* list;
    uint8_t* counts;
    uint8_t* row_sums;

    explicit ListRoom(const ProductJob& job)
        : list(job.room), counts(job.room + 2 * job.panel), row_sums(counts + round_up(job.m.words(), WORD)) {}
};

// List the kept codes of a block, signed. For each 64 columns: `counts` vectors of codes, 4 of each row, then as many of
// their columns; a row with fewer codes has zeros.
//
// Both planes are multiplied with signed codes here, because unsigned ones would add to a sum what depends on the places of
// the kept codes. So the high plane is read as high + 128, which adds 2^15 times the sum of a row's codes.
template <int BITS> inline void list_kept(const ProductJob& job, int64_t block) {
    const Matrix& m = job.m;
    const ListRoom room(job);
    const int64_t words_in_chunk = std::max<int64_t>(1, m.chunk / WORD);
    uint8_t* counts = room.counts;
    uint8_t* to = room.list;
    uint8_t* row_sums = room.row_sums;
    __m512i sums = _mm512_setzero_si512();
    alignas(64) uint8_t numbers[64];
    alignas(64) uint8_t rows[16 * 64];
    for (int i = 0; i < 64; ++i) numbers[i] = uint8_t(i);
    const __m512i columns = _mm512_load_si512(numbers);
    Codes16<BITS, true> stream(m, block);
    for (int64_t word = 0; word < m.words(); ++word) {
        __m512i codes[16];
        __m512i places[16];
        for (int i = 0; i < 16; i += 4) stream.next(*reinterpret_cast<__m512i(*)[4]>(codes + i));
        for (__m512i& of_columns : codes) {
            of_columns = signed_codes<BITS>(of_columns);
            sums = dot(sums, _mm512_set1_epi8(1), of_columns);
        }
        if (word + 1 == m.words() || (m.chunks() > 1 && (word + 1) % words_in_chunk == 0)) {
            _mm512_storeu_si512(row_sums, sums);
            row_sums += 64;
            sums = _mm512_setzero_si512();
        }
        store_transposed(codes, rows);
        int most = 0;
        for (int r = 0; r < 16; ++r) {
            const __m512i row = _mm512_load_si512(rows + 64 * r);
            const __mmask64 kept = _mm512_test_epi8_mask(row, row);
            codes[r] = _mm512_maskz_compress_epi8(kept, row);
            places[r] = _mm512_maskz_compress_epi8(kept, columns);
            most = std::max(most, __builtin_popcountll(kept));
        }
        const int count = (most + 3) / 4;
        counts[word] = uint8_t(count);
        // 16 vectors are written each time; those behind `count` are overwritten by what follows
        store_transposed(codes, to);
        store_transposed(places, to + 64 * count);
        to += 128 * count;
    }
}

// Vectors with the lists of a block: shuffles look up their columns, and run next to products.
template <int TOKENS> inline void listed_rows(const ProductJob& job, int64_t block, int64_t token) {
    const Matrix& m = job.m;
    const int64_t chunks = m.chunks();
    const int64_t words = m.words();
    const int64_t words_in_chunk = std::max<int64_t>(1, m.chunk / WORD);
    const ListRoom room(job);
    const uint8_t* list = room.list;
    const uint8_t* ahead = after<1>(job, block, token);
    __m512 total[TOKENS];
    for (__m512& sum : total) sum = _mm512_setzero_ps();
    int64_t word = 0;
    for (int64_t c = 0; c < chunks; ++c) {
        __m512i h[TOKENS];
        __m512i l[TOKENS];
#pragma GCC unroll 8
        for (int t = 0; t < TOKENS; ++t) h[t] = l[t] = _mm512_setzero_si512();
        for (const int64_t end = c + 1 == chunks ? words : std::min(words, word + words_in_chunk); word < end; ++word) {
            __m512i high[TOKENS];
            __m512i low[TOKENS];
#pragma GCC unroll 8
            for (int t = 0; t < TOKENS; ++t) {
                high[t] = _mm512_xor_si512(_mm512_loadu_si512(job.q.high_of(token + t) + word * WORD), _mm512_set1_epi8(char(0x80)));
                low[t] = _mm512_loadu_si512(job.q.low_of(token + t) + word * WORD);
            }
            for (int line = 0; line < 8; ++line) _mm_prefetch(reinterpret_cast<const char*>(ahead) + 512 * word + 64 * line, _MM_HINT_T1);
            const int64_t size = 64 * room.counts[word];
            for (const uint8_t* const end_of_codes = list + size; list < end_of_codes; list += 64) {
                const __m512i codes = _mm512_loadu_si512(list);
                const __m512i places = _mm512_loadu_si512(list + size);
#pragma GCC unroll 8
                for (int t = 0; t < TOKENS; ++t) {
                    h[t] = dot(h[t], _mm512_permutexvar_epi8(places, high[t]), codes);
                    l[t] = dot(l[t], _mm512_permutexvar_epi8(places, low[t]), codes);
                }
            }
            list += size;
        }
        const __m512i excess = _mm512_slli_epi32(_mm512_loadu_si512(room.row_sums + 64 * c), 15);
        const __m512 scales = scales_of(m, block, c);
#pragma GCC unroll 8
        for (int t = 0; t < TOKENS; ++t)
            total[t] = with_planes(total[t], h[t], l[t], excess, scales, job.q.scales_of(token + t)[c]);
    }
    store_block<TOKENS>(job, block, token, total);
}

// Whether lists save more products than making them costs. On Zen 4 64 columns take 350 cycles to list, and then 2.7 for
// each vector and token, instead of 33.6 for each token. Intel's processors do not shuffle next to every product.
inline bool lists_pay(const ProductJob& job, int64_t block) {
    static const int64_t cost = __builtin_cpu_is("amd") ? 27 : 42;
    return job.m.has_bits && job.m.word == WORD && !job.q.are_bytes &&
           cost * job.m.list_vectors[size_t(block)] * job.tokens < job.m.words() * (336 * job.tokens - 3500);
}

template <int BITS, bool MASKED, int PANELS> inline void panels(const ProductJob& job, int64_t block) {
    static constexpr void (*PLANES[])(const ProductJob&, int64_t, int64_t) = {
        panel_rows<BITS, 1, PANELS>, panel_rows<BITS, 2, PANELS>, panel_rows<BITS, 3, PANELS>,
        panel_rows<BITS, 4, PANELS>, panel_rows<BITS, 5, PANELS>, panel_rows<BITS, 6, PANELS>};
    if (job.q.are_bytes) return all_byte_rows<BITS, MASKED, PANELS>(job, block);
    for (int p = 0; p < PANELS; ++p) expand_16<BITS, MASKED, Form::STREAM>(job.m, block + p, job.room + p * job.panel);
    in_tiles(job, block, PLANES);
}

template <int BITS, bool MASKED> inline void code_product_of(const ProductJob& job) {
    static constexpr void (*FEW[])(const ProductJob&) = {
        few_vectors<BITS, MASKED, 1>, few_vectors<BITS, MASKED, 2>, few_vectors<BITS, MASKED, 3>, few_vectors<BITS, MASKED, 4>,
        few_vectors<BITS, MASKED, 5>, few_vectors<BITS, MASKED, 6>, few_vectors<BITS, MASKED, 7>, few_vectors<BITS, MASKED, 8>};
    if (job.tokens <= int64_t(std::size(FEW)) && !job.q.are_bytes) return FEW[job.tokens - 1](job);
    for (int64_t block = job.first; block < job.last;) {
        if (lists_pay(job, block)) {
            static constexpr void (*LISTED[])(const ProductJob&, int64_t, int64_t) = {
                listed_rows<1>, listed_rows<2>, listed_rows<3>, listed_rows<4>, listed_rows<5>, listed_rows<6>};
            list_kept<BITS>(job, block);
            in_tiles(job, block++, LISTED);
        } else if (block + 1 < job.last && !lists_pay(job, block + 1)) {
            panels<BITS, MASKED, 2>(job, block);
            block += 2;
        } else {
            panels<BITS, MASKED, 1>(job, block++);
        }
    }
}

inline void code_product(const ProductJob& job) {
    if (job.m.bits == 4) return job.m.has_bits ? code_product_of<4, true>(job) : code_product_of<4, false>(job);
    return job.m.has_bits ? code_product_of<8, true>(job) : code_product_of<8, false>(job);
}

// Quantise a vector to bytes, word by word of columns.
inline void quantize_to_bytes(const Matrix& m, const float* x, int64_t token, Activations& to) {
    uint8_t* bytes = to.low.data() + token * to.stride;
    for (int64_t c = 0; c < to.chunks; ++c, x += m.word) {
        const int64_t count = std::min(m.columns - c * m.word, m.word);
        __m512 part[4];
        __m512 most = _mm512_setzero_ps();
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            const int64_t left = count - 16 * i;
            part[i] = _mm512_maskz_loadu_ps(left >= 16 ? 0xffff : left > 0 ? (1 << left) - 1 : 0, x + 16 * i);
            most = (__m512)_mm512_max_epi32((__m512i)most, (__m512i)_mm512_abs_ps(part[i]));  // the maximum keeps NaN
        }
        const Rounding rounding(_mm512_reduce_max_epi32((__m512i)most), 127);
        const __m512 inverse = _mm512_set1_ps(rounding.inverse);
        __m512i sum = _mm512_setzero_si512();
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            const __m512i q = rounding.inverse > 0 ? _mm512_cvtps_epi32(_mm512_mul_ps(part[i], inverse)) : _mm512_setzero_si512();
            sum = _mm512_add_epi32(sum, q);
            _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes + c * m.word + 16 * i), _mm512_cvtepi32_epi8(q));
        }
        to.scales[size_t(token * to.chunks + c)] = rounding.scale;
        to.sums[size_t(token * to.chunks + c)] = -128 * _mm512_reduce_add_epi32(sum);
    }
}
