// Asking the CPU and the operating system for AMX; compiled for every machine.
#include "qrlora/cpu/amx.h"
#include "qrlora/isa.h"

#if defined(QRLORA_WITH_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace qrlora::amx {

#if defined(QRLORA_WITH_AMX)

namespace {

// Linux gives a process the tile registers only on request (ARCH_REQ_XCOMP_PERM, XTILEDATA).
bool kernel_grants_it() { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }

}  // namespace

Features features() {
    Features all = qrlora::features(Isa::avx512_bf16);
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) d = 0;
    all.emplace_back("amx_tile", d >> 24 & 1);
    all.emplace_back("amx_bf16", d >> 22 & 1);
    return all;
}

const std::string& obstacle() {
    static const std::string reason = [] {
        std::string lacks = lacking(features());
        if (lacks.empty()) lacks = qrlora::obstacle(Isa::avx512_bf16);
        if (!lacks.empty()) return lacks;
        return std::string(kernel_grants_it() ? "" : "Linux does not grant the tile registers");
    }();
    return reason;
}

#else

Features features() { return qrlora::features(Isa::avx512_bf16); }

const std::string& obstacle() {
    static const std::string reason = "this build has no kernels for it";
    return reason;
}

#endif

}  // namespace qrlora::amx
