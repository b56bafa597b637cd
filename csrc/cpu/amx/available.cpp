// Asking the CPU and the operating system for AMX; compiled for every machine.
#include "qrlora/cpu/amx.h"
#include "qrlora/isa.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace qrlora::amx {

#if defined(QRLORA_WITH_AMX) && defined(__x86_64__) && defined(__linux__)

namespace {

bool cpu_has_it() {
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    const bool tiles = (d >> 24 & 1) && (d >> 22 & 1);  // AMX-TILE, AMX-BF16
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d)) return false;
    return tiles && (a >> 5 & 1);  // AVX512-BF16
}

// Linux gives a process the tile registers only on request (ARCH_REQ_XCOMP_PERM, XTILEDATA).
bool kernel_grants_it() { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }

}  // namespace

bool available() {
    static const bool ok = best_isa() == Isa::avx512 && cpu_has_it() && kernel_grants_it();
    return ok;
}

#else

bool available() { return false; }

#endif

}  // namespace qrlora::amx
