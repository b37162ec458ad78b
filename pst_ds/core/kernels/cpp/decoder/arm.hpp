// Whether this arm64 processor and its system have dot products of bytes, and matrix products of bytes.
#pragma once

#if defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace pst {

#if defined(__linux__)
// Bits that the kernel sets (asm/hwcap.h); written out, because older headers lack the second.
inline bool has_dotprod() { return getauxval(AT_HWCAP) >> 20 & 1; }
inline bool has_i8mm() { return getauxval(AT_HWCAP2) >> 13 & 1; }
#elif defined(__APPLE__)
inline bool has_feature(const char* name) {
    int has = 0;
    size_t size = sizeof has;
    return !sysctlbyname(name, &has, &size, nullptr, 0) && has;
}
inline bool has_dotprod() { return has_feature("hw.optional.arm.FEAT_DotProd"); }
inline bool has_i8mm() { return has_feature("hw.optional.arm.FEAT_I8MM"); }
#else
inline bool has_dotprod() { return false; }
inline bool has_i8mm() { return false; }
#endif

}  // namespace pst
