// bf16 products with fp32 accumulation and one rounding; each instruction set, and the tile unit,
// has its own.
#pragma once

#include <cstdint>

#include "qrlora/dtype.h"
#include "qrlora/strided.h"

namespace qrlora::QRLORA_ISA::half {

// A [m, depth] in memory as element (i, p) at data[i * row + p * col], B [depth, n] likewise; of
// row and col at least one is 1.
struct Matrix {
    const bf16* data;
    int64_t row, col;
};

inline Matrix matrix(const Strided2d& m) {
    return {static_cast<const bf16*>(m.data), m.row, m.col};
}

struct Product {
    Matrix a, b;
    int64_t depth;
    const bf16* panels = nullptr;  // B in panels, which is read in its place
};

// C [m, n] = A_0 B_0 + A_1 B_1 + bias + (addend): the products meet in one fp32 accumulator.
struct Gemm {
    int64_t m, n;
    Product products[2];
    int count;                  // of products: 1 or 2
    const bf16* bias;           // [n] or null
    const bf16* addend;         // [m, n] with row stride ldc, may be c itself; or null
    const float* column_scale;  // [n] or null: also write scaled = C diag(column_scale)
    bf16* scaled;               // [m, n] with row stride ldc
    void* c;                    // bf16, or float where fp32_out
    int64_t ldc;
    bool fp32_out;
    int threads;
};

void gemm(const Gemm& g);

}  // namespace qrlora::QRLORA_ISA::half
