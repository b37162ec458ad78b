// Products of many vectors with Intel AMX. 16 rows of codes, expanded as for AVX-512, form tiles of a word of columns,
// and so do 16 vectors, which are read where they are or copied tile by tile (Inputs). Sums are the same integers, and floats are added in the same order. Included after
// avx512.hpp and what follows it in its namespace.
//
// Tiles: 4 and 5 are inputs, the low and the high plane of 16 vectors, or 32 vectors of bytes; 6 and 7 are the codes of
// a panel each. Input i and panel p are summed in tile 2 p + i.
// A tile of inputs has a row per vector, of `word` bytes, Inputs::stride apart. A tile of codes is 64 bytes per
// row, 4 columns of 16 rows of W: the layout of a panel (avx512.hpp). Sums are int32 [vector][row of W], stored to a
// TileSums::Stored on the stack of their thread. The tile registers belong to that thread while
// a Tiles object exists.

constexpr int64_t TILE_ROWS = 16;

// The vectors from which tiles are faster than AVX-512. 2048 x 2048 at 50 %, their speed over its, at 8, 12, 16 and 32
// vectors: 1.0, 1.6, 1.9 and 2.5 with a scale per row, and 1.0, 1.1, 1.2 and 1.3 with groups of 32, whose sums are
// converted more often (Intel Xeon, Sapphire Rapids, one thread).
constexpr int64_t LEAST_VECTORS = 12;

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

// Where tiles of inputs lie: in Activations, or copied word by word so that a tile is adjacent. A tile of an input that is
// spread over rows takes three times as long to read.
struct Inputs {
    const uint8_t* first;
    const uint8_t* second;  // null without a second input
    int64_t stride;  // of vectors
    int64_t step;  // of words
};

// Vectors [token, last) with the panels of the blocks [block, last_block), in tiles of `together` vectors.
struct TileJob {
    const ProductJob& of;
    int64_t token;
    int64_t last;
    int64_t together;
    uint8_t* copies;  // null: the vectors are read where they are

    int64_t in_first() const { return std::min(together, TILE_ROWS); }
    int64_t bytes_of_word() const { return together * of.m.word * (of.q.are_bytes ? 1 : 2); }

    // Copy the vectors: for each tile and word the rows of the first input, then those of the second.
    void copy() const {
        const int64_t words = of.m.words();
        const int64_t word = of.m.word;
        uint8_t* tile = copies;
        for (int64_t t = token; t < last; t += together, tile += words * bytes_of_word())
            for (int64_t i = 0; i < together; ++i)
                for (int plane = 0; plane < (of.q.are_bytes ? 1 : 2); ++plane) {
                    const uint8_t* from = plane ? of.q.high_of(t + i) : of.q.low_of(t + i);
                    uint8_t* to = tile + (plane * together + i) * word;
                    if (word == 64)
                        for (int64_t w = 0; w < words; ++w)
                            _mm512_storeu_si512(to + w * bytes_of_word(), _mm512_loadu_si512(from + w * 64));
                    else
                        for (int64_t w = 0; w < words; ++w) std::memcpy(to + w * bytes_of_word(), from + w * word, size_t(word));
                }
    }
    Inputs inputs(int64_t t) const {
        if (copies) {
            const uint8_t* tile = copies + (t - token) / together * of.m.words() * bytes_of_word();
            const bool has_second = !of.q.are_bytes || together > TILE_ROWS;
            return {tile, has_second ? tile + in_first() * of.m.word : nullptr, of.m.word, bytes_of_word()};
        }
        const uint8_t* second = of.q.are_bytes ? of.q.low_of(t) + TILE_ROWS * of.q.stride : of.q.high_of(t);
        return {of.q.low_of(t), of.q.are_bytes && together <= TILE_ROWS ? nullptr : second, of.q.stride, of.m.word};
    }
};

// The sums of one or two inputs, in their shapes, with one or two panels: in tiles, and stored. SIGNED: the first input;
// the second is a high plane or more vectors of bytes, both signed.
template <bool SIGNED> class TileSums {
   public:
    struct alignas(64) Stored {
        int32_t sums[4][16 * TILE_ROWS];

        // Those of a vector of an input with the 16 rows of a panel.
        __m512i at(int panel, int64_t input, int64_t vector) const { return _mm512_load_si512(sums[2 * panel + input] + 16 * vector); }
    };

    // ahead: what to fetch meanwhile, `bytes_ahead` for each word.
    TileSums(Tiles& tiles, const ProductJob& job, int panels, const Inputs& inputs, const uint8_t* ahead, int64_t bytes_ahead)
        : tiles_(tiles), job_(job), panels_(panels), inputs_(inputs), ahead_(ahead), bytes_ahead_(bytes_ahead) {}

    // The columns of words [from, to).
    void add_up(int64_t from, int64_t to) {
        tiles_.clear<0>();
        tiles_.clear<2>();
        if (inputs_.second) {
            tiles_.clear<1>();
            tiles_.clear<3>();
        }
        for (; from < to; ++from) add(from);
    }
    void store(Stored& to) {
        tiles_.store<0>(to.sums[0]);
        if (inputs_.second) tiles_.store<1>(to.sums[1]);
        if (panels_ == 1) return;
        tiles_.store<2>(to.sums[2]);
        if (inputs_.second) tiles_.store<3>(to.sums[3]);
    }

   private:
    void add(int64_t word) {
        const uint8_t* codes = job_.room + word * job_.m.word * 16;
        for (int64_t i = 0; i < bytes_ahead_; i += 64)
            _mm_prefetch(reinterpret_cast<const char*>(ahead_ + word * bytes_ahead_ + i), _MM_HINT_T1);
        tiles_.load<6>(codes, 64);
        tiles_.load<4>(inputs_.first + word * inputs_.step, inputs_.stride);
        tiles_.add_product<SIGNED, 0, 4, 6>();
        if (inputs_.second) tiles_.load<5>(inputs_.second + word * inputs_.step, inputs_.stride);
        if (inputs_.second) tiles_.add_product<true, 1, 5, 6>();
        if (panels_ == 1) return;
        tiles_.load<7>(codes + job_.panel, 64);
        tiles_.add_product<SIGNED, 2, 4, 7>();
        if (inputs_.second) tiles_.add_product<true, 3, 5, 7>();
    }

    Tiles& tiles_;
    const ProductJob& job_;
    const int panels_;
    const Inputs inputs_;
    const uint8_t* ahead_;
    const int64_t bytes_ahead_;
};

// A tile of vectors from `token` on, with one or two panels, those of `block`.
struct TilesOfBlock {
    const TileJob& job;
    int64_t block;
    int panels;
    int64_t token;

    void store(const __m512* total, int panel) const {
        for (int64_t t = 0; t < job.together; ++t) store_block<1>(job.of, block + panel, token + t, total + t);
    }
    // The codes of the next panels; every tile fetches its share of them, in whole lines per word.
    const uint8_t* ahead() const { return codes_of(block + panels) + (token - job.token) / job.together * bytes_ahead() * job.of.m.words(); }
    int64_t bytes_ahead() const {
        const int64_t tiles = (job.last - job.token) / job.together;
        const int64_t bytes = codes_of(std::min(job.of.last, block + panels + 2)) - codes_of(block + panels);
        return round_up((bytes + tiles * job.of.m.words() - 1) / (tiles * job.of.m.words()), 64);
    }
    const uint8_t* codes_of(int64_t at) const { return job.of.m.data.data() + job.of.m.first_byte[size_t(at)]; }
    // Fetch what store() writes: rows of y far apart, which are in no near cache.
    void fetch() const {
        for (int64_t t = 0; t < job.together; ++t)
            for (int p = 0; p < panels; ++p)
                __builtin_prefetch(job.of.y + (token + t) * job.of.y_width + (block + p) * TILE_ROWS, 1);
    }
};

// Up to 16 vectors, summed as in panel_rows of AVX-512. A chunk's sums are converted while the next chunk's are formed.
inline void planes_in_tiles(Tiles& tiles, const TilesOfBlock& of) {
    const ProductJob& job = of.job.of;
    const Matrix& m = job.m;
    const int64_t chunks = m.chunks();
    const int64_t words = m.words();
    const int64_t words_in_chunk = std::max<int64_t>(1, m.chunk / m.word);
    const int64_t vectors = of.job.together;
    of.fetch();
    TileSums<false> sums(tiles, job, of.panels, of.job.inputs(of.token), of.ahead(), of.bytes_ahead());
    TileSums<false>::Stored stored[2];
    __m512 total[2][TILE_ROWS] = {};
    const auto convert = [&](int64_t c) {
        const float* x_scales = job.q.scales_of(of.token) + c;
        const __m512i exact = _mm512_setzero_si512();  // tiles multiply signed codes with either plane, so nothing exceeds
        for (int p = 0; p < of.panels; ++p) {
            const __m512 scales = scales_of(m, of.block + p, c);
            for (int64_t t = 0; t < vectors; ++t)
                total[p][t] = with_planes(total[p][t], stored[c % 2].at(p, 1, t), stored[c % 2].at(p, 0, t), exact, scales, x_scales[t * chunks]);
        }
    };
    for (int64_t c = 0; c < chunks; ++c) {
        sums.add_up(c * words_in_chunk, c + 1 == chunks ? words : (c + 1) * words_in_chunk);
        if (c) convert(c - 1);
        sums.store(stored[c % 2]);
    }
    convert(chunks - 1);
    for (int p = 0; p < of.panels; ++p) of.store(total[p], p);
}

// Up to 32 vectors of bytes, summed as in byte_rows of AVX-512; codes are signed here.
inline void bytes_in_tiles(Tiles& tiles, const TilesOfBlock& of) {
    const ProductJob& job = of.job.of;
    const Matrix& m = job.m;
    const int64_t chunks = m.chunks();
    const int64_t words = m.words();
    const int64_t words_in_chunk = std::max<int64_t>(1, m.chunk / m.word);
    const int64_t vectors = of.job.together;
    of.fetch();
    TileSums<true> sums(tiles, job, of.panels, of.job.inputs(of.token), of.ahead(), of.bytes_ahead());
    TileSums<true>::Stored stored;
    __m512 total[2][2 * TILE_ROWS] = {};
    for (int64_t c = 0, word = 0; c < chunks; ++c) {
        __m512 of_chunk[2][2 * TILE_ROWS] = {};
        for (const int64_t end = c + 1 == chunks ? words : word + words_in_chunk; word < end; ++word) {
            sums.add_up(word, word + 1);
            sums.store(stored);
            for (int p = 0; p < of.panels; ++p)
                for (int64_t t = 0; t < vectors; ++t) {
                    const __m512 sum = _mm512_cvtepi32_ps(stored.at(p, t / TILE_ROWS, t % TILE_ROWS));
                    of_chunk[p][t] = _mm512_fmadd_ps(sum, _mm512_set1_ps(job.q.scales_of(of.token + t)[word]), of_chunk[p][t]);
                }
        }
        for (int p = 0; p < of.panels; ++p) {
            const __m512 scales = scales_of(m, of.block + p, c);
            for (int64_t t = 0; t < vectors; ++t) total[p][t] = _mm512_fmadd_ps(of_chunk[p][t], scales, total[p][t]);
        }
    }
    for (int p = 0; p < of.panels; ++p) of.store(total[p], p);
}

// Vectors of a job with expanded panels; all in tiles of equal size, so that shapes are set once.
inline void vectors_in_tiles(const TileJob& job, int64_t block, int panels) {
    if (job.token == job.last) return;
    Tiles tiles(shapes(job.in_first(), job.of.q.are_bytes ? job.together - job.in_first() : job.in_first(), job.of.m.word));
    for (int64_t token = job.token; token < job.last; token += job.together)
        (job.of.q.are_bytes ? bytes_in_tiles : planes_in_tiles)(tiles, {job, block, panels, token});
}

// Blocks from which vectors are copied: with fewer, a copy is read too few times to pay.
constexpr int64_t LEAST_BLOCKS = 8;

template <int BITS, bool MASKED> inline void tile_product_of(const ProductJob& job) {
    const int64_t most = job.q.are_bytes ? 2 * TILE_ROWS : TILE_ROWS;
    const bool copies = job.last - job.first >= LEAST_BLOCKS;
    const int64_t step = copies ? vectors_copied(job.m.columns) : job.tokens;
    uint8_t* const room = job.room + round_up(2 * job.panel, 64);
    for (int64_t token = 0; token < job.tokens; token += step) {
        const int64_t last = std::min(job.tokens, token + step);
        const int64_t whole = token + (last - token) / most * most;
        uint8_t* const behind = room + (whole - token) * job.m.words() * job.m.word * (job.q.are_bytes ? 1 : 2);
        const TileJob parts[] = {{job, token, whole, most, copies ? room : nullptr},
                                 {job, whole, last, last - whole, copies ? behind : nullptr}};
        for (const TileJob& part : parts)
            if (copies && part.token < part.last) part.copy();
        for (int64_t block = job.first; block < job.last; block += 2) {
            const int panels = block + 1 < job.last ? 2 : 1;
            for (int p = 0; p < panels; ++p) expand_16<BITS, MASKED, Form::SIGNED>(job.m, block + p, job.room + p * job.panel);
            for (const TileJob& part : parts) vectors_in_tiles(part, block, panels);
        }
    }
}

inline void tile_product(const ProductJob& job) {
    if (job.m.layout == FLOATS || job.tokens < LEAST_VECTORS) return product(job);
    if (job.m.bits == 4) return job.m.has_bits ? tile_product_of<4, true>(job) : tile_product_of<4, false>(job);
    return job.m.has_bits ? tile_product_of<8, true>(job) : tile_product_of<8, false>(job);
}

inline Functions tile_table() {
    Functions functions = table();
    functions.product = tile_product;
    return functions;
}
