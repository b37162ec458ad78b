// Masks on weights, as plain C functions for ctypes; the torch twin is apply_mask_ in core/bits.py.

#include <cstdint>
#include <cstring>

#ifdef __AVX512BW__
#include <immintrin.h>
#endif

namespace {

// As many weights of T as a vector of 32 bytes holds, and one bit of a word for each.
template <class T> struct Lanes;
template <> struct Lanes<uint16_t> {
    typedef uint16_t words __attribute__((vector_size(32)));
    static constexpr words each = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768};
};
template <> struct Lanes<uint32_t> {
    typedef uint32_t words __attribute__((vector_size(32)));
    static constexpr words each = {1, 2, 4, 8, 16, 32, 64, 128};
};

#ifdef __AVX512BW__
inline void keep_vector(uint16_t* values, const uint8_t* bits) {
    __mmask32 kept;
    std::memcpy(&kept, bits, sizeof kept);
    _mm512_storeu_si512(values, _mm512_maskz_loadu_epi16(kept, values));
}
inline void keep_vector(uint32_t* values, const uint8_t* bits) {
    __mmask16 kept;
    std::memcpy(&kept, bits, sizeof kept);
    _mm512_storeu_si512(values, _mm512_maskz_loadu_epi32(kept, values));
}
constexpr int VECTOR_BYTES = 64;
#else
template <class T> inline void keep_vector(T* values, const uint8_t* bits) {
    typedef typename Lanes<T>::words words;
    constexpr int num_bytes = 32 / sizeof(T) / 8;
    uint32_t kept = 0;
    std::memcpy(&kept, bits, num_bytes);
    words found, spread = Lanes<T>::each - Lanes<T>::each + T(kept);
    std::memcpy(&found, values, sizeof found);
    found &= words((spread & Lanes<T>::each) != 0);
    std::memcpy(values, &found, sizeof found);
}
constexpr int VECTOR_BYTES = 32;
#endif

template <class T> void keep(T* values, const uint8_t* bits, int64_t n) {
    constexpr int64_t step = VECTOR_BYTES / sizeof(T);
    int64_t i = 0;
    for (; i + step <= n; i += step) keep_vector(values + i, bits + i / 8);
    for (; i < n; ++i)
        if (!(bits[i >> 3] >> (i & 7) & 1)) values[i] = 0;
}

}  // namespace

// Of n values of `size` bytes, 2 or 4, those whose bit is 0 become +0.0.
extern "C" void pst_apply_bits(void* values, int64_t size, const uint8_t* bits, int64_t n) {
    if (size == 2) keep(static_cast<uint16_t*>(values), bits, n);
    else keep(static_cast<uint32_t*>(values), bits, n);
}
