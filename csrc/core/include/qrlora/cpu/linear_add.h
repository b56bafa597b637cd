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

}  // namespace qrlora
