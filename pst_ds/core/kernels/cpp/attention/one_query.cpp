// softmax(scale q K') V for one query per head of some samples, with the native loop's attention: a plain C function
// for ctypes. Compiled for this machine only, so one instruction set is enough.
#include <vector>

#include "../decoder/activations.hpp"

namespace pst::one_query {
#if PST_X86 && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VNNI__)
#include "../lanes/avx512.hpp"
#elif PST_X86 && defined(__AVX2__) && defined(__FMA__)
#include "../lanes/avx2.hpp"
#else
#include "../lanes/portable.hpp"
#endif
#include "../decoder/attention.hpp"

// Numbers of samples and of groups of heads that share K and V; strides in elements.
struct Problem {
    int64_t samples, groups, heads, size, length;
    int64_t q_sample, q_head, k_sample, k_group, v_sample, v_group;
    float scale;
    const int64_t* begins;  // per sample: the first position that it sees
};

template <class T> void one_group(const Problem& p, int64_t i, const T* q, const T* k, const T* v, T* out) {
    const int64_t sample = i / p.groups, group = i % p.groups, heads = p.heads / p.groups, begin = p.begins[sample];
    static thread_local std::vector<float> memory;
    memory.resize(size_t(2 * heads * p.size + attention_room(p.length, p.size)));
    float *queries = memory.data(), *found = queries + heads * p.size;
    for (int64_t h = 0; h < heads; ++h)
        for (int64_t j = 0; j < p.size; ++j)
            queries[h * p.size + j] = pst::widen(q[sample * p.q_sample + (group * heads + h) * p.q_head + j]);
    attend({queries, k + sample * p.k_sample + group * p.k_group, v + sample * p.v_sample + group * p.v_group, nullptr,
            nullptr, found, heads, p.size, p.size, begin, p.length, p.scale, 0.0f, found + heads * p.size},
           8 * sizeof(T));
    for (int64_t j = 0; j < heads * p.size; ++j) narrow(found[j], out + i * heads * p.size + j);
}

template <class T> void run(const Problem& p, const void* q, const void* k, const void* v, void* out, int threads) {
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
#endif
    for (int64_t i = 0; i < p.samples * p.groups; ++i)
        one_group(p, i, static_cast<const T*>(q), static_cast<const T*>(k), static_cast<const T*>(v), static_cast<T*>(out));
    (void)threads;
}

}  // namespace pst::one_query

// q (samples, heads, size), K and V (samples, groups, length, size), their last two axes contiguous, and size a
// multiple of 16. sizes: the first eleven fields of Problem. out (samples, heads, size). bytes: per element, 2 for bf16
// and 4 for fp32.
extern "C" void pst_one_query(const void* q, const void* k, const void* v, const int64_t* sizes, const int64_t* begins,
                              float scale, int bytes, int threads, void* out) {
    pst::one_query::Problem p;
    std::memcpy(&p, sizes, 11 * sizeof(int64_t));
    p.scale = scale, p.begins = begins;
    bytes == 2 ? pst::one_query::run<pst::bf16>(p, q, k, v, out, threads) : pst::one_query::run<float>(p, q, k, v, out, threads);
}
