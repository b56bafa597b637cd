// Few-token forward of a gated adapter on a GPU: y = x Wᵀ + b + s (h∘λ or h C) Qᵀ, h = x Rᵀ.
#pragma once

#include <cstdint>

#include "qrlora/dtype.h"

namespace qrlora::cuda {

// Tokens that one tensor-core tile holds.
constexpr int64_t kDecodeTokens = 16;

// Rows of x, weight, q and r are contiguous; ld* counts elements from one row to the next. The gate
// is lam [r] or, if `core`, C [r, r] row-major, in `dtype` or float.
struct Decode {
    DType dtype;
    int64_t m, n, k, r;
    const void* x;
    int64_t ldx;
    const void* weight;
    int64_t ldw;
    const void* bias;  // [n] or null
    const void* q;     // [n, r]
    int64_t ldq;
    const void* r_factor;  // [r, k]
    int64_t ldr;
    const void* gate;
    bool core;
    bool gate_is_float;
    float scaling;
    void* y;      // [m, n] contiguous
    void* h;      // [m, r] contiguous, float for half
    void* mid;    // scratch [m, ldm] of dtype
    int64_t ldm;  // a multiple of 8
    float* wide;  // scratch [m, r] if core, else null
};

// Launches two kernels (three with a core) on `stream` of `device`; returns null or what failed.
const char* launch_decode(const Decode& problem, int device, void* stream);

}  // namespace qrlora::cuda
