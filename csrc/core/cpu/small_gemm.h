// Products of matrices that fit in the L1/L2 cache, on one thread, always summed in the same order.
#pragma once

#include "vec.h"

namespace qrlora::QRLORA_ISA {

// A matrix read one element at a time: row i, column p is data[i * row + p * col].
template <typename T>
struct Strided {
    const T* data;
    int64_t row, col;
};

// Of a block of a product, ROWS by NV vectors, held in registers.
template <typename T, int ROWS, int NV>
using Sums = typename Vec<T>::type[ROWS][NV];

// sum = A B over `depth` terms.
template <typename T, int ROWS, int NV>
inline void sum_products(int64_t depth, Strided<T> a, const T* b, int64_t ldb,
                         Sums<T, ROWS, NV>& sum) {
    constexpr int64_t lanes = Vec<T>::lanes;
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) sum[i][v] = typename Vec<T>::type{};
    for (int64_t p = 0; p < depth; ++p) {
        typename Vec<T>::type row[NV];
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) row[v] = load(b + p * ldb + v * lanes);
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; ++i) {
            const T scale = a.data[i * a.row + p * a.col];
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v) sum[i][v] += scale * row[v];
        }
    }
}

// C[ROWS, NV vectors] (+)= A B.
template <typename T, int ROWS, int NV>
inline void gemm_block(int64_t depth, Strided<T> a, const T* b, int64_t ldb, T* c, int64_t ldc,
                       bool accumulate) {
    constexpr int64_t lanes = Vec<T>::lanes;
    Sums<T, ROWS, NV> sum;
    sum_products<T, ROWS, NV>(depth, a, b, ldb, sum);
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) {
            T* at = c + i * ldc + v * lanes;
            store(at, accumulate ? load(at) + sum[i][v] : sum[i][v]);
        }
}

template <typename T, int NV>
inline void gemm_columns(int64_t rows, int64_t depth, Strided<T> a, const T* b, int64_t ldb, T* c,
                         int64_t ldc, bool accumulate) {
    // 12 rows by two vectors fill the 32 registers of AVX-512; 6 by two the 16 of the others.
    constexpr int64_t block = QRLORA_VECTOR_BYTES == 64 ? 12 : 6;
    int64_t i = 0;
    auto next = [&](int64_t done) {
        i += done;
        a.data += done * a.row;
        c += done * ldc;
    };
    while (rows - i >= block) {
        gemm_block<T, block, NV>(depth, a, b, ldb, c, ldc, accumulate);
        next(block);
    }
    while (rows - i >= 4) {
        gemm_block<T, 4, NV>(depth, a, b, ldb, c, ldc, accumulate);
        next(4);
    }
    while (i < rows) {
        gemm_block<T, 1, NV>(depth, a, b, ldb, c, ldc, accumulate);
        next(1);
    }
}

// C[rows, columns] (+)= A[rows, depth] B[depth, columns]; columns is a multiple of the vector's
// lanes. A long sum is made of short ones, which keeps its error low; an empty one is zero.
template <typename T>
inline void small_gemm(int64_t rows, int64_t columns, int64_t depth, Strided<T> a, const T* b,
                       int64_t ldb, T* c, int64_t ldc, bool accumulate = false) {
    constexpr int64_t lanes = Vec<T>::lanes, longest = 64;
    int64_t p = 0;
    do {
        const int64_t steps = depth - p < longest ? depth - p : longest;
        const Strided<T> left{a.data + p * a.col, a.row, a.col};
        const T* right = b + p * ldb;
        const bool add = accumulate || p > 0;
        int64_t j = 0;
        for (; j + 2 * lanes <= columns; j += 2 * lanes)
            gemm_columns<T, 2>(rows, steps, left, right + j, ldb, c + j, ldc, add);
        if (j < columns) gemm_columns<T, 1>(rows, steps, left, right + j, ldb, c + j, ldc, add);
        p += longest;
    } while (p < depth);
}

}  // namespace qrlora::QRLORA_ISA
