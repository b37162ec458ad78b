// Runs the loops behind the operators for ONNX Runtime on arrays of exactly their size, for a build with
// -fsanitize=address,undefined, and compares every result with a loop written out; then the operators themselves, as a
// crafted file would describe them. Prints what it found wrong.
// Arguments: number of random cases, seed, number of mutated attributes.

#include "../../../pst_ds/core/kernels/cpp/onnx/operators.cpp"

#include <cstdio>
#include <memory>
#include <random>

namespace driver {

template <class T> using Exact = std::unique_ptr<T[]>;  // a std::vector may have room to spare
template <class T> Exact<T> exact(int64_t count) { return Exact<T>(new T[size_t(count)]()); }

using Random = std::mt19937_64;
int64_t between(Random& random, int64_t low, int64_t high) { return low + int64_t(random() % uint64_t(high - low + 1)); }
int64_t one_of(Random& random, std::initializer_list<int64_t> choices) { return choices.begin()[random() % choices.size()]; }
float number(Random& random) { return float(between(random, -1000, 1000)) / 500.0f; }

Exact<float> numbers(Random& random, int64_t count) {
    Exact<float> made = exact<float>(count);
    for (int64_t i = 0; i < count; ++i) made[i] = number(random);
    return made;
}

struct Serial {
    template <class Work> void operator()(int64_t count, const Work& work) const {
        for (int64_t i = 0; i < count; ++i) work(i);
    }
};

int64_t wrong = 0;
void expect(double found, double wanted, double allowed, const char* what) {
    if (std::fabs(found - wanted) <= allowed) return;
    if (++wrong < 10) std::printf("%s: %g, not %g\n", what, found, wanted);
}

// A weight of one of the four kinds, and what it stands for.
struct Weight {
    pst::Parts parts;
    Exact<uint8_t> mask, bytes;
    Exact<pst::bf16> scales;
    Exact<float> dense;
};

Weight random_weight(Random& random, int64_t rows, int64_t cols) {
    const auto kind = pst::Parts::Kind(between(random, 0, 3));
    const int64_t keep = one_of(random, {0, 1, 3, 8, 15, 16}), stride = (cols + 7) / 8;
    const int64_t groups = kind >= pst::Parts::CODES8 && cols % 2 == 0 && random() % 2 ? 2 : 1;
    Weight w{{}, exact<uint8_t>(rows * stride), nullptr, exact<pst::bf16>(rows * groups), exact<float>(rows * cols)};
    for (int64_t i = 0; i < rows * groups; ++i) w.scales[i] = uint16_t(0x3f00 + 16 * between(random, 0, 15));
    std::vector<uint8_t> bytes;
    for (int64_t row = 0; row < rows; ++row) {
        int64_t in_row = 0;
        for (int64_t col = 0; col < cols; ++col) {
            if (int64_t(random() % 16) >= keep) continue;
            w.mask[row * stride + col / 8] |= uint8_t(1 << col % 8);
            const float scale = pst::widen(w.scales[row * groups + col / (cols / groups)]);
            float value = number(random);
            if (kind == pst::Parts::FP32)
                for (size_t i = 0; i < 4; ++i) bytes.push_back(reinterpret_cast<uint8_t*>(&value)[i]);
            if (kind == pst::Parts::BF16) {
                pst::bf16 narrow;
                pst::narrow(value, &narrow);
                value = pst::widen(narrow);
                bytes.push_back(uint8_t(narrow)), bytes.push_back(uint8_t(narrow >> 8));
            }
            if (kind == pst::Parts::CODES8) {
                const int64_t code = between(random, -127, 127);
                bytes.push_back(uint8_t(int8_t(code))), value = float(code) * scale;
            }
            if (kind == pst::Parts::CODES4) {
                const int64_t code = between(random, -7, 7);
                if (in_row % 2)
                    bytes.back() |= uint8_t((code & 15) << 4);
                else
                    bytes.push_back(uint8_t(code & 15));
                value = float(code) * scale;
            }
            ++in_row;
            w.dense[row * cols + col] = value;
        }
    }
    w.bytes = exact<uint8_t>(int64_t(bytes.size()));
    std::copy(bytes.begin(), bytes.end(), w.bytes.get());
    const int64_t size = kind == pst::Parts::FP32 ? 4 : kind == pst::Parts::BF16 ? 2 : 1;
    const bool has_scales = kind >= pst::Parts::CODES8;
    w.parts = {kind, w.bytes.get(), int64_t(bytes.size()) / size, w.mask.get(), has_scales ? w.scales.get() : nullptr,
               has_scales ? groups : 0, rows, cols};
    return w;
}

// Calls call(set) with the functions of every instruction set that this processor has.
#define PST_SET(space)                                                                                              \
    struct space##_set {                                                                                            \
        static constexpr int64_t panel = pst::space::PANEL;                                                         \
        template <class... A> static bool product(const A&... a) { return pst::space::sparse_product(a...); }       \
        template <class... A> static void layer_norm(const A&... a) { pst::space::layer_norm(a...); }               \
        static bool attention(const pst::AttentionCall& job) { return pst::space::attention(job, Serial{}); }        \
    }
PST_SET(onnx_portable);
#if PST_X86
PST_SET(onnx_avx2);
#if PST_COMPILES_AVX_VNNI
PST_SET(onnx_avx_vnni);
#endif
PST_SET(onnx_avx512);
#endif

template <class Call> void for_each_set(const Call& call) {
    call(onnx_portable_set{});
#if PST_X86
    if (pst::supports(pst::AVX2)) call(onnx_avx2_set{});
#if PST_COMPILES_AVX_VNNI
    if (pst::supports(pst::AVX_VNNI)) call(onnx_avx_vnni_set{});
#endif
    if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw")) call(onnx_avx512_set{});
#endif
}

// y is x W' + bias, but for `allowed` times the sum of a row's sizes.
void expect_product(const Weight& w, const Exact<float>& x, const float* bias, int64_t tokens, const Exact<float>& y,
                    double allowed, const char* what) {
    const int64_t rows = w.parts.rows, cols = w.parts.cols;
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t r = 0; r < rows; ++r) {
            double sum = bias ? bias[r] : 0, size = 0;
            for (int64_t c = 0; c < cols; ++c) {
                sum += double(x[t * cols + c]) * w.dense[r * cols + c];
                size += std::fabs(w.dense[r * cols + c]);
            }
            expect(y[t * rows + r], sum, size * allowed + 1e-5, what);
        }
}

void product_of_codes(const Weight& w, const Exact<float>& x, const float* bias, int64_t tokens, bool in_bytes) {
    pst::CodeProduct codes;
    Exact<float> y = exact<float>(tokens * w.parts.rows);
    if (!codes.make(w.parts, in_bytes)) ++wrong;
    codes.multiply(x.get(), tokens, bias, 0, y.get(), Serial{});
    expect_product(w, x, bias, tokens, y, in_bytes ? 1e-2 : 1e-4, "product of codes");
}

void product(Random& random) {
    const int64_t rows = between(random, 1, 70), cols = one_of(random, {1, 2, 7, 8, 9, 63, 64, 130, between(random, 1, 600)});
    const int64_t tokens = one_of(random, {1, 2, 7, 8, 9, 47, 48, 49, 96, 97, between(random, 1, 200)});
    Weight w = random_weight(random, rows, cols);
    Exact<float> x = numbers(random, tokens * cols), bias = numbers(random, rows);
    const bool has_bias = random() % 2;
    for_each_set([&](auto set) {
        pst::Stream stream;
        Exact<float> y = exact<float>(tokens * rows);
        if (!stream.make(w.parts, set.panel)) ++wrong;
        if (!set.product(stream, x.get(), tokens, static_cast<const float*>(has_bias ? bias.get() : nullptr), 0, y.get(), Serial{})) ++wrong;
        const double allowed = stream.form == pst::Form::PAIRS ? 4e-5 : 2e-6;
        expect_product(w, x, has_bias ? bias.get() : nullptr, tokens, y, allowed, "product");
        if (!pst::Stream::takes_bytes(w.parts)) return;
        pst::Stream bytes;
        if (!bytes.make(w.parts, set.panel, true)) ++wrong;
        if (!set.product(bytes, x.get(), tokens, static_cast<const float*>(has_bias ? bias.get() : nullptr), 0, y.get(), Serial{})) ++wrong;
        expect_product(w, x, has_bias ? bias.get() : nullptr, tokens, y, 1e-2, "product of bytes");
    });
    for (bool in_bytes : {false, true})
        if (pst::CodeProduct::pays(w.parts, in_bytes)) product_of_codes(w, x, has_bias ? bias.get() : nullptr, tokens, in_bytes);
    if (w.parts.count) {  // a value too few
        --w.parts.count;
        pst::Stream stream;
        pst::CodeProduct codes;
        if (stream.make(w.parts, 48)) ++wrong;
        if (w.parts.kind >= pst::Parts::CODES8 && codes.make(w.parts, false)) ++wrong;
    }
}

void normalization(Random& random) {
    const int64_t width = between(random, 1, 70);
    Exact<float> x = numbers(random, width), skip = numbers(random, width), gain = numbers(random, width), shift = numbers(random, width);
    double mean = 0, square = 0;
    for (int64_t i = 0; i < width; ++i) mean += (double(x[i]) + skip[i]) / double(width);
    for (int64_t i = 0; i < width; ++i) square += (x[i] + skip[i] - mean) * (x[i] + skip[i] - mean) / double(width);
    for_each_set([&](auto set) {
        Exact<float> y = exact<float>(width), sum = exact<float>(width);
        set.layer_norm(x.get(), skip.get(), gain.get(), shift.get(), 0.1f, width, y.get(), sum.get());
        for (int64_t i = 0; i < width; ++i)
            expect(y[i], (x[i] + skip[i] - mean) / std::sqrt(square + 0.1) * gain[i] + shift[i], 1e-4, "layer norm");
    });
}

void attention(Random& random) {
    const int64_t queries = between(random, 1, 20), keys = between(random, 1, 70), pad = between(random, 0, 3);
    const int64_t head = one_of(random, {16, 32, 48, between(random, 1, 40)});
    const int64_t width = 2 * head + pad;
    Exact<float> q = numbers(random, queries * width), k = numbers(random, keys * width), v = numbers(random, keys * width);
    Exact<float> mask = numbers(random, queries * keys);
    const auto check = [&](const auto& attend, double allowed) {
        Exact<float> y = exact<float>(queries * 2 * head);
        pst::AttentionCall job{q.get(), k.get(), v.get(), mask.get(), y.get(), 1, queries, keys, 2, 2, head,
                              width, width, width, 2 * head, 0, 0, keys, 0.3f};
        if (!attend(job)) ++wrong;
        for (int64_t h = 0; h < 2; ++h)
            for (int64_t i = 0; i < queries; ++i) {
                std::vector<double> share(size_t(keys), 0.0);
                double total = 0;
                for (int64_t j = 0; j < keys; ++j) {
                    double score = mask[i * keys + j];
                    for (int64_t d = 0; d < head; ++d) score += 0.3 * q[i * width + h * head + d] * k[j * width + h * head + d];
                    total += share[size_t(j)] = std::exp(score);
                }
                for (int64_t d = 0; d < head; ++d) {
                    double sum = 0;
                    for (int64_t j = 0; j < keys; ++j) sum += share[size_t(j)] / total * v[j * width + h * head + d];
                    expect(y[i * 2 * head + h * head + d], sum, allowed, "attention");
                }
            }
    };
    for_each_set([&](auto set) { check(set.attention, 1e-4); });
#if PST_COMPILES_AVX512_BF16
    const auto narrow = [](const pst::AttentionCall& job) { return pst::onnx_avx512::narrow_attention(job, Serial{}); };
    if (pst::operators().narrow_attention) check(narrow, 0.1);
#endif
}

}  // namespace driver

#include "mutated_nodes.hpp"

int main(int argc, char** argv) {
    if (argc != 4) return 2;
    driver::Random random(std::strtoull(argv[2], nullptr, 10));
    for (int64_t i = 0; i < std::atoll(argv[1]); ++i) {
        driver::product(random);
        driver::normalization(random);
        driver::attention(random);
    }
    driver::mutated_nodes(random, std::atoll(argv[3]));
    std::printf("%lld wrong\n", static_cast<long long>(driver::wrong));
    return driver::wrong != 0;
}
