// y = activation(x W' + bias) with a sparse W: every non-zero times a panel of activations that lie side by side. Included
// once for each instruction set, after vectors.hpp and a transpose(): no #pragma once.

constexpr int MOST_VECTORS = 6;                     // of activations at a time, as many sums in registers
constexpr int64_t PANEL = int64_t(MOST_VECTORS) * LANES;

// Where activations or results of one panel lie: `tokens` rows of `width` floats, at most PANEL of them.
struct Rows {
    float* first;
    int64_t tokens, width;
};

// panel[column][token], PANEL tokens apart, from rows; tokens up to the next whole vector are zeros.
inline void to_panel(const Rows& rows, float* panel) {
    const int64_t vectors = (rows.tokens + LANES - 1) / LANES, whole = rows.width / LANES * LANES;
    for (int64_t v = 0; v < vectors; ++v) {
        const int64_t from = v * LANES, count = rows.tokens - from < LANES ? rows.tokens - from : LANES;
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

// Sums of VECTORS vectors of tokens over the entries of a row. Two sums of each where there are few: a sum waits for itself.
template <int VECTORS>
inline void add_entries(const Stream::Entry* at, const Stream::Entry* end, const char* panel, Floats (&sum)[VECTORS]) {
    if (VECTORS <= 3) {
        Floats other[VECTORS] = {};
        for (; at + 2 <= end; at += 2) {
            const float *x = reinterpret_cast<const float*>(panel + at[0].offset);
            const float *z = reinterpret_cast<const float*>(panel + at[1].offset);
            const Floats a = all(at[0].value), b = all(at[1].value);
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; ++v) {
                sum[v] += a * load(x + v * LANES);
                other[v] += b * load(z + v * LANES);
            }
        }
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v) sum[v] += other[v];
    }
    for (; at < end; ++at) {
        const float* x = reinterpret_cast<const float*>(panel + at->offset);
        const Floats weight = all(at->value);
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v) sum[v] += weight * load(x + v * LANES);
    }
}

template <int VECTORS>
void rows_times_panel(const Stream& w, int64_t first, int64_t last, const float* x, const float* bias, int64_t activation,
                      float* out) {
    for (int64_t chunk = 0; chunk < w.chunks; ++chunk) {
        const char* panel = reinterpret_cast<const char*>(x + chunk * w.chunk * PANEL);
        const bool is_last = chunk + 1 == w.chunks;
        for (int64_t row = first; row < last; ++row) {
            float* to = out + (row - first) * PANEL;
            Floats sum[VECTORS];
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; ++v) sum[v] = chunk ? load(to + v * LANES) : all(bias ? bias[row] : 0.0f);
            add_entries<VECTORS>(w.begin(chunk, row), w.end(chunk, row), panel, sum);
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; ++v) store(to + v * LANES, is_last ? activate(activation, sum[v]) : sum[v]);
        }
    }
}

// Rows [first, last) of the results of one panel of activations.
inline void multiply_panel(const Stream& w, int64_t first, int64_t last, const float* x, int64_t tokens, const float* bias,
                           int64_t activation, float* out) {
    switch ((tokens + LANES - 1) / LANES) {
        case 1: return rows_times_panel<1>(w, first, last, x, bias, activation, out);
        case 2: return rows_times_panel<2>(w, first, last, x, bias, activation, out);
        case 3: return rows_times_panel<3>(w, first, last, x, bias, activation, out);
        case 4: return rows_times_panel<4>(w, first, last, x, bias, activation, out);
        case 5: return rows_times_panel<5>(w, first, last, x, bias, activation, out);
        default: return rows_times_panel<6>(w, first, last, x, bias, activation, out);
    }
}

// x (tokens, w.cols) to y (tokens, w.rows). parallel(count, work) calls work(0 .. count - 1). False without memory.
template <class Parallel>
bool sparse_product(const Stream& w, const float* x, int64_t tokens, const float* bias, int64_t activation, float* y,
                    const Parallel& parallel) {
    constexpr int64_t ENOUGH = 8;  // pieces of work for the threads of a session
    static thread_local Scratch shared;
    const int64_t panels = (tokens + PANEL - 1) / PANEL;
    const int64_t parts = panels >= ENOUGH ? 1 : (ENOUGH + panels - 1) / panels, step = round_up((w.rows + parts - 1) / parts, LANES);
    const auto tokens_of = [&](int64_t panel) { return panel + 1 < panels ? PANEL : tokens - panel * PANEL; };
    const auto x_of = [&](int64_t panel) {
        return Rows{const_cast<float*>(x) + panel * PANEL * w.cols, tokens_of(panel), w.cols};
    };
    float* packed = nullptr;
    if (parts > 1) {
        packed = shared.get<float>(panels * w.cols * PANEL);
        if (!packed) return false;
        parallel(panels, [&](int64_t panel) { to_panel(x_of(panel), packed + panel * w.cols * PANEL); });
    }
    std::atomic<bool> done{true};
    parallel(panels * parts, [&](int64_t piece) {
        static thread_local Scratch own, results;
        const int64_t panel = piece / parts, first = piece % parts * step, last = first + step < w.rows ? first + step : w.rows;
        if (first >= last) return;
        float* in = packed ? packed + panel * w.cols * PANEL : own.get<float>(w.cols * PANEL);
        float* out = results.get<float>((last - first) * PANEL);
        if (!in || !out) return done.store(false);
        if (!packed) to_panel(x_of(panel), in);
        multiply_panel(w, first, last, in, tokens_of(panel), bias, activation, out);
        from_panel(out, first, last, Rows{y + panel * PANEL * w.rows, tokens_of(panel), w.rows});
    });
    return done.load();
}
