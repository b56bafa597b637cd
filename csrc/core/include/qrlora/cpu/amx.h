// Whether bf16 products can run on the AMX tile unit.
#pragma once

#include <string>

#include "qrlora/isa.h"

namespace qrlora::amx {

// What the compiler may use here, and whether this CPU and its operating system have it; only that
// of the vector kernels where this build has none for AMX.
Features features();
// Why this CPU, its operating system or this build does not offer AMX, each thing that is missing
// named apart; empty if all do. Asks the system for the tile state on the first call.
const std::string& obstacle();

}  // namespace qrlora::amx
