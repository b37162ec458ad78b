// y = activation(x W' + bias) with a sparse W: every non-zero times a panel of adjacent activations. Included once per
// instruction set, after its lanes: no #pragma once.
//
// Layout
//   x, y     (tokens, columns) and (tokens, rows) fp32, contiguous, of the runtime
//   panel    [column or pair of columns][PANEL tokens] fp32, or two int16 of a pair in each; then PANEL scales, one per
//            token, or of bytes for every word. Aligned to 64 bytes, in memory of a thread. Tokens after the last, up to
//            a whole vector, are zeros.
//   results  [row][PANEL tokens] fp32, transposed to y by from_panel
// Tokens are adjacent so that one non-zero meets MOST_VECTORS * LANES of them in registers.
//
// With few panels, rows are divided among threads and panels are packed once, by all threads, before the product; with
// many, each piece of work is a panel. Results do not depend on this division. Sums of PAIRS are exact integers; the others
// are fp32, and their order depends on how many vectors of tokens a panel has (add_entries).

constexpr int MOST_VECTORS = LANES == 16 ? 4 : 6;  // of activations at a time, as many sums in registers
constexpr int64_t PANEL = int64_t(MOST_VECTORS) * LANES;

// Position of the activations or results of one panel: `tokens` rows of `width` floats, at most PANEL of them.
struct Rows {
    float* first;
    int64_t tokens;
    int64_t width;
};

// panel[column][token], PANEL tokens apart, from rows; tokens up to the next whole vector are zeros.
inline void to_panel(const Rows& rows, float* panel) {
    const int64_t vectors = (rows.tokens + LANES - 1) / LANES;
    const int64_t whole = rows.width / LANES * LANES;
    for (int64_t v = 0; v < vectors; ++v) {
        const int64_t from = v * LANES;
        const int64_t count = rows.tokens - from < LANES ? rows.tokens - from : LANES;
        const float* x = rows.first + from * rows.width;
        for (int64_t col = 0; col < whole; col += LANES) {
            Floats square[LANES];
            for (int i = 0; i < LANES; ++i) square[i] = i < count ? load(x + i * rows.width + col) : Floats{};
            transpose(square);
            for (int i = 0; i < LANES; ++i) store(panel + (col + i) * PANEL + from, square[i]);
        }
        for (int64_t col = whole; col < rows.width; ++col)
            for (int i = 0; i < LANES; ++i) panel[col * PANEL + from + i] = i < count ? x[i * rows.width + col] : 0.0f;
    }
}

// Rows [first, last) of the results, from panel[row - first][token].
inline void from_panel(const float* panel, int64_t first, int64_t last, const Rows& rows) {
    for (int64_t from = 0; from < rows.tokens; from += LANES) {
        const int64_t count = rows.tokens - from < LANES ? rows.tokens - from : LANES;
        float* y = rows.first + from * rows.width;
        int64_t row = first;
        for (; row + LANES <= last; row += LANES) {
            Floats square[LANES];
            for (int i = 0; i < LANES; ++i) square[i] = load(panel + (row - first + i) * PANEL + from);
            transpose(square);
            for (int i = 0; i < count; ++i) store(y + i * rows.width + row, square[i]);
        }
        for (; row < last; ++row)
            for (int i = 0; i < count; ++i) y[i * rows.width + row] = panel[(row - first) * PANEL + from + i];
    }
}

// An entry's words, and how it meets activations.
template <Form FORM> struct Entry;
template <> struct Entry<Form::VALUES> {
    static constexpr int WORDS = 2;
    using Sum = Floats;
    static size_t offset(const uint32_t* at) { return at[1]; }
    static Floats factor(const uint32_t* at) { return (Floats)(Ints{} + int32_t(at[0])); }
};
template <> struct Entry<Form::CODES> {
    static constexpr int WORDS = 1;
    using Sum = Floats;
    static size_t offset(const uint32_t* at) { return 8 * size_t(at[0] & 0xffff); }
    static Floats factor(const uint32_t* at) { return (Floats)((Ints{} + int32_t(at[0])) & int32_t(0xffff0000)); }
};
template <> struct Entry<Form::PAIRS> {
    static constexpr int WORDS = 1;
    using Sum = Ints;
    static size_t offset(const uint32_t* at) { return 8 * size_t(at[0] & 0xffff); }
    static Ints factor(const uint32_t* at) {
        const int8_t even = int8_t(at[0] >> 16);
        const int8_t odd = int8_t(at[0] >> 24);
        return Ints{} + int32_t(uint32_t(uint16_t(odd)) << 16 | uint16_t(even));
    }
};
inline void add(Floats& sum, Floats factor, const float* x) { sum += factor * load(x); }
inline void add(Ints& sum, Ints factor, const float* x) { sum = add_pairs(sum, *reinterpret_cast<const Ints*>(x), factor); }

// Sums of VECTORS vectors of tokens over the entries of a row. Two sums of each where there are few: a sum waits for itself.
template <Form FORM, int VECTORS>
inline void add_entries(const Stream::Row& row, const char* panel, typename Entry<FORM>::Sum (&sum)[VECTORS]) {
    using Of = Entry<FORM>;
    using Sum = typename Of::Sum;
    constexpr bool has_two = VECTORS <= (LANES == 16 ? 4 : 3);
    Sum other[VECTORS] = {};
    for (const uint32_t* at = row.begin; at < row.end; at += 2 * Of::WORDS) {
        const uint32_t* next = at + Of::WORDS;
        const float* x = reinterpret_cast<const float*>(panel + Of::offset(at));
        const float* z = reinterpret_cast<const float*>(panel + Of::offset(next));
        const Sum first = Of::factor(at);
        const Sum second = Of::factor(next);
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v) add(sum[v], first, x + v * LANES);
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v) add(has_two ? other[v] : sum[v], second, z + v * LANES);
    }
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS && has_two; ++v) sum[v] += other[v];
}

// A panel of activations, and what is done to its sums.
struct Panel {
    const float* x;             // [column or pair][token]
    const float* token_scales;  // of integers, PANEL of them; of bytes [word][PANEL]
    const float* bias;          // or null
    int64_t activation;
};

inline Floats scaled(Floats sum, const Stream& w, const Panel&, int64_t row, int) {
    return w.form == Form::CODES ? sum * w.row_scales[size_t(row)] : sum;
}
inline Floats scaled(Ints sum, const Stream& w, const Panel& panel, int64_t row, int v) {
    return __builtin_convertvector(sum, Floats) * (w.row_scales[size_t(row)] * load(panel.token_scales + v * LANES));
}

template <Form FORM, int VECTORS>
void rows_times_panel(const Stream& w, int64_t first, int64_t last, const Panel& panel, float* out) {
    using Sum = typename Entry<FORM>::Sum;
    for (int64_t chunk = 0; chunk < w.chunks; ++chunk) {
        const char* x = reinterpret_cast<const char*>(panel.x + chunk * w.chunk * PANEL);
        const bool is_last = chunk + 1 == w.chunks;
        for (int64_t place = first; place < last; ++place) {
            const Stream::Row of = w.at(chunk, place);
            float* to = out + (of.row - first) * PANEL;
            Sum sum[VECTORS] = {};
            if (chunk)
#pragma GCC unroll 8
                for (int v = 0; v < VECTORS; ++v) sum[v] = (Sum)load(to + v * LANES);
            add_entries<FORM, VECTORS>(of, x, sum);
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; ++v)
                store(to + v * LANES, is_last ? activate(panel.activation, scaled(sum[v], w, panel, of.row, v) + (panel.bias ? panel.bias[of.row] : 0.0f))
                                              : (Floats)sum[v]);
        }
    }
}

// The same for activations of 8 bits. A chunk is a word, whose integers are scaled and added as in byte_rows of the decoder,
// with the same bits: the words of up to MOST_COLUMNS first, then these sums times the scale of the row.
template <int VECTORS> void rows_times_bytes(const Stream& w, int64_t first, int64_t last, const Panel& panel, float* out) {
    constexpr int64_t MOST_WORDS = MOST_COLUMNS / WORD;
    float* const totals = out + (last - first) * PANEL;  // of earlier words
    for (int64_t word = 0; word < w.chunks; ++word) {
        const char* x = reinterpret_cast<const char*>(panel.x + word * w.chunk * PANEL);
        const float* scales = panel.token_scales + word * PANEL;
        const bool is_first = word % MOST_WORDS == 0;
        const bool is_last = word + 1 == w.chunks;
        for (int64_t place = first; place < last; ++place) {
            const Stream::Row of = w.at(word, place);
            float* to = out + (of.row - first) * PANEL;
            float* total = totals + (of.row - first) * PANEL;
            Ints sum[VECTORS] = {};
            add_entries<Form::PAIRS, VECTORS>(of, x, sum);
            const Floats row_scale = all(w.row_scales[size_t(of.row)]);
            for (int v = 0; v < VECTORS; ++v) {
                const int at = v * LANES;
                const Floats so_far = is_first ? Floats{} : load(to + at);
                Floats value = rounded_once(__builtin_convertvector(sum[v], Floats), load(scales + at), so_far);
                if (is_last || (word + 1) % MOST_WORDS == 0) {
                    value = rounded_once(value, row_scale, word < MOST_WORDS ? Floats{} : load(total + at));
                    if (!is_last) store(total + at, value);
                }
                if (is_last) value = activate(panel.activation, panel.bias ? value + panel.bias[of.row] : value);
                store(to + at, value);
            }
        }
    }
}

template <Form FORM, int VECTORS>
void multiply_vectors(const Stream& w, int64_t first, int64_t last, const Panel& panel, float* out) {
    if (FORM == Form::PAIRS && w.in_bytes) return rows_times_bytes<VECTORS>(w, first, last, panel, out);
    rows_times_panel<FORM, VECTORS>(w, first, last, panel, out);
}
// Rows [first, last) of the results of one panel of activations; both are multiples of a group, or the last the end.
template <Form FORM>
void multiply_panel(const Stream& w, int64_t first, int64_t last, const Panel& panel, int64_t tokens, float* out) {
    switch ((tokens + LANES - 1) / LANES) {
        case 1: return multiply_vectors<FORM, 1>(w, first, last, panel, out);
        case 2: return multiply_vectors<FORM, 2>(w, first, last, panel, out);
        case 3: return multiply_vectors<FORM, 3>(w, first, last, panel, out);
        case 4: return multiply_vectors<FORM, 4>(w, first, last, panel, out);
        case 5: return multiply_vectors<FORM, MOST_VECTORS < 5 ? MOST_VECTORS : 5>(w, first, last, panel, out);
        default: return multiply_vectors<FORM, MOST_VECTORS>(w, first, last, panel, out);
    }
}

// Rounds a row of activations to 16-bit integers, two of which are written as one float; returns their scale, a NaN for
// a row that holds one or an infinity.
inline float to_pairs(const float* x, int64_t cols, float limit, float* out) {
    typedef int16_t Shorts __attribute__((vector_size(2 * LANES), aligned(2)));
    const int64_t whole = cols / LANES * LANES;
    Floats most{};
    Floats odd{};  // becomes NaN where a number is NaN or infinite: x - x
    for (int64_t i = 0; i < whole; i += LANES) {
        const Floats value = load(x + i);
        most = larger(most, absolute(value));
        odd += value - value;
    }
    float largest = largest_of(most);
    float rest = sum_of(odd);
    for (int64_t i = whole; i < cols; ++i) {
        largest = std::fabs(x[i]) > largest ? std::fabs(x[i]) : largest;
        rest += x[i] - x[i];
    }
    const float scale = largest > 0 ? largest / limit : 1.0f;
    const float inverse = 1.0f / scale;
    int16_t* to = reinterpret_cast<int16_t*>(out);
    for (int64_t i = 0; i < whole; i += LANES) {
        const Floats shifted = load(x + i) * inverse + 12582912.0f;  // the lowest bits hold the nearest integer
        *reinterpret_cast<Shorts*>(to + i) = __builtin_convertvector((Ints)shifted - 0x4b400000, Shorts);
    }
    for (int64_t i = whole; i < cols; ++i) to[i] = int16_t(int32_t(std::lrint(x[i] * inverse)));
    if (cols % 2) to[cols] = 0;
    return scale + rest;
}

// Rounds a word of up to 64 activations to 8 bits, stored as int16; returns their scale. The same integers as
// quantize_to_bytes of the decoder: a product rounded to fp32, then to the nearest integer.
inline float to_bytes(const float* x, int64_t count, int16_t* to) {
    int32_t most = 0;
    for (int64_t i = 0; i < count; ++i) {
        int32_t bits;
        std::memcpy(&bits, x + i, 4);
        most = std::max(most, bits & 0x7fffffff);
    }
    const Rounding rounding(most, 127);
    for (int64_t i = 0; i < count; ++i) to[i] = int16_t(rounding.inverse > 0 ? int32_t(__builtin_rintf(x[i] * rounding.inverse)) : 0);
    return rounding.scale;
}

// The activations of one panel as its product takes them; `scales` ([word] PANEL) are those of integers. False without memory.
inline bool pack_panel(const Stream& w, const Rows& x, float* panel, float* scales) {
    if (w.form != Form::PAIRS) {
        to_panel(x, panel);
        return true;
    }
    static thread_local Scratch rounded;
    float* rows = rounded.get<float>(x.tokens * w.width());
    if (!rows) return false;
    if (w.in_bytes) {
        constexpr int64_t COLUMNS = 2 * Stream::WORD_PAIRS;
        for (int64_t token = 0; token < x.tokens; ++token) {
            int16_t* to = reinterpret_cast<int16_t*>(rows + token * w.width());
            for (int64_t word = 0; word < w.chunks; ++word) {
                const int64_t count = std::min(x.width - word * COLUMNS, COLUMNS);
                scales[word * PANEL + token] = to_bytes(x.first + token * x.width + word * COLUMNS, count, to + word * COLUMNS);
            }
            if (x.width % 2) to[x.width] = 0;
        }
        for (int64_t word = 0; word < w.chunks; ++word)
            for (int64_t token = x.tokens; token < PANEL; ++token) scales[word * PANEL + token] = 0.0f;
        to_panel(Rows{rows, x.tokens, w.width()}, panel);
        return true;
    }
    for (int64_t token = 0; token < PANEL; ++token)
        scales[token] = token < x.tokens ? to_pairs(x.first + token * x.width, x.width, w.limit, rows + token * w.width()) : 0.0f;
    to_panel(Rows{rows, x.tokens, w.width()}, panel);
    return true;
}

// x (tokens, w.cols) to y (tokens, w.rows). parallel(count, work) calls work(0 .. count - 1). False without memory.
template <class Parallel>
bool sparse_product(const Stream& w, const float* x, int64_t tokens, const float* bias, int64_t activation, float* y,
                    const Parallel& parallel) {
    constexpr int64_t ENOUGH = 8;  // pieces of work for the threads of a session
    static thread_local Scratch shared;
    const int64_t panels = (tokens + PANEL - 1) / PANEL;
    const int64_t size = (w.width() + (w.in_bytes ? w.chunks : 1)) * PANEL;  // a panel, and its scales
    const int64_t parts = panels >= ENOUGH ? 1 : (ENOUGH + panels - 1) / panels;
    const int64_t step = round_up((w.rows + parts - 1) / parts, Stream::GROUP);
    const auto tokens_of = [&](int64_t panel) { return panel + 1 < panels ? PANEL : tokens - panel * PANEL; };
    std::atomic<bool> done{true};
    const auto pack = [&](int64_t panel, float* to) {
        const Rows rows{const_cast<float*>(x) + panel * PANEL * w.cols, tokens_of(panel), w.cols};
        if (!pack_panel(w, rows, to, to + w.width() * PANEL)) done.store(false);
    };
    float* packed = nullptr;
    if (parts > 1) {
        packed = shared.get<float>(panels * size);
        if (!packed) return false;
        parallel(panels, [&](int64_t panel) { pack(panel, packed + panel * size); });
    }
    parallel(panels * parts, [&](int64_t piece) {
        static thread_local Scratch own;
        static thread_local Scratch results;
        const int64_t panel = piece / parts;
        const int64_t first = piece % parts * step;
        const int64_t last = first + step < w.rows ? first + step : w.rows;
        if (first >= last) return;
        float* in = packed ? packed + panel * size : own.get<float>(size);
        float* out = results.get<float>((w.in_bytes && w.cols > MOST_COLUMNS ? 2 : 1) * (last - first) * PANEL);
        if (!in || !out) return done.store(false);
        if (!packed) pack(panel, in);
        const Panel activations{in, in + w.width() * PANEL, bias, activation};
        const auto multiply = w.form == Form::PAIRS   ? multiply_panel<Form::PAIRS>
                              : w.form == Form::CODES ? multiply_panel<Form::CODES>
                                                      : multiply_panel<Form::VALUES>;
        multiply(w, first, last, activations, tokens_of(panel), out);
        from_panel(out, first, last, Rows{y + panel * PANEL * w.rows, tokens_of(panel), w.rows});
    });
    return done.load();
}
