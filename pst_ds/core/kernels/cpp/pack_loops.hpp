// Loops between a dense matrix and its kept values. Included by pack.cpp once per instruction set, inside a region
// compiled for it and a namespace, with PST_WIDE 1 for AVX-512 with VBMI2: no #pragma once.
//
// Arrays are described in pack.cpp. A vector holds LANES = 64 / sizeof(T) weights and their bits are LANES / 8 whole
// bytes, so that a vector of weights and its word of bits always start together. The last columns of a row, fewer than
// LANES, are handled byte by byte: the next row's bits start at a new byte.
//
// A packed array ends at `total` values, and neither a load nor a store may pass its end, since the memory behind it may
// belong to another tensor of a file. Inside the array whole vectors are written: the places behind the kept values are
// overwritten by the next vector.

// The bits of -0.
template <class T> constexpr T SIGN = T(T(1) << (sizeof(T) * 8 - 1));

inline int64_t bytes_of_row(int64_t columns) { return (columns + 7) / 8; }

#if PST_WIDE
// Operations on a register of 64, 32, 16 or 8 weights, and on the mask register that holds their bits.
template <class T> struct Wide;

#define PST_WIDE_OF(TYPE, MASK, BITS, LOADED)                                                                          \
    template <> struct Wide<TYPE> {                                                                                    \
        typedef MASK Mask;                                                                                             \
        static __m512i all(TYPE value) { return _mm512_set1_epi##BITS(LOADED(value)); }                                \
        static Mask nonzero(__m512i v, TYPE bits) { return _mm512_test_epi##BITS##_mask(v, all(bits)); }               \
        static __m512i without_negative_zero(__m512i v) {                                                              \
            return _mm512_maskz_mov_epi##BITS(_mm512_cmpneq_epi##BITS##_mask(v, all(SIGN<TYPE>)), v);                  \
        }                                                                                                              \
        static __m512i compress(Mask k, __m512i v) { return _mm512_maskz_compress_epi##BITS(k, v); }                   \
        static __m512i expand(Mask k, __m512i v) { return _mm512_maskz_expand_epi##BITS(k, v); }                       \
        static __m512i add(__m512i a, __m512i b) { return _mm512_add_epi##BITS(a, b); }                                \
        static __m512i load_some(Mask k, const TYPE* from) { return _mm512_maskz_loadu_epi##BITS(k, from); }           \
        static void store_some(TYPE* to, Mask k, __m512i v) { _mm512_mask_storeu_epi##BITS(to, k, v); }                \
    };
PST_WIDE_OF(uint8_t, __mmask64, 8, char)
PST_WIDE_OF(uint16_t, __mmask32, 16, short)
PST_WIDE_OF(uint32_t, __mmask16, 32, int)
PST_WIDE_OF(uint64_t, __mmask8, 64, (long long))

template <class T> constexpr int64_t LANES = 64 / sizeof(T);

template <class T> inline typename Wide<T>::Mask load_mask(const uint8_t* bits) {
    typename Wide<T>::Mask mask;
    std::memcpy(&mask, bits, sizeof mask);
    return mask;
}

template <class T> inline typename Wide<T>::Mask first(int64_t count) {
    return typename Wide<T>::Mask((uint64_t(1) << count) - 1);
}

// Compress ``v`` to ``out``, which has ``room`` places; whole registers are written while they fit.
template <class T> inline int64_t put(T* out, int64_t room, typename Wide<T>::Mask keep, __m512i v) {
    int64_t count = __builtin_popcountll(keep);
    v = Wide<T>::compress(keep, v);
    if (room >= LANES<T>)
        _mm512_storeu_si512(out, v);
    else
        Wide<T>::store_some(out, first<T>(count), v);
    return count;
}
#endif

// Visit the columns from ``col`` on whose bits are set, byte by byte.
template <class F> inline void each_set(const uint8_t* bits, int64_t col, int64_t columns, F visit) {
    for (; col < columns; col += 8)
        // byte & (byte - 1) clears the lowest set bit
        for (unsigned byte = bits[col / 8]; byte; byte &= byte - 1) visit(col + __builtin_ctz(byte));
}

// The bits of all weights that are not +0 or -0, which differ from zero in more than their sign.
template <class T> void row_bits(const T* weight, int64_t rows, int64_t columns, uint8_t* bits) {
    const T magnitude = T(~SIGN<T>);
    for (int64_t row = 0; row < rows; ++row, weight += columns, bits += bytes_of_row(columns)) {
        int64_t col = 0;
#if PST_WIDE
        for (; col + LANES<T> <= columns; col += LANES<T>) {
            auto mask = Wide<T>::nonzero(_mm512_loadu_si512(weight + col), magnitude);
            std::memcpy(bits + col / 8, &mask, sizeof mask);
        }
#endif
        for (; col < columns; col += 8) {
            unsigned byte = 0;
            int64_t count = std::min<int64_t>(8, columns - col);
            for (int64_t j = 0; j < count; ++j) byte |= unsigned((weight[col + j] & magnitude) != 0) << j;
            bits[col / 8] = uint8_t(byte);
        }
    }
}

template <class T>
void gather(const T* weight, const uint8_t* bits, int64_t rows, int64_t columns, T* out, int64_t total) {
    const T* end = out + total;
    (void)end;  // read in wide loops only
    for (int64_t row = 0; row < rows; ++row, weight += columns, bits += bytes_of_row(columns)) {
        int64_t col = 0;
#if PST_WIDE
        for (; col + LANES<T> <= columns; col += LANES<T>) {
            __m512i v = Wide<T>::without_negative_zero(_mm512_loadu_si512(weight + col));
            out += put<T>(out, end - out, load_mask<T>(bits + col / 8), v);
        }
#endif
        each_set(bits, col, columns, [&](int64_t at) { *out++ = weight[at] == SIGN<T> ? T(0) : weight[at]; });
    }
}

template <class T>
void scatter(const T* values, const uint8_t* bits, int64_t rows, int64_t columns, T* out, int64_t total) {
    const T* end = values + total;
    (void)end;  // read in wide loops only
    for (int64_t row = 0; row < rows; ++row, out += columns, bits += bytes_of_row(columns)) {
        int64_t col = 0;
#if PST_WIDE
        for (; col + LANES<T> <= columns; col += LANES<T>) {
            auto keep = load_mask<T>(bits + col / 8);
            int64_t count = __builtin_popcountll(keep);
            __m512i v = end - values >= LANES<T> ? _mm512_loadu_si512(values)
                                                 : Wide<T>::load_some(first<T>(count), values);
            _mm512_storeu_si512(out + col, Wide<T>::expand(keep, v));
            values += count;
        }
#endif
        if (col < columns) std::memset(out + col, 0, (columns - col) * sizeof(T));  // then the kept ones are written
        each_set(bits, col, columns, [&](int64_t at) { out[at] = *values++; });
    }
}

// Bits of each row, eight bytes per step.
inline void row_counts(const uint8_t* bits, int64_t rows, int64_t row_bytes, int64_t* counts) {
    for (int64_t row = 0; row < rows; ++row, bits += row_bytes) {
        int64_t count = 0;
        int64_t at = 0;
        for (; at + 8 <= row_bytes; at += 8) {
            uint64_t word;
            std::memcpy(&word, bits + at, 8);
            count += __builtin_popcountll(word);
        }
        for (; at < row_bytes; ++at) count += __builtin_popcount(bits[at]);
        counts[row] = count;
    }
}

// Write the `count` signed 4-bit codes of a row as bytes; `to` has room for count + 1 of them.
inline void unpack_nibbles(const uint8_t* from, int64_t count, uint8_t* to) {
    for (int64_t i = 0; i < (count + 1) / 2; ++i) {
        to[2 * i] = uint8_t(int8_t(uint8_t(from[i] << 4)) >> 4);
        to[2 * i + 1] = uint8_t(int8_t(from[i]) >> 4);
    }
}

// `row_codes` has room for columns + 1 bytes.
inline void scatter_nibbles(const uint8_t* packed, const uint8_t* bits, int64_t rows, int64_t columns, uint8_t* row_codes,
                            uint8_t* out) {
    for (int64_t row = 0; row < rows; ++row, out += columns) {
        int64_t count = columns;
        if (bits) row_counts(bits, 1, bytes_of_row(columns), &count);
        unpack_nibbles(packed, count, row_codes);
        packed += (count + 1) / 2;
        if (bits) {
            scatter<uint8_t>(row_codes, bits, 1, columns, out, count);
            bits += bytes_of_row(columns);
        } else {
            std::memcpy(out, row_codes, size_t(columns));
        }
    }
}

template <class C> void columns_of(const uint8_t* bits, int64_t rows, int64_t columns, C* out, int64_t total) {
    const C* end = out + total;
    (void)end;  // read in wide loops only
#if PST_WIDE
    // a register of consecutive column numbers is compressed in place of weights
    C counting[LANES<C>];
    for (int64_t j = 0; j < LANES<C>; ++j) counting[j] = C(j);
    const __m512i one_to_next = Wide<C>::all(C(LANES<C>));
    const __m512i from_zero = _mm512_loadu_si512(counting);
#endif
    for (int64_t row = 0; row < rows; ++row, bits += bytes_of_row(columns)) {
        int64_t col = 0;
#if PST_WIDE
        __m512i index = from_zero;
        for (; col + LANES<C> <= columns; col += LANES<C>) {
            out += put<C>(out, end - out, load_mask<C>(bits + col / 8), index);
            index = Wide<C>::add(index, one_to_next);
        }
#endif
        each_set(bits, col, columns, [&](int64_t at) { *out++ = C(at); });
    }
}

// The same loops for a size that is known at run time.

inline void row_bits(const void* weight, int64_t size, int64_t rows, int64_t columns, uint8_t* bits) {
    for_size(size, [&](auto zero) { row_bits(static_cast<const decltype(zero)*>(weight), rows, columns, bits); });
}

inline void gather(const void* weight, const uint8_t* bits, int64_t size, int64_t rows, int64_t columns, void* values,
                   int64_t total) {
    for_size(size, [&](auto zero) {
        typedef decltype(zero) T;
        gather(static_cast<const T*>(weight), bits, rows, columns, static_cast<T*>(values), total);
    });
}

inline void scatter(const void* values, const uint8_t* bits, int64_t size, int64_t rows, int64_t columns, void* out,
                    int64_t total) {
    for_size(size, [&](auto zero) {
        typedef decltype(zero) T;
        scatter(static_cast<const T*>(values), bits, rows, columns, static_cast<T*>(out), total);
    });
}

inline void columns_of(const uint8_t* bits, int64_t rows, int64_t columns, int64_t size, void* out, int64_t total) {
    for_size(size, [&](auto zero) { columns_of(bits, rows, columns, static_cast<decltype(zero)*>(out), total); });
}
