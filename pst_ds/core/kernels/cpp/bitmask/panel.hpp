// Products in panels: a few rows of the weight are expanded into a buffer that stays in the cache, then multiplied.
// Included once per instruction set, inside a region compiled for it and a namespace: no #pragma once.
//
// Layout
//   x copy  (n, stride) of type C: the vectors of x, each padded with zeros to `stride`. One copy per call, made by the
//           calling thread and read by all.
//   panel   (rows, stride) of type C: expanded rows of W, with zeros at pruned places. One per thread.
// Both are aligned to 64 bytes, and so are their rows. A product reads round_up(cols, lanes) elements of each row, which
// are all written.
//
// `Kernel` has: T, the type of the weight; C, the type computed with; lanes; rows_at_once; columns_at_once (vectors of
// x); expand(weight, row, out); block<ROWS, COLUMNS>(a, b, stride, length, sums), which writes sums[row][column].

constexpr int64_t MANY_VECTORS = 32;  // from here on larger panels pay
constexpr int64_t PANEL_ROWS = 48;    // a multiple of every rows_at_once

// Distance of rows and vectors in elements: whole cache lines, and not a power of two of them.
template <class Kernel> inline int64_t stride_of(int64_t cols) {
    constexpr int64_t line = 64 / sizeof(typename Kernel::C);
    return round_up(round_up(cols, Kernel::lanes), line) + line;
}

// A block of ROWS rows, from the start of `a`, with COLUMNS vectors: store its results.
template <class Kernel, int ROWS, int COLUMNS>
inline void store_block(const Job<typename Kernel::T>& job, const typename Kernel::C* a, int64_t row,
                        const typename Kernel::C* x, int64_t column, int64_t stride) {
    float sums[ROWS * COLUMNS];
    Kernel::template block<ROWS, COLUMNS>(a, x + column * stride, stride, round_up(job.weight.cols, Kernel::lanes), sums);
    for (int r = 0; r < ROWS; ++r)
        for (int c = 0; c < COLUMNS; ++c) job.store(column + c, row + r, sums[r * COLUMNS + c]);
}

// All rows of a panel with COLUMNS vectors.
template <class Kernel, int COLUMNS>
inline void multiply_columns(const Job<typename Kernel::T>& job, const typename Kernel::C* panel, int64_t first,
                             int64_t last, const typename Kernel::C* x, int64_t column, int64_t stride) {
    constexpr int R = Kernel::rows_at_once;
    int64_t row = first;
    for (; row + R <= last; row += R)
        store_block<Kernel, R, COLUMNS>(job, panel + (row - first) * stride, row, x, column, stride);
    for (; row < last; ++row)
        store_block<Kernel, 1, COLUMNS>(job, panel + (row - first) * stride, row, x, column, stride);
}

// All rows of a panel with all vectors: the outer loop is over vectors, so the panel is read from the cache each time.
template <class Kernel>
inline void multiply_panel(const Job<typename Kernel::T>& job, const typename Kernel::C* panel, int64_t first,
                           int64_t last, const typename Kernel::C* x, int64_t stride) {
    constexpr int N = Kernel::columns_at_once;
    int64_t column = 0;
    for (; column + N <= job.n; column += N) multiply_columns<Kernel, N>(job, panel, first, last, x, column, stride);
    for (; column < job.n; ++column) multiply_columns<Kernel, 1>(job, panel, first, last, x, column, stride);
}

// Copy x in the type computed with, each vector `stride` long and zero beyond its end.
template <class Kernel> inline void copy_x(const Job<typename Kernel::T>& job, typename Kernel::C* out, int64_t stride) {
    for (int64_t c = 0; c < job.n; ++c) {
        const typename Kernel::T* from = job.x + c * job.weight.cols;
        typename Kernel::C* to = out + c * stride;
        for (int64_t k = 0; k < job.weight.cols; ++k) convert(from[k], to + k);
        std::memset(static_cast<void*>(to + job.weight.cols), 0, size_t(stride - job.weight.cols) * sizeof(*to));
    }
}

// A whole call. False if memory is short.
template <class Kernel> bool multiply(const Job<typename Kernel::T>& job, int threads) {
    using C = typename Kernel::C;
    static thread_local Scratch x_memory;
    const int64_t stride = stride_of<Kernel>(job.weight.cols);
    C* x = x_memory.get<C>(stride * job.n);
    if (!x) return false;
    copy_x<Kernel>(job, x, stride);
    return in_parallel(job.weight.rows, threads, [&](int64_t first, int64_t last) {
        static thread_local Scratch panel_memory;
        const int64_t panel = job.n < MANY_VECTORS ? Kernel::rows_at_once : PANEL_ROWS;
        C* buffer = panel_memory.get<C>(stride * panel);
        if (!buffer) return false;
        for (int64_t row = first; row < last; row += panel) {
            const int64_t end = row + panel < last ? row + panel : last;
            for (int64_t r = row; r < end; ++r) Kernel::expand(job.weight, r, buffer + (r - row) * stride);
            multiply_panel<Kernel>(job, buffer, row, end, x, stride);
        }
        return true;
    });
}
