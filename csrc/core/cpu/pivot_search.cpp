// Greedy column pivots, found block by block without updating the matrix. The method is explained,
// and written once more in plain torch operations, in qrlora_kernels/linalg/blocked.py.
//
// Where many pivots are needed, recomputing the candidates' residuals from an ever larger basis
// costs more than updating all of them: from EXPLICIT_LIMIT on the residual matrix is kept, in
// fp64.
#include "pivot_search.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>

#include "qrlora/cpu/parallel.h"

namespace qrlora {

// Columns that the basis can hold: an explicit search needs one block beyond where it begins.
int64_t Search::capacity(const MatrixView& w, const PivotOptions& options) {
    const auto whole = static_cast<double>(std::min(w.rows, w.columns));
    const bool with_factors = options.factors && options.rule == RankRule::none;
    if (with_factors || options.limit <= EXPLICIT_LIMIT * whole) return options.limit;
    const double before = options.rule == RankRule::none ? 0.0 : EXPLICIT_LIMIT * whole;
    const auto most = static_cast<int64_t>(before) + 1 + options.block;
    return std::min(options.limit, most);
}

Pivots Search::run(const Interrupted& interrupted) {
    found_.finite = start();
    bool fresh = false;
    while (found_.finite && static_cast<int64_t>(found_.columns.size()) < options_.limit) {
        found_.deficient = std::none_of(alive_.begin(), alive_.end(), [](char a) { return a; });
        if (found_.deficient) break;
        const Outcome outcome = block(fresh);
        fresh = outcome == Outcome::refresh;
        if (outcome == Outcome::below_tau || interrupted()) break;
        if (!fresh && bracketed()) break;
    }
    if (found_.factors) store_basis();
    found_.bounds.resize(w_.columns);
    for (int64_t j = 0; j < w_.columns; ++j) found_.bounds[j] = std::max(bound(j), 0.0);
    return std::move(found_);
}

// Norms of the whole columns; false if one is not finite.
bool Search::start() {
    const int64_t columns = w_.columns;
    start2_.resize(columns);
    const int64_t width = std::clamp<int64_t>(round_up(columns / (4 * threads_), 32), 32, 256);
    parallel_for(threads_, (columns + width - 1) / width, [&](int64_t i) {
        const int64_t first = i * width;
        dense_kernels().column_norms2(w_, first, std::min(first + width, columns),
                                      start2_.data() + first);
    });
    norm2_ = noise2_ = start2_;
    slack_.resize(columns);
    alive_.resize(columns);
    chosen_.assign(columns, 0);
    for (int64_t j = 0; j < columns; ++j) {
        slack_[j] = 4 * EPS64 * start2_[j];
        alive_[j] = start2_[j] > 0;
    }
    return std::all_of(start2_.begin(), start2_.end(), [](double v) { return std::isfinite(v); });
}

Outcome Search::block(bool fresh) {
    if (!explicit_ && wants_explicit()) make_explicit();
    choose_candidates();
    if (explicit_) {
        seat_candidates();
        meet_newcomers();
    } else {
        const int64_t count = static_cast<int64_t>(candidates_.size());
        refill_residual();
        multiply_tn(residual_, count, residual_, gram_, threads_, true);
        error2_.resize(count);
        for (int64_t i = 0; i < count; ++i) error2_[i] = GRAM_ERROR * gram_.row(i)[i];
    }
    const Outcome outcome = pivot_block(!fresh);
    if (outcome == Outcome::refresh) {
        refresh(std::max(*std::max_element(left2_.begin(), left2_.end()), 0.0));
    } else if (!accepted_.empty()) {
        for (int64_t at : accepted_) found_.columns.push_back(candidates_[at]);
        const bool last = outcome == Outcome::below_tau ||
                          static_cast<int64_t>(found_.columns.size()) == options_.limit;
        // Bounds that nothing reads any more stay as they are.
        if (!last || found_.factors) take_block();
    } else {
        for (int64_t j : candidates_) alive_[j] = 0;
    }
    return outcome;
}

// The columns with the largest bounds, in ascending order.
void Search::choose_candidates() {
    order_.clear();
    for (int64_t j = 0; j < w_.columns; ++j) {
        if (alive_[j]) order_.push_back(j);
    }
    outside_ = NONE;
    outside_column_ = w_.columns;
    const int64_t count = std::min<int64_t>(options_.block, order_.size());
    if (count < static_cast<int64_t>(order_.size())) {
        std::nth_element(order_.begin(), order_.begin() + count, order_.end(),
                         [&](int64_t a, int64_t b) {
                             const double left = bound(a), right = bound(b);
                             return left > right || (left == right && a < b);
                         });
        outside_ = bound(order_[count]);
        for (size_t i = count; i < order_.size(); ++i) {
            if (bound(order_[i]) >= outside_ * (1 - TIE)) {
                outside_column_ = std::min(outside_column_, order_[i]);
            }
        }
    }
    candidates_.assign(order_.begin(), order_.begin() + count);
    std::sort(candidates_.begin(), candidates_.end());
}

// No column outside the candidates can be ahead of this one.
bool Search::certified(double value, int64_t column) const {
    if (value >= outside_ * (1 + TIE)) return true;
    return value >= outside_ * (1 - TIE) && column < outside_column_;
}

// Pivoted Cholesky of the candidates' Gram, as long as every pivot is certified.
Outcome Search::pivot_block(bool certify_first) {
    const int64_t count = static_cast<int64_t>(candidates_.size());
    const int64_t room = options_.limit - static_cast<int64_t>(found_.columns.size());
    const int64_t most = std::min({room, count, explicit_ ? EXPLICIT_TAKE : count});
    factor_.reset(most, count);
    left2_.resize(count);
    for (int64_t i = 0; i < count; ++i) {
        const double norm2 = gram_.row(i)[i];
        left2_[i] = independent(candidates_[i], norm2) ? norm2 : NONE;
    }
    accepted_.clear();
    for (int64_t step = 0; step < most; ++step) {
        const double best = *std::max_element(left2_.begin(), left2_.end());
        // Rounding may leave less than nothing of every candidate.
        const double tied = best > 0 ? best * (1 - TIE) : best;
        int64_t at = NOBODY;
        for (int64_t i = 0; i < count; ++i) {
            // The lowest column wins a tie.
            if (left2_[i] >= tied && (at == NOBODY || candidates_[i] < candidates_[at])) at = i;
        }
        const double value = left2_[at];
        if ((step > 0 || certify_first) && !certified(value, candidates_[at])) {
            return step == 0 ? Outcome::refresh : Outcome::more;
        }
        if (value == NONE || error2_[at] > CHOOSE * value) return Outcome::more;
        if (options_.rule == RankRule::magnitude) {
            if (found_.columns.empty() && step == 0) floor2_ = options_.tau * options_.tau * value;
            if (value <= floor2_) return Outcome::below_tau;
        }
        double* column = factor_.row(step);
        for (int64_t i = 0; i < count; ++i) {
            column[i] = i < at ? gram_.row(i)[at] : gram_.row(at)[i];
        }
        for (int64_t s = 0; s < step; ++s) {
            const double* earlier = factor_.row(s);
            const double scale = earlier[at];
            for (int64_t i = 0; i < count; ++i) column[i] -= scale * earlier[i];
        }
        const double inverse = 1.0 / std::sqrt(value), error = error2_[at] / value;
        for (int64_t i = 0; i < count; ++i) {
            column[i] *= inverse;
            const double taken = column[i] * column[i];
            left2_[i] -= taken;
            error2_[i] += error * taken;
        }
        left2_[at] = NONE;
        accepted_.push_back(at);
        found_.norms.push_back(std::sqrt(value));
    }
    return Outcome::more;
}

// The energy or abs-sum rank is bracketed, or known to reach max_rank; see rules.rank_bracket.
bool Search::bracketed() const {
    if (options_.rule != RankRule::energy && options_.rule != RankRule::abs_sum) return false;
    const bool squared = options_.rule == RankRule::energy;
    const int64_t count = static_cast<int64_t>(found_.norms.size());
    double known = 0.0;
    for (double norm : found_.norms) known += squared ? norm * norm : norm;
    std::vector<double> tail(w_.columns);
    for (int64_t j = 0; j < w_.columns; ++j) {
        const double norm2 = std::max(bound(j), 0.0);
        tail[j] = squared ? norm2 : std::sqrt(norm2);
    }
    const int64_t left = std::max<int64_t>(std::min(w_.rows, w_.columns) - count, 0);
    std::nth_element(tail.begin(), tail.begin() + std::min(left, w_.columns - 1), tail.end(),
                     std::greater<double>());
    const double most = std::accumulate(tail.begin(), tail.begin() + left, 0.0);
    const double least = left ? *std::max_element(tail.begin(), tail.begin() + left) : 0.0;
    if (known >= options_.tau * (known + most) * (1 + 1e-12)) return true;
    if (count < options_.max_rank) return false;
    double reached = 0.0;
    for (int64_t i = 0; i + 1 < options_.max_rank; ++i) {
        reached += squared ? found_.norms[i] * found_.norms[i] : found_.norms[i];
    }
    return reached < options_.tau * (known + least) * (1 - 1e-12);
}

Pivots search_pivots(const MatrixView& w, const PivotOptions& options, int threads,
                     const Interrupted& interrupted) {
    return Search(w, options, threads).run(interrupted);
}

}  // namespace qrlora
