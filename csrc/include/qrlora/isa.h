// Run-time choice between the copies of a kernel that CMakeLists.txt compiles per instruction set.
// A kernel source wraps its code in `namespace qrlora::QRLORA_ISA`.
#pragma once

#include <cstdlib>
#include <cstring>

namespace qrlora {

enum class Isa { baseline, avx2, avx512 };

// The best instruction set this CPU has, or the one that QRLORA_ISA names if it is lower.
inline Isa best_isa() {
    static const Isa isa = [] {
        Isa best = Isa::baseline;
#if defined(__x86_64__)
        __builtin_cpu_init();
        if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) best = Isa::avx2;
        if (best == Isa::avx2 && __builtin_cpu_supports("avx512f") &&
            __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
            __builtin_cpu_supports("avx512vl"))
            best = Isa::avx512;
#endif
        const char* asked = std::getenv("QRLORA_ISA");
        if (asked && !std::strcmp(asked, "baseline")) return Isa::baseline;
        if (asked && !std::strcmp(asked, "avx2") && best == Isa::avx512) return Isa::avx2;
        return best;
    }();
    return isa;
}

}  // namespace qrlora

#if defined(__x86_64__)
#define QRLORA_DISPATCH(function, ...)                                             \
    (::qrlora::best_isa() == ::qrlora::Isa::avx512 ? avx512::function(__VA_ARGS__) \
     : ::qrlora::best_isa() == ::qrlora::Isa::avx2 ? avx2::function(__VA_ARGS__)   \
                                                   : baseline::function(__VA_ARGS__))
#else
#define QRLORA_DISPATCH(function, ...) baseline::function(__VA_ARGS__)
#endif
