// The base product over a given addend on the CPU: y = x Wᵀ + b + addend. dx = dy W + addend is the
// same with W's dimensions exchanged.
#pragma once

#include <cstdint>

#include "qrlora/dtype.h"
#include "qrlora/strided.h"

namespace qrlora {

// Rows of x [m, k] are contiguous in fp32 and fp64; addend and y [m, n] are contiguous and may be
// the same; weight is [n, k], bias [n] contiguous or null. All are of one type.
struct LinearAdd {
    int64_t m, n, k;
    DType dtype;
    Strided2d x, weight;
    const void *bias, *addend;
    void* y;
    int threads;
};

// For fp32 and fp64 and few tokens: the weight is read once, at the pace of memory.
#define QRLORA_DECLARE_LINEAR_ADD(isa) \
    namespace isa {                    \
    void linear_add(const LinearAdd&); \
    }
QRLORA_DECLARE_LINEAR_ADD(baseline)
QRLORA_DECLARE_LINEAR_ADD(avx2)
QRLORA_DECLARE_LINEAR_ADD(avx512)
#undef QRLORA_DECLARE_LINEAR_ADD

// One of these or, for bf16 and only where amx::available(), the tile unit's product for any number
// of tokens.
void linear_add(const LinearAdd&);

}  // namespace qrlora
