// Column-pivoted QR of a batch of matrices of one shape on a GPU. The method is explained, and
// written once more in plain torch operations, in qrlora_kernels/linalg/blocked.py.
//
// A search takes launch_search_start once, then launch_search_round until nothing is left; factors
// from given pivots take launch_factor_round until nothing is left, then launch_factor_finish. A
// round handles up to kCandidates columns of each matrix that is not done. The matrices are read
// where they are, through a pointer each, and never written.
#pragma once

#include <cstdint>

#include "qrlora/dtype.h"

namespace qrlora::cuda {

constexpr int64_t kCandidates = 128;

enum class Phase : int64_t {
    search = 0,   // choose candidates; their first pivot must be certified
    fresh = 1,    // the same with bounds just recomputed: the first pivot is taken as it is
    refresh = 2,  // recompute, kCandidates at a time, the bounds of all columns that compete
    done = 3,
};

// One matrix's progress, on the device. Python makes it, zeroed but for `limit`, and reads the
// first four words.
struct PivotState {
    int64_t found;      // pivots so far
    int64_t deficient;  // every column left depends on the pivots up to rounding
    int64_t infinite;   // a column holds NaN or Inf, or its square overflows
    int64_t limit;      // pivots wanted
    Phase phase;
    int64_t filled;      // columns of the basis
    int64_t candidates;  // columns looked at in this round
    int64_t accepted;    // of these, columns that the basis takes
    int64_t wide;        // passes over the matrix run in fp64
    int64_t cursor;      // refresh: the first column not yet recomputed
    int64_t outside_column;
    double outside;  // largest bound outside the candidates; the lowest column with it is above
    double known2;   // refresh: norm² that a column must reach to compete
    double floor2;   // magnitude rule: (tau |R_11|)²
};

struct PivotBatch {
    DType dtype;
    int64_t count, rows, columns;
    int64_t row_stride, column_stride;  // in elements
    int64_t capacity;                   // most pivots of a matrix
    double tau;                         // magnitude rule, or 0 for none
    bool factors;                       // pivots are given, q and r are wanted
    const void* const* matrices;        // [count], on the device
    PivotState* states;                 // [count]
    int64_t* pivots;                    // [count, capacity]
    double* norms;                      // [count, capacity]: |R_ii|
    double* bounds;  // [count, columns]: of norms² left, 0 at pivots; search only
    void* workspace;
};

// q [rows, limit] and r [limit, columns] of each matrix, row-major in `dtype`.
struct PivotFactors {
    DType dtype;
    void* const* q;  // [count], on the device
    void* const* r;
};

// Bytes of the workspace; its pointer in the batch is not read.
int64_t pivot_workspace_bytes(const PivotBatch& batch);

// All return null or what failed. A round waits for the stream and tells how many are not done.
const char* launch_search_start(const PivotBatch& batch, int device, void* stream);
const char* launch_search_round(const PivotBatch& batch, int device, void* stream, int64_t& left);
const char* launch_search_finish(const PivotBatch& batch, int device, void* stream);
const char* launch_factor_round(const PivotBatch& batch, int device, void* stream, int64_t& left);
const char* launch_factor_finish(const PivotBatch& batch, const PivotFactors& out, int device,
                                 void* stream);

}  // namespace qrlora::cuda
