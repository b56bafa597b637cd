// The Kronecker update of OHoRA on the CPU. Per token X = x as [r, k], Y = y as [n, r]:
//   forward   S_t = X R_t,                 Y = sum_t L_t S_t
//   backward  T_t = L_t^T dY,              dX = sum_t T_t R_t^T
//             dA = s sum dY S_0^T,         dB = sum X^T (T_0 + s T_1)
// One term: L_0 = s A, R_0 = B. Measured from a start (A0, B0), two terms as small as the update:
// L_0 = s (A - A0), R_0 = B; L_1 = A0, R_1 = s (B - B0); then s A = L_0 + s L_1.
#pragma once

#include <cstdint>

#include "qrlora/cpu/buffer.h"
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

// What the kernels read instead:
//   forward   left [n, terms r] of the L_t, right [terms k, r] of the R_t
//   backward  left [terms r, n] of the L_t^T, right [terms r, k] of the R_t^T, right_0 [k, r] = R_0
struct KronOperands {
    AlignedBuffer<unsigned char> left, right, right_0;
};
enum class KronStep { forward, backward };

// In the type `as`, computed in fp32 for bf16.
KronOperands kron_operands(const KronShape&, const KronFactors&, DType as, KronStep step);

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

// The activations x [tokens, r k] (forward and backward), y or dy [tokens, n r], dx [tokens, r k]:
// rows with the given stride in elements, each row contiguous.
struct KronRows {
    const void* data;
    int64_t stride;
};

struct KronBackward {
    KronRows dy, x;
    const void* left_t;   // [terms r, n]: the L_t^T, one above the other
    const void* right;    // [k, r]: R_0, for dA
    const void* right_t;  // [terms, r, k]: the R_t^T, for dX
    double scaling;       // s
    void *dx, *da, *db;   // dx [tokens, r k] in the type of x; da [n, r], db [k, r] in the type of
                          // the factors; null where not wanted
};

#define QRLORA_DECLARE_KRON(isa)                                                                \
    namespace isa {                                                                             \
    void kron_forward(const KronShape&, DType, KronRows x, const void* left, const void* right, \
                      void* y);                                                                 \
    void kron_backward(const KronShape&, DType, const KronBackward&);                           \
    }
QRLORA_DECLARE_KRON(baseline)
QRLORA_DECLARE_KRON(avx2)
QRLORA_DECLARE_KRON(avx512)
#undef QRLORA_DECLARE_KRON

// One of these for this machine or, with `tiles`, bf16 on the tile unit; from the factors as they
// are. What KronBackward holds of them is filled in.
void kron_forward(const KronShape&, DType, const KronFactors&, KronRows x, void* y, bool tiles);
void kron_backward(const KronShape&, DType, const KronFactors&, KronBackward, bool tiles);

}  // namespace qrlora
