// What this CPU offers of the instruction sets that kernels are compiled for.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace qrlora {

enum class Isa { baseline, avx2, avx512, avx512_bf16 };

// What the compiler may use for a set beyond the baseline, named as in /proc/cpuinfo, and whether
// this CPU and its operating system have it.
using Features = std::vector<std::pair<const char*, bool>>;
Features features(Isa isa);
// "the CPU lacks ..." with each one that is not there; empty if none.
std::string lacking(const Features& features);

// The best instruction set this CPU has, or the one that QRLORA_ISA names if it is lower.
Isa best_isa();
// Why the kernels of this set do not run here; empty if they could.
const std::string& obstacle(Isa isa);
// Whether the CPU is an AMD.
bool made_by_amd();

}  // namespace qrlora
