// What all kernels of the pivoted QR share: the batch with its workspace, constants, conversions.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cfloat>
#include <cmath>
#include <type_traits>

#include "launch.cuh"
#include "qrlora/cuda/pivoted_qr.h"

namespace qrlora::cuda {

// As in csrc/core/cpu/pivot_search.h and qrlora_kernels/linalg/blocked.py, which say why.
constexpr double kEps32 = FLT_EPSILON;
constexpr double kEps64 = DBL_EPSILON;
constexpr double kTie = 1e-13;
constexpr double kDependent = 64 * kEps64;
constexpr double kBlockDrop = 1e-4;
// Rounding of a norm² in a Gram, which stays when others are taken out of it.
constexpr double kGramError = 16 * kEps64;
constexpr double kNone = -HUGE_VAL;

constexpr int64_t kPartRows = 1024;  // rows that one block sums up; a second stage adds the parts
constexpr int64_t kBasisTiles = 8;   // most tiles of the basis in a pass of kCandidates columns

// An array per matrix, `size` elements each.
template <typename T>
struct PerMatrix {
    T* data;
    int64_t size;
    __device__ T* of(int64_t matrix) const { return data + matrix * size; }
};

// Row-major fp64 panels, one per matrix.
struct Panel {
    double* data;
    int64_t size, ld;
    __device__ double* of(int64_t matrix) const { return data + matrix * size; }
};

// The problem and where its workspace keeps what.
struct Batch {
    PivotBatch p;
    int64_t parts;      // of kPartRows rows
    int64_t part_rows;  // rows of a partial product
    int64_t* left;      // matrices not done
    PerMatrix<int64_t> candidates;
    PerMatrix<int> accepted;             // positions among the candidates, in pivot order
    PerMatrix<double> left2;             // residual norms² of the candidates after this round
    PerMatrix<double> known2;            // and as their Gram had them
    PerMatrix<double> partial;           // products of parts
    Panel basis;                         // Q [rows, capacity]
    Panel panel, scaled;                 // [rows, kCandidates]
    Panel first, second;                 // coefficients in the basis [capacity, kCandidates]
    Panel gram, factor, again, inverse;  // [kCandidates, kCandidates]
    // Factors only: R at the pivots [capacity, capacity].
    Panel triangle;
    // Search only, per column: norm² at the start, estimate of the residual norm², bound of its
    // error, squared scale of the rounding, and whether it is neither pivot nor dependent.
    PerMatrix<double> start2, norm2, slack, noise2;
    PerMatrix<uint8_t> alive;
    // What each tile of the basis takes from a column's norm², and adds to its noise.
    PerMatrix<double> lowered, noise;
};

// Counts of PivotState that size the products.
enum class Count { filled, candidates, accepted };

__device__ inline int64_t count_of(const PivotState& s, Count which) {
    return which == Count::filled       ? s.filled
           : which == Count::candidates ? s.candidates
                                        : s.accepted;
}

template <typename To, typename From>
__device__ __forceinline__ To convert(From value) {
    if constexpr (std::is_floating_point_v<From>)
        return static_cast<To>(value);
    else
        return static_cast<To>(static_cast<float>(value));
}

__device__ inline void store(void* out, DType dtype, int64_t at, double value) {
    if (dtype == DType::f64)
        static_cast<double*>(out)[at] = value;
    else if (dtype == DType::f32)
        static_cast<float*>(out)[at] = static_cast<float>(value);
    else if (dtype == DType::bf16)
        static_cast<__nv_bfloat16*>(out)[at] = __float2bfloat16(static_cast<float>(value));
    else
        static_cast<__half*>(out)[at] = __float2half(static_cast<float>(value));
}

// Calls f(T*) with the element type of `dtype`.
template <typename F>
void with_type(DType dtype, const F& f) {
    if (dtype == DType::f64)
        f(static_cast<const double*>(nullptr));
    else if (dtype == DType::f32)
        f(static_cast<const float*>(nullptr));
    else if (dtype == DType::bf16)
        f(static_cast<const __nv_bfloat16*>(nullptr));
    else
        f(static_cast<const __half*>(nullptr));
}

// Upper bound of a column's residual norm².
__device__ inline double bound(const Batch& b, int64_t matrix, int64_t column) {
    if (!b.alive.of(matrix)[column]) return kNone;
    return b.norm2.of(matrix)[column] + b.slack.of(matrix)[column];
}

__device__ inline bool independent(const Batch& b, int64_t matrix, int64_t column, double norm2) {
    return norm2 > kDependent * kDependent * b.noise2.of(matrix)[column];
}

// Enters a norm² that was computed in fp64.
__device__ inline void set_exact(const Batch& b, int64_t matrix, int64_t column, double norm2) {
    const double error = 8 * kEps64 * sqrt(b.noise2.of(matrix)[column]);
    b.norm2.of(matrix)[column] = norm2;
    b.slack.of(matrix)[column] = 2 * sqrt(norm2) * error + error * error;
}

// combine() over one value per thread of a block of kThreads (a power of two), for all threads.
template <int kThreads, typename T, typename Combine>
__device__ T reduce(T value, T* shared, Combine combine) {
    shared[threadIdx.x] = value;
    __syncthreads();
    for (unsigned half = kThreads / 2; half > 0; half /= 2) {
        if (threadIdx.x < half)
            shared[threadIdx.x] = combine(shared[threadIdx.x], shared[threadIdx.x + half]);
        __syncthreads();
    }
    const T result = shared[0];
    __syncthreads();  // before the memory is used again
    return result;
}

struct Larger {
    template <typename T>
    __device__ T operator()(T a, T b) const {
        return a < b ? b : a;
    }
};

struct Smaller {
    template <typename T>
    __device__ T operator()(T a, T b) const {
        return b < a ? b : a;
    }
};

struct Sum {
    template <typename T>
    __device__ T operator()(T a, T b) const {
        return a + b;
    }
};

// The steps of a round, in the order in which they run; each enqueues its kernels.
void column_norms2(const Batch& b, Launches& run);
void choose_candidates(const Batch& b, Launches& run);
void take_given(const Batch& b, Launches& run);
void gather_candidates(const Batch& b, Launches& run);
// panel -= Q (Qᵀ panel); the coefficients stay in `coefficients`.
void project_out(const Batch& b, const Panel& panel, Count columns, const Panel& coefficients,
                 Launches& run);
// gram = panelᵀ panel, upper triangle.
void multiply_self(const Batch& b, const Panel& panel, Count columns, Launches& run);
void choose_pivots(const Batch& b, Launches& run);
// scaled = accepted columns of panel · inverse.
void scale_accepted(const Batch& b, Launches& run);
// Cholesky of gram to `again`, and its inverse.
void factorise_again(const Batch& b, Launches& run);
// New columns of Q = scaled · inverse.
void extend_basis(const Batch& b, Launches& run);
// What the accepted columns take from every column of the matrix, to lowered and noise.
void project_accepted(const Batch& b, Launches& run);
// r = Qᵀ W.
void project_factors(const Batch& b, const PivotFactors& out, Launches& run);

}  // namespace qrlora::cuda
