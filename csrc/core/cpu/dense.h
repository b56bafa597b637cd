// Dense building blocks of the pivoted QR. CMakeLists.txt compiles cpu/dense.cpp once per
// instruction set.
#pragma once

#include <cstdint>

#include "qrlora/cpu/buffer.h"
#include "qrlora/matrix.h"

namespace qrlora {

// gemm() covers whole tiles only: m must be a multiple of TILE_M and n of LANES (one vector of
// doubles), so buffers are padded with zeros, their rows up to TILE_N.
constexpr int64_t TILE_M = 8;
constexpr int64_t TILE_N = 32;
constexpr int64_t LANES = 8;

constexpr int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// c[m, n] += alpha * sum over s of a(m, s) b(s, n), or c = with `assign`, all row-major: a is
// stored [steps, m] by the transposed form and [m, steps] by the plain one. The order of the sum
// depends on steps alone.
template <class T>
struct Gemm {
    int64_t m, n, steps;
    const T* a;
    int64_t lda;
    const T* b;
    int64_t ldb;
    T* c;
    int64_t ldc;
    T alpha;
    bool assign = false;
};

struct DenseKernels {
    void (*gemm_tn)(const Gemm<double>&);
    void (*gemm_nn)(const Gemm<double>&);
    // out[j - first] = sum over rows of w[., j]², for first <= j < last.
    void (*column_norms2)(const MatrixView& w, int64_t first, int64_t last, double* out);
    // Rows [row, row + rows) of the given columns, converted, to out[rows, ld].
    void (*gather)(const MatrixView& w, int64_t row, int64_t rows, const int64_t* columns,
                   int64_t count, double* out, int64_t ld);
    // acc[m, ld] = qᵀ w[:, first:last] for q [w.rows, m] row-major, m a multiple of TILE_M and ld a
    // multiple of TILE_N and >= last - first; columns past `last` get 0.
    void (*project_f32)(const MatrixView& w, const float* q, int64_t m, int64_t first, int64_t last,
                        float* acc, int64_t ld);
    void (*project_f64)(const MatrixView& w, const double* q, int64_t m, int64_t first,
                        int64_t last, double* acc, int64_t ld);
};

// Those of the instruction set in use.
const DenseKernels& dense_kernels();

}  // namespace qrlora
