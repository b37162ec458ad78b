// y = x W' + bias with W as a bitmask: one plain C function for ctypes, which picks the instruction set.
#include "common.hpp"

#if PST_X86
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,avx512bf16,popcnt,bmi,bmi2,fma")
#include "avx512.hpp"
namespace pst::avx512 {
#include "panel.hpp"
}
#pragma GCC target("amx-tile,amx-bf16")
#include "amx.hpp"
#pragma GCC pop_options
#endif

extern "C" int pst_bitmask_linear(const void* values, const uint8_t* mask, const int64_t* offsets, int64_t rows,
                                  int64_t cols, int64_t count, const void* x, const void* bias, void* y, int64_t n,
                                  int type, int threads, int isa) {
    using namespace pst;
    Job<bf16> job{{(const bf16*)values, mask, offsets, rows, cols, count}, (const bf16*)x, (const bf16*)bias, (bf16*)y, n};
    if (isa == 1 && amx::allowed()) switch (job.weight.lines_in_128()) {
        case 1: return amx::multiply<1>(job, threads);
        case 2: return amx::multiply<2>(job, threads);
        case 3: return amx::multiply<3>(job, threads);
        default: return amx::multiply<4>(job, threads);
    }
    switch (job.weight.lines_in_128()) {
        case 1: return avx512::multiply<avx512::Bf16<1>>(job, threads);
        case 2: return avx512::multiply<avx512::Bf16<2>>(job, threads);
        case 3: return avx512::multiply<avx512::Bf16<3>>(job, threads);
        default: return avx512::multiply<avx512::Bf16<4>>(job, threads);
    }
}
