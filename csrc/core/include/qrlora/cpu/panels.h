// A matrix that is multiplied again and again, brought into panels once: a panel holds a few
// columns, row after row, as the kernel reads them.
#pragma once

#include <cstdint>

#include "qrlora/dtype.h"
#include "qrlora/strided.h"

namespace qrlora {

// B [depth, columns] of fp32, fp64 or bf16 into panel_elements(dtype, depth, columns) elements.
struct PackPanels {
    int64_t depth, columns;
    DType dtype;
    Strided2d b;
    void* panels;
    int threads;
};

// y [m, n] = x [m, k] B + bias + addend. Rows of x are contiguous, addend and y are; bias [n] and
// addend, which may be y itself, may be null.
struct TimesPanels {
    int64_t m, n, k;
    DType dtype;
    Strided2d x;
    const void *panels, *bias, *addend;
    void* y;
    int threads;
};

// The two of one instruction set; panels of one are not those of another.
struct PanelKernels {
    int64_t (*elements)(DType dtype, int64_t depth, int64_t columns);
    void (*pack)(const PackPanels&);
    void (*times)(const TimesPanels&);
};

}  // namespace qrlora
