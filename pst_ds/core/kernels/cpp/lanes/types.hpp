// Vectors of LANES floats. Included by the lanes of each instruction set: no #pragma once.
//
// Floats and Ints have as many bytes and can be cast into each other, which keeps the bits. Both are aligned to 4 bytes
// only, so that load and store compile to unaligned instructions and work at every float of an array. A comparison of
// two vectors is an Ints with all bits set where it holds and 0 elsewhere, which is the mask of choose().

typedef float Floats __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES), aligned(4)));

inline Floats all(float value) { return Floats{} + value; }
inline Floats load(const float* from) { return *reinterpret_cast<const Floats*>(from); }
inline void store(float* to, Floats value) { *reinterpret_cast<Floats*>(to) = value; }
inline Floats choose(Ints mask, Floats yes, Floats no) { return (Floats)(((Ints)yes & mask) | ((Ints)no & ~mask)); }
inline Floats absolute(Floats x) { return (Floats)((Ints)x & 0x7fffffff); }
