// What the library was compiled for, so that a copy on another machine is refused with a reason instead of a crash.
#include "export.h"

// A digest of the sources (setup.py), so that a library left over from older ones is not called with newer arguments.
NARROWS_EXPORT const char* narrows_sources() { return NARROWS_SOURCES; }

// The CPU features that the compiler was allowed to use, by their names in /proc/cpuinfo, space separated.
NARROWS_EXPORT const char* narrows_compiled_for() {
    return ""
#ifdef __AVX2__
           "avx2 "
#endif
#ifdef __FMA__
           "fma "
#endif
#ifdef __AVX512F__
           "avx512f "
#endif
#ifdef __AVX512BW__
           "avx512bw "
#endif
#ifdef __AVX512VL__
           "avx512vl "
#endif
#ifdef __AVX512DQ__
           "avx512dq "
#endif
#ifdef __AVX512VBMI__
           "avx512vbmi "
#endif
#ifdef __AVX512VBMI2__
           "avx512_vbmi2 "
#endif
#ifdef __AVX512FP16__
           "avx512_fp16 "
#endif
#ifdef __AVXVNNI__
           "avx_vnni "
#endif
#ifdef __AVX512VNNI__
           "avx512_vnni "
#endif
#ifdef __AVX512BF16__
           "avx512_bf16 "
#endif
#ifdef __AMX_BF16__
           "amx_bf16 "
#endif
#ifdef __AMX_INT8__
           "amx_int8 "
#endif
        ;
}
