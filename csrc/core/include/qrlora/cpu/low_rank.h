// The gated low-rank operation on the CPU, a whole forward or backward per call:
//   forward   h = x downᵀ,   y  = x Wᵀ + s (h G) upᵀ + b
//   backward  g = dy up,     dx = dy W + s (g Gᵀ) down,   dG = s Σ_m h ∘ g  or  s hᵀ g
// with G = diag(λ) for QR-LoRA (up = Q, down = R̃) and G = C for LoRA-XS (up = b, down = a). In a
// mixed batch each row has the G of its adapter, and the sums of an adapter's dG run over its rows
// alone, in their order: what a row or an adapter gets does not depend on the others.
#pragma once

#include <cstdint>

#include "qrlora/dtype.h"
#include "qrlora/strided.h"

namespace qrlora {

// Without an index: the frozen operands of a step in panels (panels.h), which are read in their
// place; null where there are none. Forward Wᵀ, downᵀ and upᵀ, backward W, up and down.
struct LowRankPanels {
    const void *base, *into, *out;
};

struct LowRank {
    int64_t m, n, k, r;
    DType dtype;       // of everything but the gate
    Strided2d weight;  // [n, k]
    Strided2d down;    // [r, k]
    Strided2d up;      // [n, r]
    const void* gate;  // λ [r] or C [r, r], contiguous; mixed: [adapters, r(, r)]
    DType gate_dtype;  // as dtype, or f32 over bf16
    bool core;         // the gate is C
    // Mixed: whose gate is each row's, [m] in [0, adapters); null where there is one gate for all,
    // or no row.
    const int64_t* index;
    int64_t adapters;  // gates that there are: 1, unless mixed
    double scaling;    // s
    int threads;
    LowRankPanels panels{};
};

// Rows of x are contiguous in fp32 and fp64; y [m, n] and h [m, r] are contiguous.
struct LowRankForward {
    Strided2d x;
    const void* bias;  // [n] or null
    void *y, *h;
};

// Rows of dy as those of x; h, dx [m, k] and the gradient of the gate are contiguous. dgate has the
// type of the sums (float under bf16); dx and dgate are null where not wanted.
struct LowRankBackward {
    Strided2d dy;
    const void* h;
    void *dx, *dgate;
};

}  // namespace qrlora
