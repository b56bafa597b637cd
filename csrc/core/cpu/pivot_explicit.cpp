// The residual matrix of a search for many pivots: kept in fp64, transposed, so that a column is
// contiguous and both products of an update read panels as they lie.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "pivot_search.h"
#include "qrlora/cpu/parallel.h"

namespace qrlora {
namespace {

// Most columns updated at a time: their residuals stay in the second-level cache between the
// products.
constexpr int64_t CHUNK = 64;
// Share of a norm² below which a column is made orthogonal to the whole basis once more: until then
// it lost at most a digit and a half, and QᵀQ - I stays near 1e-14.
constexpr double KEPT2 = 0.001;

MatrixView flipped(const MatrixView& w) {
    return {w.data, w.dtype, w.columns, w.rows, w.column_stride, w.row_stride};
}

}  // namespace

bool Search::wants_explicit() const {
    const double whole = static_cast<double>(std::min(w_.rows, w_.columns));
    if (options_.limit <= EXPLICIT_LIMIT * whole) return false;
    return options_.rule == RankRule::none || basis_.size() >= EXPLICIT_LIMIT * whole;
}

void Search::make_explicit() {
    // A search for as many pivots as a rule will leave keeps the residual from the beginning.
    if (options_.rule != RankRule::none) found_.factors.reset();
    std::vector<int64_t> all(w_.rows);
    std::iota(all.begin(), all.end(), int64_t(0));
    matrix_.gather(flipped(w_), all.data(), w_.rows, threads_);
    kept_.resize(w_.columns);
    std::iota(kept_.begin(), kept_.end(), int64_t(0));
    place_ = kept_;
    explicit_ = true;
    fp32_pass_ = false;
    gram_.reset(options_.block, options_.block);
    known_.assign(options_.block, 0);
    error2_.resize(options_.block);
    chosen_.assign(w_.columns, 0);
    if (basis_.size() > 0) {
        const Panel& qt = basis_.transposed();
        Panel q;
        q.gather(flipped(qt.view()), all.data(), qt.rows, threads_);
        multiply_nn(matrix_, w_.rows, q, coefficients_, threads_);
        subtract_nn(coefficients_, qt.rows, qt, matrix_, threads_);
    }
}

// The residual matrix as if it were not transposed.
MatrixView Search::residual_columns() const {
    return {matrix_.row(0), DType::f64, matrix_.columns, matrix_.rows, 1, matrix_.ld};
}

// Some accepted column is so short by now that its residual's rounding shows in its direction.
bool Search::shrunk() const {
    for (size_t s = 0; s < accepted_.size(); ++s) {
        if (block_norm(s) * block_norm(s) < KEPT2 * start2_[block_column(s)]) return true;
    }
    return false;
}

// R = addedᵀ E for the residual E, then E -= added R; the rows R are rows of r.
void Search::update_explicit(const Panel& added) {
    const int64_t count = added.columns, columns = matrix_.rows;
    const double unit = 8 * EPS64 * std::sqrt(static_cast<double>(count));
    const Panel& qt = basis_.transposed();
    const double* added_t = qt.row(basis_.size() - count);
    coefficients_.shape(columns, count);
    const int64_t padded = round_up(columns, TILE_M);
    const int64_t chunk =
        std::clamp<int64_t>(round_up(columns / (4 * threads_), TILE_M), 2 * TILE_M, CHUNK);
    parallel_for(threads_, (padded + chunk - 1) / chunk, [&](int64_t tile) {
        const int64_t first = tile * chunk, last = std::min(first + chunk, padded);
        dense_kernels().gemm_nn({last - first, round_up(count, LANES), w_.rows, matrix_.row(first),
                                 matrix_.ld, added.row(0), added.ld, coefficients_.row(first),
                                 coefficients_.ld, 1.0, true});
        dense_kernels().gemm_nn({last - first, round_up(w_.rows, TILE_N), count,
                                 coefficients_.row(first), coefficients_.ld, added_t, qt.ld,
                                 matrix_.row(first), matrix_.ld, -1.0});
        const int64_t end = std::min(last, columns);
        for (int64_t i = first; i < end; ++i) lower_bound(kept_[i], coefficients_.row(i), 1, unit);
        if (found_.factors) store_rows(first, end);
    });
}

// The new rows of r at the columns [first, last) of the residual.
void Search::store_rows(int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
        const int64_t j = kept_[i], rows = new_rows_[j];
        const double* row = coefficients_.row(i);
        for (int64_t s = 0; s < rows; ++s) store_r(s, j, row[s]);
        if (rows > 0 && block_column(rows - 1) == j) store_diagonal(rows - 1, row[rows - 1]);
    }
}

}  // namespace qrlora
