// Products of many vectors with Intel AMX. 16 rows of codes, expanded as for AVX-512, form tiles of a word of columns,
// and so do 16 vectors in place. Sums are the same integers, and floats are added in the same order. Included after
// avx512.hpp and what follows it in its namespace.
//
// Tiles: 4 and 5 are inputs, the low and the high plane of 16 vectors, or 32 vectors of bytes; 6 and 7 are the codes of
// a panel each. Input i and panel p are summed in tile 2 p + i.
// A tile of inputs has a row per vector, of `word` bytes, `stride` apart in Activations. A tile of codes is 64 bytes per
// row, 4 columns of 16 rows of W: the layout of a panel (avx512.hpp). Sums are int32 [vector][row of W], stored to the
// aligned sums_ of a TileSums, which lives on the stack of its thread. The tile registers belong to that thread while
// a Tiles object exists.

constexpr int64_t TILE_ROWS = 16;

// The vectors from which tiles are faster than AVX-512: their time over its, at 8, 12, 16 and 32 vectors, is 1.3, 0.7,
// 0.7 and 0.6 with a scale per row, and 1.5, 0.95, 0.9 and 0.9 with groups of 32, whose sums are converted more often
// (Sapphire Rapids).
inline int64_t least_vectors(const Matrix& m) { return m.chunk < std::min(m.columns, MOST_COLUMNS) ? 32 : 16; }

// `first` and `second`: vectors of the two inputs; the second may have none. depth: columns of a word.
inline TileConfig shapes(int64_t first, int64_t second, int64_t depth) {
    TileConfig config;
    const auto shape = [&](int tile, int64_t rows, int64_t bytes) {
        if (rows) {
            config.rows[tile] = uint8_t(rows);
            config.bytes[tile] = uint16_t(bytes);
        }
    };
    for (int panel = 0; panel < 2; ++panel) {
        shape(2 * panel, first, 64);
        shape(2 * panel + 1, second, 64);
        shape(6 + panel, depth / 4, 64);
    }
    shape(4, first, depth);
    shape(5, second, depth);
    return config;
}

// Whether products equal plain sums, for all byte values.
template <bool SIGNED> inline bool tiles_hold() {
    constexpr int VECTORS = 3;
    uint8_t x[VECTORS * 64];
    uint8_t codes[16 * 64];
    int32_t found[VECTORS * 16];
    for (int i = 0; i < VECTORS * 64; ++i) x[i] = uint8_t(151 * i + 7);
    for (int i = 0; i < 16 * 64; ++i) codes[i] = uint8_t(89 * i + 3 + i / 256);
    {
        Tiles tiles(shapes(16, VECTORS, 64));
        tiles.clear<3>();
        tiles.load<5>(x, 64);
        tiles.load<7>(codes, 64);
        tiles.add_product<SIGNED, 3, 5, 7>();
        tiles.store<3>(found);
    }
    for (int i = 0; i < VECTORS * 16; ++i) {
        int32_t sum = 0;
        for (int column = 0; column < 64; ++column) {
            const uint8_t byte = x[i / 16 * 64 + column];
            sum += (SIGNED ? int8_t(byte) : byte) * int8_t(codes[column / 4 * 64 + i % 16 * 4 + column % 4]);
        }
        if (found[i] != sum) return false;
    }
    return true;
}

// The sums of one or two inputs, in their shapes, with one or two panels.
template <bool SIGNED> class TileSums {
   public:
    TileSums(Tiles& tiles, const ProductJob& job, int panels, const uint8_t* first, const uint8_t* second)
        : tiles_(tiles), job_(job), panels_(panels), first_(first), second_(second) {}

    // Add the columns of words [from, to).
    void add_up(int64_t from, int64_t to) {
        tiles_.clear<0>();
        tiles_.clear<2>();
        if (second_) {
            tiles_.clear<1>();
            tiles_.clear<3>();
        }
        for (; from < to; ++from) add(from * job_.m.word);
        tiles_.store<0>(sums_);
        tiles_.store<2>(sums_ + 2 * SIZE);
        if (second_) {
            tiles_.store<1>(sums_ + SIZE);
            tiles_.store<3>(sums_ + 3 * SIZE);
        }
    }
    // Sums of a vector of an input with the 16 rows of a panel.
    __m512i at(int panel, int64_t input, int64_t vector) const {
        return _mm512_load_si512(sums_ + (2 * panel + input) * SIZE + 16 * vector);
    }

   private:
    static constexpr int64_t SIZE = 16 * TILE_ROWS;

    void add(int64_t column) {
        const uint8_t* codes = job_.room + column * 16;
        tiles_.load<4>(first_ + column, job_.q.stride);
        tiles_.load<6>(codes, 64);
        tiles_.add_product<SIGNED, 0, 4, 6>();
        if (second_) tiles_.load<5>(second_ + column, job_.q.stride);
        if (second_) tiles_.add_product<SIGNED, 1, 5, 6>();
        if (panels_ == 1) return;
        tiles_.load<7>(codes + job_.panel, 64);
        tiles_.add_product<SIGNED, 2, 4, 7>();
        if (second_) tiles_.add_product<SIGNED, 3, 5, 7>();
    }

    Tiles& tiles_;
    const ProductJob& job_;
    const int panels_;
    const uint8_t* first_;
    const uint8_t* second_;  // null without a second input
    alignas(64) int32_t sums_[4 * SIZE];
};

// Vectors from `token` on, with the expanded rows of one or two panels, from `block` on.
struct TileJob {
    const ProductJob& of;
    int64_t block;
    int panels;
    int64_t token;
    int64_t vectors;

    void store(const __m512* total, int panel) const {
        for (int64_t t = 0; t < vectors; ++t) store_block<1>(of, block + panel, token + t, total + t);
    }
};

// Up to 16 vectors, summed as in panel_rows of AVX-512.
inline void planes_in_tiles(Tiles& tiles, const TileJob& job) {
    const Matrix& m = job.of.m;
    const int64_t chunks = m.chunks();
    const int64_t words = m.words();
    const int64_t words_in_chunk = std::max<int64_t>(1, m.chunk / m.word);
    TileSums<false> sums(tiles, job.of, job.panels, job.of.q.low_of(job.token), job.of.q.high_of(job.token));
    __m512 total[2][TILE_ROWS] = {};
    for (int64_t c = 0; c < chunks; ++c) {
        sums.add_up(c * words_in_chunk, c + 1 == chunks ? words : (c + 1) * words_in_chunk);
        for (int p = 0; p < job.panels; ++p) {
            const __m512i offset = offsets_of(m, job.block + p, c);
            const __m512 scales = scales_of(m, job.block + p, c);
            for (int64_t t = 0; t < job.vectors; ++t) {
                const float x_scale = job.of.q.scales_of(job.token + t)[c];
                total[p][t] = with_planes(total[p][t], sums.at(p, 1, t), sums.at(p, 0, t), offset, scales, x_scale);
            }
        }
    }
    for (int p = 0; p < job.panels; ++p) job.store(total[p], p);
}

// Up to 32 vectors of bytes, summed as in byte_rows of AVX-512; codes are signed here.
inline void bytes_in_tiles(Tiles& tiles, const TileJob& job) {
    const Matrix& m = job.of.m;
    const int64_t chunks = m.chunks();
    const int64_t words = m.words();
    const int64_t words_in_chunk = std::max<int64_t>(1, m.chunk / m.word);
    const uint8_t* x = job.of.q.low_of(job.token);
    TileSums<true> sums(tiles, job.of, job.panels, x, job.vectors > TILE_ROWS ? x + TILE_ROWS * job.of.q.stride : nullptr);
    __m512 total[2][2 * TILE_ROWS] = {};
    for (int64_t c = 0, word = 0; c < chunks; ++c) {
        __m512 of_chunk[2][2 * TILE_ROWS] = {};
        for (const int64_t end = c + 1 == chunks ? words : word + words_in_chunk; word < end; ++word) {
            sums.add_up(word, word + 1);
            for (int p = 0; p < job.panels; ++p)
                for (int64_t t = 0; t < job.vectors; ++t) {
                    const __m512 sum = _mm512_cvtepi32_ps(sums.at(p, t / TILE_ROWS, t % TILE_ROWS));
                    of_chunk[p][t] = _mm512_fmadd_ps(sum, _mm512_set1_ps(job.of.q.scales_of(job.token + t)[word]), of_chunk[p][t]);
                }
        }
        for (int p = 0; p < job.panels; ++p) {
            const __m512 scales = scales_of(m, job.block + p, c);
            for (int64_t t = 0; t < job.vectors; ++t) total[p][t] = _mm512_fmadd_ps(of_chunk[p][t], scales, total[p][t]);
        }
    }
    for (int p = 0; p < job.panels; ++p) job.store(total[p], p);
}

// Vectors [token, last) in equal steps, so that shapes are set once.
inline void vectors_in_tiles(const ProductJob& job, int64_t block, int panels, int64_t token, int64_t last, int64_t together) {
    if (token == last) return;
    const int64_t in_first = std::min(together, TILE_ROWS);
    Tiles tiles(shapes(in_first, job.q.are_bytes ? together - in_first : in_first, job.m.word));
    for (; token < last; token += together)
        (job.q.are_bytes ? bytes_in_tiles : planes_in_tiles)(tiles, {job, block, panels, token, together});
}

template <int BITS, bool MASKED> inline void tile_product_of(const ProductJob& job) {
    const int64_t most = job.q.are_bytes ? 2 * TILE_ROWS : TILE_ROWS;
    const int64_t whole = job.tokens / most * most;
    for (int64_t block = job.first; block < job.last; block += 2) {
        const int panels = block + 1 < job.last ? 2 : 1;
        for (int p = 0; p < panels; ++p) expand_16<BITS, MASKED, false>(job.m, block + p, job.room + p * job.panel);
        vectors_in_tiles(job, block, panels, 0, whole, most);
        vectors_in_tiles(job, block, panels, whole, job.tokens, job.tokens - whole);
    }
}

inline void tile_product(const ProductJob& job) {
    if (job.m.layout == FLOATS || job.tokens < least_vectors(job.m)) return product(job);
    if (job.m.bits == 4) return job.m.has_bits ? tile_product_of<4, true>(job) : tile_product_of<4, false>(job);
    return job.m.has_bits ? tile_product_of<8, true>(job) : tile_product_of<8, false>(job);
}

inline Functions tile_table() {
    Functions found = table();
    found.product = tile_product;
    return found;
}
