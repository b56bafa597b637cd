// How the Kronecker kernels share their tokens.
#pragma once

#include <cstdint>

namespace qrlora {

// Tokens are summed in chunks whose number depends on the shape alone, and the chunks in order, so
// that gradients have the same bits for every number of threads and every schedule.
struct KronChunks {
    int64_t count, tokens;
    explicit KronChunks(int64_t all)
        : count(all < 16     ? 1
                : all < 1024 ? all / 16
                             : 64),
          tokens((all + count - 1) / count) {}
    int threads(int asked) const { return count < asked ? static_cast<int>(count) : asked; }
};

}  // namespace qrlora
