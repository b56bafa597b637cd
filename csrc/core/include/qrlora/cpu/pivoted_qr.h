// Column-pivoted QR on the CPU: search of the greedy pivots, and the factors that come with it.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <vector>

#include "qrlora/cpu/buffer.h"
#include "qrlora/matrix.h"

namespace qrlora {

enum class RankRule : int64_t { none = 0, magnitude = 1, energy = 2, abs_sum = 3 };

struct PivotOptions {
    int64_t limit;  // most pivots to take
    RankRule rule;  // what may stop earlier; energy and abs_sum stop when their rank is bracketed
    double tau;
    int64_t max_rank;              // a bracket whose lower end reaches this is enough
    int64_t block;                 // candidates at a time
    std::optional<DType> factors;  // of q and r, if they are wanted
};

// q [rows, count] and r [count, columns], row-major in the dtype asked for, and the fp64 diagonal.
struct PivotFactors {
    AlignedBuffer<unsigned char> q, r;
    std::vector<double> diagonal;
};

struct Pivots {
    std::vector<int64_t> columns;
    std::vector<double> norms;   // residual norm of each pivot when it was taken
    std::vector<double> bounds;  // upper bounds of the residual norms² left, 0 at the pivots
    bool deficient = false;
    bool finite = true;  // false: NaN, Inf or overflow, and nothing was searched
    // A function of the matrix and the number of pivots. Not there where a rule might have stopped
    // and the search came to keep the residual matrix.
    std::optional<PivotFactors> factors;
};

// Called after every block of pivots of a matrix; true asks to give up.
using Interrupted = std::function<bool()>;

inline void store(void* out, DType dtype, int64_t at, double value) {
    switch (dtype) {
        case DType::f32:
            static_cast<float*>(out)[at] = static_cast<float>(value);
            break;
        case DType::f64:
            static_cast<double*>(out)[at] = value;
            break;
        case DType::bf16:
            static_cast<bf16*>(out)[at] = to_bf16(static_cast<float>(value));
            break;
        case DType::f16:
            static_cast<_Float16*>(out)[at] = static_cast<_Float16>(value);
            break;
    }
}

// A search for more than this share of min(rows, columns) keeps the residual matrix: from the
// start, or, where a rule may end it earlier, from that many pivots on.
constexpr double EXPLICIT_LIMIT = 0.2;
Pivots search_pivots(const MatrixView& w, const PivotOptions& options, int threads,
                     const Interrupted& interrupted);

}  // namespace qrlora
