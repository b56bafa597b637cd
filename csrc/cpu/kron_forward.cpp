// y = sum_t (L_t (X R_t)) per token: x is read once, S stays in the L1 cache, y is written once.
#include <vector>

#include "qrlora/cpu/kron.h"
#include "qrlora/cpu/rows.h"
#include "qrlora/cpu/small_gemm.h"

namespace qrlora::QRLORA_ISA {

namespace {

template <typename E, typename T>
void forward(const KronShape& d, KronRows x, const T* left, const T* right, E* y) {
    const int64_t ld = padded<T>(d.r), depth = d.terms * d.r;
    std::vector<T> right_padded(d.terms * d.k * ld);
    load_rows(right, d.terms * d.k, d.r, right_padded.data(), ld);
    const int64_t scratch = d.r * d.k + depth * ld + d.n * ld;
    const KronChunks chunks(d.tokens);
    const E* rows = static_cast<const E*>(x.data);
#pragma omp parallel num_threads(chunks.threads(d.threads))
    {
        std::vector<T> buffer(scratch);
        T *token = buffer.data(), *s = token + d.r * d.k, *out = s + depth * ld;
#pragma omp for schedule(dynamic, 1)
        for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
            const int64_t first = chunk * chunks.tokens;
            for (int64_t m = first; m < first + chunks.tokens && m < d.tokens; ++m) {
                load_rows(rows + m * x.stride, d.r, d.k, token, d.k);
                for (int64_t t = 0; t < d.terms; ++t)
                    small_gemm(d.r, ld, d.k, Strided<T>{token, d.k, 1},
                               right_padded.data() + t * d.k * ld, ld, s + t * d.r * ld, ld);
                small_gemm(d.n, ld, depth, Strided<T>{left, depth, 1}, s, ld, out, ld);
                store_rows(out, ld, d.n, d.r, y + m * d.n * d.r);
            }
        }
    }
}

}  // namespace

void kron_forward(const KronShape& d, DType dtype, KronRows x, const void* left, const void* right,
                  void* y) {
    if (dtype == DType::f64)
        forward(d, x, static_cast<const double*>(left), static_cast<const double*>(right),
                static_cast<double*>(y));
    else if (dtype == DType::bf16)
        forward(d, x, static_cast<const float*>(left), static_cast<const float*>(right),
                static_cast<bf16*>(y));
    else
        forward(d, x, static_cast<const float*>(left), static_cast<const float*>(right),
                static_cast<float*>(y));
}

}  // namespace qrlora::QRLORA_ISA
