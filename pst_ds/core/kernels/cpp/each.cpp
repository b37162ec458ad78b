// y[b] + beta U_b (V_b x[b]) for samples with different updates, or none, without copying the factors: a plain C
// function for ctypes. U is (outputs, rank) and V (rank, inputs), row by row, in bf16 or fp32; sums are fp32.
#include <cstdint>
#include <vector>

#include "bf16.hpp"

namespace {

using pst::bf16;
using pst::narrow;
using pst::widen;

constexpr int LANES = 16;

// Sixteen partial sums, added in a fixed order, so that a product is bit-identical in every batch.
template <class F> float dot(const F* a, const float* b, int64_t count) {
    float sums[LANES] = {};
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES)
        for (int l = 0; l < LANES; ++l) sums[l] += widen(a[i + l]) * b[i + l];
    float sum = 0;
    for (int l = 0; l < LANES; ++l) sum += sums[l];
    for (; i < count; ++i) sum += widen(a[i]) * b[i];
    return sum;
}

template <int RANK, class F> inline float short_dot(const F* a, const float* b, int64_t rank) {
    float sum = 0;
    for (int64_t k = 0; k < (RANK ? RANK : rank); ++k) sum += widen(a[k]) * b[k];
    return sum;
}

template <int RANK, class T, class F>
void add_left(const F* left, const float* inner, int64_t outputs, int64_t rank, float beta, const T* y, T* out) {
    for (int64_t o = 0; o < outputs; ++o) narrow(widen(y[o]) + beta * short_dot<RANK>(left + o * rank, inner, rank), out + o);
}

struct Job {
    const void* const* lefts;
    const void* const* rights;
    int64_t samples, tokens, outputs, inputs, rank;
    float beta;
    int threads;
};

template <class T, class F> void run(const Job& job, const T* x, const T* y, T* out) {
    const int64_t rows = job.samples * job.tokens;
#ifdef _OPENMP
#pragma omp parallel for num_threads(job.threads) if (job.threads > 1 && rows > 1) schedule(static)
#endif
    for (int64_t row = 0; row < rows; ++row) {
        const T *y_row = y + row * job.outputs, *x_row = x + row * job.inputs;
        T* out_row = out + row * job.outputs;
        const F* left = static_cast<const F*>(job.lefts[row / job.tokens]);
        const F* right = static_cast<const F*>(job.rights[row / job.tokens]);
        if (!left) {
            std::memcpy(out_row, y_row, size_t(job.outputs) * sizeof(T));
            continue;
        }
        static thread_local std::vector<float> memory;
        memory.resize(size_t(job.inputs + job.rank));
        float *wide = memory.data(), *inner = wide + job.inputs;
        for (int64_t i = 0; i < job.inputs; ++i) wide[i] = widen(x_row[i]);
        for (int64_t k = 0; k < job.rank; ++k) inner[k] = dot(right + k * job.inputs, wide, job.inputs);
        if (job.rank == 8) add_left<8>(left, inner, job.outputs, job.rank, job.beta, y_row, out_row);
        else if (job.rank == 16) add_left<16>(left, inner, job.outputs, job.rank, job.beta, y_row, out_row);
        else add_left<0>(left, inner, job.outputs, job.rank, job.beta, y_row, out_row);
    }
}

template <class T> void run(const Job& job, int factor_bytes, const void* x, const void* y, void* out) {
    const T *from = static_cast<const T*>(x), *to = static_cast<const T*>(y);
    factor_bytes == 2 ? run<T, bf16>(job, from, to, static_cast<T*>(out)) : run<T, float>(job, from, to, static_cast<T*>(out));
}

}  // namespace

// x (samples, tokens, inputs), y and out (samples, tokens, outputs) have `bytes` per element, the factors
// `factor_bytes`: 2 for bf16, 4 for fp32. lefts, rights: a pointer per sample, null for none. out may be y.
extern "C" void pst_add_beside_each(const void* const* lefts, const void* const* rights, int64_t samples, int64_t tokens,
                                    int64_t outputs, int64_t inputs, int64_t rank, float beta, int factor_bytes, const void* x,
                                    const void* y, void* out, int bytes, int threads) {
    const Job job{lefts, rights, samples, tokens, outputs, inputs, rank, beta, threads};
    bytes == 2 ? run<bf16>(job, factor_bytes, x, y, out) : run<float>(job, factor_bytes, x, y, out);
}
