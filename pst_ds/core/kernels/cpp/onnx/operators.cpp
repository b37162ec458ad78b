// Operators for ONNX Runtime, domain "pst_ds": products with sparse weights, and what lies between them in a transformer.
//   SparseLinear (x, mask, values, scales?, bias?) -> y                     bits, columns, activation, activation_bits
//   SkipLayerNorm (x, skip?, gain, shift?) -> y, sum?                       epsilon
//   Attention (q, k, v, mask?) -> y                                         heads, key_value_heads, head_size, scale, *_offset,
//                                                                           activation_bits
//   Embedding (ids, values, scales?) -> y                                   bits, columns
// The graphs that use them are written by pst_ds/inference/onnx.
#include <cmath>
#include <new>

#include "../decoder/kernels.hpp"
#include "functions.hpp"

namespace pst::onnx_portable {
#include "../lanes/portable.hpp"
#include "attention.hpp"
#include "layer_norm.hpp"
#include "product.hpp"
#include "table.hpp"
}  // namespace pst::onnx_portable

#if PST_X86
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace pst::onnx_avx2 {
#include "../lanes/avx2.hpp"
#include "attention.hpp"
#include "layer_norm.hpp"
#include "product.hpp"
#include "table.hpp"
}  // namespace pst::onnx_avx2
#pragma GCC pop_options

#if PST_COMPILES_AVX_VNNI
#define PST_AVX_VNNI
#pragma GCC push_options
#pragma GCC target("avx2,fma,avxvnni")
namespace pst::onnx_avx_vnni {
#include "../lanes/avx2.hpp"
#include "attention.hpp"
#include "layer_norm.hpp"
#include "product.hpp"
#include "table.hpp"
}  // namespace pst::onnx_avx_vnni
#pragma GCC pop_options
#undef PST_AVX_VNNI
#endif

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma")
namespace pst::onnx_avx512 {
#include "../lanes/avx512.hpp"
#include "attention.hpp"
#include "layer_norm.hpp"
#include "product.hpp"
#include "table.hpp"
}  // namespace pst::onnx_avx512
#pragma GCC pop_options

#if PST_COMPILES_AVX512_BF16
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,fma")
namespace pst::onnx_avx512 {
#include "attention_bf16.hpp"
}  // namespace pst::onnx_avx512
#pragma GCC pop_options
#endif
#endif

namespace pst {

inline const OperatorTable& operators() {
    static const OperatorTable best = [] {
#if PST_X86
        __builtin_cpu_init();
        const int asked = asked_level();
        if (asked == PORTABLE) return onnx_portable::table();
        if (asked == AVX2) return onnx_avx2::table();
        const bool avx512 = asked != AVX_VNNI && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                            __builtin_cpu_supports("avx512vnni");
        if (avx512) {
            OperatorTable table = onnx_avx512::table();
#if PST_COMPILES_AVX512_BF16
            if (__builtin_cpu_supports("avx512bf16")) table.narrow_attention = onnx_avx512::narrow_attention<Parallel>;
#endif
            return table;
        }
#if PST_COMPILES_AVX_VNNI
        if (supports(AVX_VNNI)) return onnx_avx_vnni::table();
#endif
        if (supports(AVX2)) return onnx_avx2::table();
#endif
        return onnx_portable::table();
    }();
    return best;
}

}  // namespace pst

#include "nodes.hpp"

extern "C" __attribute__((visibility("default"))) ort::Status* RegisterCustomOps(ort::SessionOptions* options,
                                                                                 const ort::ApiBase* base) {
    return pst::register_operators(options, base);
}

// The instruction set of products with codes, see decoder/kernels.hpp.
extern "C" __attribute__((visibility("default"))) int pst_onnx_level() { return pst::best_level(); }

// Let sessions opened from now on use 16 bits where their graph allows 8, for comparisons.
extern "C" __attribute__((visibility("default"))) void pst_onnx_exact_inputs(int exact) { pst::exact_inputs() = exact != 0; }
