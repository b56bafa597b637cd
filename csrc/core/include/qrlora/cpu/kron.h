// The Kronecker update of OHoRA on the CPU. Per token X = x as [r, k], Y = y as [n, r]:
//   forward   S_t = X R_t,                 Y = sum_t L_t S_t
//   backward  T_t = L_t^T dY,              dX = sum_t T_t R_t^T
//             dA = s sum dY S_0^T,         dB = sum X^T (T_0 + s T_1)
// One term: L_0 = s A, R_0 = B. Measured from a start (A0, B0), two terms as small as the update:
// L_0 = s (A - A0), R_0 = B; L_1 = A0, R_1 = s (B - B0); then s A = L_0 + s L_1.
#pragma once

#include <cstdint>

#include "qrlora/dtype.h"

namespace qrlora {

struct KronShape {
    int64_t tokens, n, r, k;
    int64_t terms;
    int threads;
};

// The factors as they are: a, a0 [n, r] and b, b0 [k, r], contiguous, of one type that is not fp16;
// a0 and b0 are read where there are two terms.
struct KronFactors {
    const void *a, *b, *a0, *b0;
    DType dtype;
    double scaling;  // s
};

// The activations x [tokens, r k] (forward and backward), y or dy [tokens, n r], dx [tokens, r k]:
// rows with the given stride in elements, each row contiguous.
struct KronRows {
    const void* data;
    int64_t stride;
};

// What the kernels of a column read and write; the factors' terms as they are laid out for it.
struct KronForward {
    KronRows x;
    const void* left;   // [n, terms r]: the L_t, side by side
    const void* right;  // [terms, k, r]: the R_t
    void* y;            // [tokens, n r] in the type of x
};

struct KronBackward {
    KronRows dy, x;
    const void* left_t;   // [terms r, n]: the L_t^T, one above the other
    const void* right;    // [k, r]: R_0, for dA
    const void* right_t;  // [terms, r, k]: the R_t^T, for dX
    double scaling;       // s
    void *dx, *da, *db;   // dx [tokens, r k] in the type of x; da [n, r], db [k, r] in the type of
                          // the sums; null where not wanted
};

// The update by the kernels of a column, from the factors as they are. What KronBackward holds of
// these is filled in.
struct Column;
void kron_forward(const Column&, const KronShape&, DType, const KronFactors&, KronRows x, void* y);
void kron_backward(const Column&, const KronShape&, DType, const KronFactors&, KronBackward);

}  // namespace qrlora
