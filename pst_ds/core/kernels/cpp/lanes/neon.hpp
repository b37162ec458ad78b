// Eight lanes with NEON, in two registers. Included first for an instruction set, inside a region compiled for it and a
// namespace: no #pragma once.
//
// Every function has the bits of portable.hpp on arm64: sums of lanes are the additions of sum_of, in its order.
// The functions are listed in portable.hpp.

constexpr int LANES = 8;
#include "types.hpp"

inline Floats larger(Floats a, Floats b) { return choose(a > b, a, b); }
inline Floats smaller(Floats a, Floats b) { return choose(a < b, a, b); }

#include "functions.hpp"

// The two registers of a vector.
template <class Register> struct Halves {
    Register of[2];
    template <class Vector> static Halves in(const Vector& vector) {
        Halves halves;
        std::memcpy(&halves, &vector, sizeof halves);
        return halves;
    }
    template <class Vector> Vector joined() const {
        Vector vector;
        std::memcpy(&vector, this, sizeof vector);
        return vector;
    }
};

inline Floats widen(const bf16* from) {
    const uint16x8_t narrow = vld1q_u16(from);
    const Halves<uint32x4_t> wide{{vshll_n_u16(vget_low_u16(narrow), 16), vshll_n_u16(vget_high_u16(narrow), 16)}};
    return wide.joined<Floats>();
}
inline Floats widen(const int8_t* from) {
    const int16x8_t narrow = vmovl_s8(vld1_s8(from));
    const Halves<float32x4_t> wide{
        {vcvtq_f32_s32(vmovl_s16(vget_low_s16(narrow))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(narrow)))}};
    return wide.joined<Floats>();
}
inline Floats fused(Floats a, Floats b, Floats c) {
    const auto x = Halves<float32x4_t>::in(a);
    const auto y = Halves<float32x4_t>::in(b);
    auto sum = Halves<float32x4_t>::in(c);
    for (int h = 0; h < 2; ++h) sum.of[h] = vfmaq_f32(sum.of[h], x.of[h], y.of[h]);
    return sum.joined<Floats>();
}
inline Floats rounded_once(Floats a, Floats b, Floats c) { return fused(a, b, c); }
// Of two vectors of four lanes, lanes 0 and 2, and lanes 1 and 3, added.
inline float32x4_t two_sums_each(float32x4_t a, float32x4_t b) {
    const float64x2_t first = vreinterpretq_f64_f32(a);
    const float64x2_t second = vreinterpretq_f64_f32(b);
    return vaddq_f32(vreinterpretq_f32_f64(vzip1q_f64(first, second)), vreinterpretq_f32_f64(vzip2q_f64(first, second)));
}
// to[i] = the sum of the lanes of of[i].
inline void store_sums(const Floats (&of)[4], float* to) {
    float32x4_t four[4];
    for (int i = 0; i < 4; ++i) {
        const auto halves = Halves<float32x4_t>::in(of[i]);
        four[i] = vaddq_f32(halves.of[0], halves.of[1]);
    }
    vst1q_f32(to, vpaddq_f32(two_sums_each(four[0], four[1]), two_sums_each(four[2], four[3])));
}
#include "transpose.hpp"
// sum + the products of the 16-bit halves of a and b.
inline Ints add_pairs(Ints sum, Ints a, Ints b) {
    const auto x = Halves<int16x8_t>::in(a);
    const auto y = Halves<int16x8_t>::in(b);
    auto total = Halves<int32x4_t>::in(sum);
    for (int h = 0; h < 2; ++h) {
        const int32x4_t lower = vmull_s16(vget_low_s16(x.of[h]), vget_low_s16(y.of[h]));
        const int32x4_t upper = vmull_s16(vget_high_s16(x.of[h]), vget_high_s16(y.of[h]));
        total.of[h] = vaddq_s32(total.of[h], vpaddq_s32(lower, upper));
    }
    return total.joined<Ints>();
}
