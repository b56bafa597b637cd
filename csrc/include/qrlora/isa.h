// Run-time choice between the copies of a kernel that CMakeLists.txt compiles per instruction set.
// A kernel source wraps its code in `namespace qrlora::QRLORA_ISA`.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace qrlora {

enum class Isa { baseline, avx2, avx512 };

// What the compiler may use for a set beyond the baseline, named as in /proc/cpuinfo, and whether
// this CPU and its operating system have it.
using Features = std::vector<std::pair<const char*, bool>>;
Features features(Isa isa);
// "the CPU lacks ..." with each one that is not there; empty if none.
std::string lacking(const Features& features);

// The best instruction set this CPU has, or the one that QRLORA_ISA names if it is lower.
Isa best_isa();
// Why the kernels of this set do not run here; empty if they could.
std::string obstacle(Isa isa);

}  // namespace qrlora

#if defined(__x86_64__)
#define QRLORA_DISPATCH(function, ...)                                             \
    (::qrlora::best_isa() == ::qrlora::Isa::avx512 ? avx512::function(__VA_ARGS__) \
     : ::qrlora::best_isa() == ::qrlora::Isa::avx2 ? avx2::function(__VA_ARGS__)   \
                                                   : baseline::function(__VA_ARGS__))
#else
#define QRLORA_DISPATCH(function, ...) baseline::function(__VA_ARGS__)
#endif
