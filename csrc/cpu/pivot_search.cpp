// Greedy column pivots, found block by block without updating the matrix. The method is explained,
// and written once more in plain torch operations, in qrlora_kernels/linalg/blocked.py.
#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>

#include "qrlora/cpu/basis.h"
#include "qrlora/cpu/pivoted_qr.h"

namespace qrlora {
namespace {

constexpr double EPS32 = std::numeric_limits<float>::epsilon();
constexpr double EPS64 = std::numeric_limits<double>::epsilon();
constexpr double TIE = 1e-13;
constexpr double DEPENDENT = 64 * EPS64;
constexpr double BLOCK_DROP = 1e-4;
constexpr double NONE = -std::numeric_limits<double>::infinity();

enum class Outcome { more, refresh, below_tau };

class Search {
  public:
    Search(const MatrixView& w, const PivotOptions& options, int threads)
        : w_(w),
          options_(options),
          threads_(threads),
          basis_(w.rows, options.limit, threads),
          fp32_pass_(w.dtype != DType::f64) {}

    Pivots run(const Interrupted& interrupted);

  private:
    bool start();
    Outcome block(bool fresh);
    void choose_candidates();
    Outcome pivot_block(bool certify_first);
    bool certified(double value, int64_t column) const;
    void take_block();
    template <class T>
    void lower_bounds(const Panel& added);
    void refresh(double known2);
    void set_exact(int64_t column, double norm2);
    bool bracketed() const;

    double bound(int64_t j) const { return alive_[j] ? norm2_[j] + slack_[j] : NONE; }
    bool independent(int64_t j, double norm2) const {
        return norm2 > DEPENDENT * DEPENDENT * noise2_[j];
    }

    const MatrixView& w_;
    const PivotOptions& options_;
    const int threads_;
    Basis basis_;
    bool fp32_pass_;
    // Per column: norm² at the start, estimate of the residual norm², bound of its error, squared
    // scale of the rounding, and whether it is neither a pivot nor dependent on the pivots.
    std::vector<double> start2_, norm2_, slack_, noise2_;
    std::vector<char> alive_;
    std::vector<int64_t> order_, candidates_;
    double outside_ = NONE;  // largest bound outside the candidates, and its lowest column
    int64_t outside_column_ = 0;
    Panel residual_, gram_, accepted_panel_;
    std::vector<double> left2_;
    std::vector<int64_t> accepted_;
    std::vector<double> lower_;
    double floor2_ = 0.0;  // magnitude rule: (tau |R_11|)²
    Pivots found_;
};

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
    for (int64_t j = 0; j < columns; ++j) {
        slack_[j] = 4 * EPS64 * start2_[j];
        alive_[j] = start2_[j] > 0;
    }
    return std::all_of(start2_.begin(), start2_.end(), [](double v) { return std::isfinite(v); });
}

Outcome Search::block(bool fresh) {
    choose_candidates();
    const int64_t count = static_cast<int64_t>(candidates_.size());
    residual_.gather(w_, candidates_.data(), count, threads_);
    basis_.project_out(residual_);
    multiply_tn(residual_, count, residual_, gram_, threads_, true);
    const Outcome outcome = pivot_block(!fresh);
    if (outcome == Outcome::refresh) {
        refresh(std::max(*std::max_element(left2_.begin(), left2_.end()), 0.0));
    } else if (!accepted_.empty()) {
        for (int64_t at : accepted_) found_.columns.push_back(candidates_[at]);
        const bool last = outcome == Outcome::below_tau ||
                          static_cast<int64_t>(found_.columns.size()) == options_.limit;
        if (!last) take_block();  // bounds that nothing reads any more stay as they are
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
    const int64_t most = std::min(room, count);
    std::vector<double> factor(most * count);  // row `step` holds column `step` of the factor
    left2_.resize(count);
    for (int64_t i = 0; i < count; ++i) {
        const double norm2 = gram_.row(i)[i];
        left2_[i] = independent(candidates_[i], norm2) ? norm2 : NONE;
    }
    accepted_.clear();
    for (int64_t step = 0; step < most; ++step) {
        const double best = *std::max_element(left2_.begin(), left2_.end());
        // Candidates ascend, so the lowest column wins a tie.
        int64_t at = 0;
        while (left2_[at] < best * (1 - TIE)) ++at;
        const double value = left2_[at];
        if ((step > 0 || certify_first) && !certified(value, candidates_[at])) {
            return step == 0 ? Outcome::refresh : Outcome::more;
        }
        if (value == NONE || value < BLOCK_DROP * gram_.row(at)[at]) return Outcome::more;
        if (options_.rule == RankRule::magnitude) {
            if (found_.columns.empty() && step == 0) floor2_ = options_.tau * options_.tau * value;
            if (value <= floor2_) return Outcome::below_tau;
        }
        double* column = factor.data() + step * count;
        for (int64_t i = 0; i < count; ++i) {
            column[i] = i < at ? gram_.row(i)[at] : gram_.row(at)[i];
        }
        for (int64_t s = 0; s < step; ++s) {
            const double* earlier = factor.data() + s * count;
            const double scale = earlier[at];
            for (int64_t i = 0; i < count; ++i) column[i] -= scale * earlier[i];
        }
        const double inverse = 1.0 / std::sqrt(value);
        for (int64_t i = 0; i < count; ++i) {
            column[i] *= inverse;
            left2_[i] -= column[i] * column[i];
        }
        left2_[at] = NONE;
        accepted_.push_back(at);
        found_.norms.push_back(std::sqrt(value));
    }
    return Outcome::more;
}

// Grows the basis by the accepted candidates and lowers every bound by them.
void Search::take_block() {
    const int64_t count = static_cast<int64_t>(accepted_.size());
    accepted_panel_.reset(w_.rows, count);
    for (int64_t i = 0; i < w_.rows; ++i) {
        for (int64_t j = 0; j < count; ++j) {
            accepted_panel_.row(i)[j] = residual_.row(i)[accepted_[j]];
        }
    }
    lower_.resize(count * count);
    for (int64_t i = 0; i < count; ++i) {
        for (int64_t j = 0; j < count; ++j) {
            lower_[i * count + j] = gram_.row(
                std::min(accepted_[i], accepted_[j]))[std::max(accepted_[i], accepted_[j])];
        }
    }
    cholesky(lower_, count);
    basis_.append(accepted_panel_, lower_);
    if (fp32_pass_) {
        lower_bounds<float>(accepted_panel_);
    } else {
        lower_bounds<double>(accepted_panel_);
    }
    for (size_t i = 0; i < candidates_.size(); ++i) {
        const int64_t j = candidates_[i];
        set_exact(j, std::max(left2_[i], 0.0));
        alive_[j] = independent(j, left2_[i]);
    }
}

// One pass over the matrix: R = addedᵀ W, norms² fall by R², bounds also grow by its rounding.
template <class T>
void Search::lower_bounds(const Panel& added) {
    const int64_t count = added.columns, height = round_up(count, TILE_M);
    AlignedBuffer<T> packed;
    T* q = packed.reserve(w_.rows * height);
    std::fill(q, q + w_.rows * height, T(0));
    for (int64_t i = 0; i < w_.rows; ++i) {
        for (int64_t j = 0; j < count; ++j) q[i * height + j] = static_cast<T>(added.row(i)[j]);
    }
    std::vector<double> growth(count);
    const size_t before = found_.columns.size() - count;
    for (int64_t s = 0; s < count; ++s) {
        const double norm = found_.norms[before + s];
        growth[s] = start2_[found_.columns[before + s]] / (norm * norm);
    }
    const double eps = sizeof(T) == 4 ? EPS32 : EPS64;
    const double unit = 8 * eps * std::sqrt(static_cast<double>(count));
    const int64_t width = std::clamp<int64_t>(round_up(w_.columns / (4 * threads_), TILE_N), TILE_N,
                                              1024 / static_cast<int64_t>(sizeof(T)));
    parallel_for(threads_, (w_.columns + width - 1) / width, [&](int64_t tile) {
        const int64_t first = tile * width, last = std::min(first + width, w_.columns);
        thread_local AlignedBuffer<T> rows_buffer;
        T* rows = rows_buffer.reserve(height * width);
        const int64_t ld = round_up(last - first, TILE_N);
        if constexpr (sizeof(T) == 4) {
            dense_kernels().project_f32(w_, q, height, first, last, rows, ld);
        } else {
            dense_kernels().project_f64(w_, q, height, first, last, rows, ld);
        }
        for (int64_t j = first; j < last; ++j) {
            double lowered = 0.0, noise = 0.0;
            for (int64_t s = 0; s < count; ++s) {
                const double value = rows[s * ld + j - first];
                lowered += value * value;
                noise += growth[s] * value * value;
            }
            noise2_[j] += noise;
            const double error = unit * std::sqrt(start2_[j]);
            norm2_[j] = std::max(norm2_[j] - lowered, 0.0);
            // |r + e|² differs from |r|² by at most 2|r||e| + |e|².
            slack_[j] += 2 * std::sqrt(lowered) * error + error * error + 4 * EPS64 * norm2_[j];
        }
    });
}

// Enters a norm² that was computed in fp64.
void Search::set_exact(int64_t column, double norm2) {
    const double error = 8 * EPS64 * std::sqrt(noise2_[column]);
    norm2_[column] = norm2;
    slack_[column] = 2 * std::sqrt(norm2) * error + error * error;
}

// Recomputes in fp64 the norms of all columns whose bound reaches known2.
void Search::refresh(double known2) {
    fp32_pass_ = false;
    order_.clear();
    for (int64_t j = 0; j < w_.columns; ++j) {
        if (bound(j) >= known2 * (1 - TIE)) order_.push_back(j);
    }
    constexpr int64_t chunk = 256;
    for (size_t first = 0; first < order_.size(); first += chunk) {
        const int64_t count = std::min<int64_t>(chunk, order_.size() - first);
        const int64_t* columns = order_.data() + first;
        residual_.gather(w_, columns, count, threads_);
        basis_.project_out(residual_);
        for (int64_t j = 0; j < count; ++j) {
            double norm2 = 0.0;
            for (int64_t i = 0; i < w_.rows; ++i)
                norm2 += residual_.row(i)[j] * residual_.row(i)[j];
            set_exact(columns[j], norm2);
            alive_[columns[j]] = independent(columns[j], norm2);
        }
    }
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

}  // namespace

Pivots search_pivots(const MatrixView& w, const PivotOptions& options, int threads,
                     const Interrupted& interrupted) {
    return Search(w, options, threads).run(interrupted);
}

}  // namespace qrlora
