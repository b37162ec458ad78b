// AVX-512, bf16, 1 to 31 vectors: the weight is read once, at the speed of memory. Included after avx512.hpp and
// panel.hpp.
//
// One vector: weights are expanded in registers and multiplied at once; a thread reads four rows, a quarter of its rows
// apart, because one stream of values does not keep the memory busy.
// More vectors: two buffers of ROWS expanded rows (bf16, `stride` apart, aligned to 64 bytes) per thread. While the rows in
// one are multiplied with the first COLUMNS vectors, the next rows are expanded into the other (`beside_`); the remaining
// vectors then follow. Rows near the end of `values`, where whole vectors may not be read, are expanded separately.
#pragma once

namespace pst::avx512 {

template <int LINES, class X> void one_row(const Job<bf16>& job, const X* x, int64_t row) {
    float sum[1];
    job.weight.may_overread(row, LANES) ? rows_dot<LINES, 1, true>(job.weight, {row}, x, sum)
                                        : rows_dot<LINES, 1, false>(job.weight, {row}, x, sum);
    job.store(0, row, sum[0]);
}

template <int LINES, class X> void one_vector(const Job<bf16>& job, const X* x, int64_t first, int64_t last) {
    constexpr int STREAMS = 4;
    const int64_t apart = (last - first) / STREAMS;
    for (int64_t i = 0; i < apart; ++i) {
        // the last row is nearest to the end of the values: if it may be overread, so may the others
        const int64_t row[STREAMS] = {first + i, first + apart + i, first + 2 * apart + i, first + 3 * apart + i};
        float sums[STREAMS];
        job.weight.may_overread(row[STREAMS - 1], LANES) ? rows_dot<LINES, STREAMS, true>(job.weight, row, x, sums)
                                                         : rows_dot<LINES, STREAMS, false>(job.weight, row, x, sums);
        for (int s = 0; s < STREAMS; ++s) job.store(0, row[s], sums[s]);
    }
    for (int64_t row = first + STREAMS * apart; row < last; ++row) one_row<LINES>(job, x, row);
}

// ROWS rows times all vectors, while the next ROWS rows are expanded, and so on.
template <int LINES> class RowsInTurn {
   public:
    RowsInTurn(const Job<bf16>& job, const bf16* x, int64_t stride, bf16* buffers)
        : job_(job), x_(x), stride_(stride), length_(round_up(job.weight.cols, LANES)),
          buffers_{buffers, buffers + ROWS * stride} {}

    void rows(int64_t first, int64_t last) {
        bool expanded = false;
        for (int64_t row = first; row < last; row += ROWS, turn_ ^= 1) {
            const int64_t here = row + ROWS < last ? ROWS : last - row;
            if (!expanded)  // the first rows, and those near the end of the values
                for (int64_t r = 0; r < here; ++r) Bf16<LINES>::expand(job_.weight, row + r, buffers_[turn_] + r * stride_);
            const int64_t next = row + ROWS;
            expanded = here == ROWS && next + ROWS <= last && job_.weight.may_overread(next + ROWS - 1, LANES);
            if (expanded) begin(next);
            multiply(row, here, expanded);
        }
    }

   private:
    void begin(int64_t row) {
        for (int r = 0; r < ROWS; ++r) {
            beside_.values[r] = job_.weight.values + job_.weight.row_offsets[row + r];
            beside_.mask[r] = job_.weight.mask_row(row + r);
        }
        beside_.out = buffers_[turn_ ^ 1];
    }
    void multiply(int64_t row, int64_t rows, bool beside) {
        int64_t column = 0;
        for (; column + COLUMNS <= job_.n; column += COLUMNS, beside = false) columns<COLUMNS>(row, rows, column, beside);
        for (; column + 4 <= job_.n; column += 4, beside = false) columns<4>(row, rows, column, beside);
        for (; column < job_.n; ++column, beside = false) columns<1>(row, rows, column, beside);
    }
    template <int C> void columns(int64_t row, int64_t rows, int64_t column, bool beside) {
        const bf16* a = buffers_[turn_];
        const bf16* x = x_ + column * stride_;
        float sums[ROWS * C];
        if (rows == ROWS) {
            beside ? block<ROWS, C, true, LINES>(a, x, stride_, length_, sums, &job_.weight, &beside_)
                   : block<ROWS, C, false>(a, x, stride_, length_, sums);
        } else
            for (int64_t r = 0; r < rows; ++r) block<1, C, false>(a + r * stride_, x, stride_, length_, sums + r * C);
        for (int64_t r = 0; r < rows; ++r)
            for (int c = 0; c < C; ++c) job_.store(column + c, row + r, sums[r * C + c]);
    }

    const Job<bf16>& job_;
    const bf16* x_;
    int64_t stride_;
    int64_t length_;
    bf16* buffers_[2];
    int turn_ = 0;
    Beside<ROWS> beside_;
};

template <int LINES> bool few_vectors(const Job<bf16>& job, int threads) {
    static thread_local Scratch x_memory;
    const int64_t stride = stride_of<Bf16<LINES>>(job.weight.cols);
    bf16* x = x_memory.get<bf16>(stride * job.n);
    if (!x) return false;
    copy_x<Bf16<LINES>>(job, x, stride);
    return in_parallel(job.weight.rows, threads, [&](int64_t first, int64_t last) {
        static thread_local Scratch buffers;
        if (job.n == 1) {
            one_vector<LINES>(job, x, first, last);
            return true;
        }
        bf16* both = buffers.get<bf16>(2 * ROWS * stride);
        if (!both) return false;
        RowsInTurn<LINES>(job, x, stride, both).rows(first, last);
        return true;
    });
}

// One vector with fp32 products.
template <int LINES> bool one_vector_fp32(const Job<bf16>& job, int threads) {
    static thread_local Scratch x_memory;
    const int64_t cols = job.weight.cols;
    const int64_t padded = round_up(cols, LANES);
    float* x = x_memory.get<float>(padded);
    if (!x) return false;
    // of each 32 values first those at even places, then those at odd, as dot() expects
    for (int64_t k = 0; k < padded; ++k) x[k / 32 * 32 + k % 2 * 16 + k % 32 / 2] = k < cols ? widen(job.x[k]) : 0.0f;
    return in_parallel(job.weight.rows, threads, [&](int64_t first, int64_t last) {
        one_vector<LINES>(job, x, first, last);
        return true;
    });
}

}  // namespace pst::avx512
