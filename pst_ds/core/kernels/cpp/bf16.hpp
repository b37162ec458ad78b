// Conversion between bf16 and fp32, and unaligned loads, for every C++ source of the package.
//
// A bf16 number is the upper half of the fp32 number with the same sign and exponent, stored as uint16_t in the order of
// bytes of the processor. Widening is a shift and always exact. Narrowing rounds to nearest, ties to even, which is
// what torch does, so that a weight has the same bits in native code and in torch.
#pragma once

#include <cstdint>
#include <cstring>

namespace pst {

using bf16 = uint16_t;

// A value of type V, such as a vector, at an address that need not be aligned for it. Compiles to one unaligned load.
template <class V, class T> inline V load(const T* from) {
    V value;
    std::memcpy(&value, from, sizeof(V));
    return value;
}

inline float widen(float value) { return value; }
inline float widen(bf16 value) {
    const uint32_t bits = uint32_t(value) << 16;
    float wide;
    std::memcpy(&wide, &bits, 4);
    return wide;
}

inline void narrow(float value, float* to) { *to = value; }
inline void narrow(float value, bf16* to) {  // to nearest, ties to even; a NaN stays NaN
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
    // Rounding a NaN could carry into its exponent and make it infinite; 0x40 is the bit that makes it a quiet NaN.
    *to = bf16(is_nan ? bits >> 16 | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace pst
