#include "qrlora/isa.h"

#include <algorithm>
#include <array>
#include <cstdlib>

namespace qrlora {

Features features([[maybe_unused]] Isa isa) {
    Features all;
#if defined(__x86_64__)
    // The name has to be a literal.
#define QRLORA_FEATURE(name) all.emplace_back(name, __builtin_cpu_supports(name) != 0)
    __builtin_cpu_init();
    if (isa == Isa::baseline) return all;
    QRLORA_FEATURE("avx2");
    QRLORA_FEATURE("fma");
    if (isa == Isa::avx2) return all;
    QRLORA_FEATURE("avx512f");
    QRLORA_FEATURE("avx512bw");
    QRLORA_FEATURE("avx512dq");
    QRLORA_FEATURE("avx512vl");
    if (isa == Isa::avx512) return all;
    all.emplace_back("avx512_bf16", __builtin_cpu_supports("avx512bf16") != 0);
#undef QRLORA_FEATURE
#endif
    return all;
}

std::string lacking(const Features& features) {
    std::string names;
    for (const auto& [name, there] : features) {
        if (!there) names += (names.empty() ? "the CPU lacks " : ", ") + std::string(name);
    }
    return names;
}

Isa best_isa() {
    static const Isa isa = [] {
        Isa best = Isa::baseline;
#if defined(__x86_64__)
        if (lacking(features(Isa::avx2)).empty()) best = Isa::avx2;
        if (lacking(features(Isa::avx512)).empty()) best = Isa::avx512;
#endif
#if defined(QRLORA_WITH_AVX512_BF16)
        if (lacking(features(Isa::avx512_bf16)).empty()) best = Isa::avx512_bf16;
#endif
        const char* named = std::getenv("QRLORA_ISA");
        const std::string asked = named ? named : "";
        if (asked == "baseline") return Isa::baseline;
        if (asked == "avx2") return std::min(best, Isa::avx2);
        return asked == "avx512" ? std::min(best, Isa::avx512) : best;
    }();
    return isa;
}

bool made_by_amd() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    return __builtin_cpu_is("amd") != 0;
#else
    return false;
#endif
}

const std::string& obstacle(Isa isa) {
    static const auto reasons = [] {
        std::array<std::string, 4> all;
        for (const Isa set : {Isa::baseline, Isa::avx2, Isa::avx512, Isa::avx512_bf16}) {
            std::string& reason = all[static_cast<size_t>(set)] = lacking(features(set));
            if (reason.empty() && set > best_isa()) reason = "QRLORA_ISA asks for less";
        }
        return all;
    }();
    return reasons[static_cast<size_t>(isa)];
}

}  // namespace qrlora
