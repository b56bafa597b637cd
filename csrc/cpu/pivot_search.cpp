// Greedy column pivots, found block by block without updating the matrix. The method is explained,
// and written once more in plain torch operations, in qrlora_kernels/linalg/blocked.py.
//
// Where many pivots are needed, recomputing the candidates' residuals from an ever larger basis
// costs more than updating all of them: from EXPLICIT_FROM on the residual matrix is kept, in fp64.
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
// Shares of min(rows, columns): a search that may go beyond the first is explicit from the start,
// one that a rule may stop earlier becomes explicit at the second.
constexpr double EXPLICIT_LIMIT = 0.3;
constexpr double EXPLICIT_FROM = 0.2;
constexpr double NONE = -std::numeric_limits<double>::infinity();

enum class Outcome { more, refresh, below_tau };

class Search {
  public:
    Search(const MatrixView& w, const PivotOptions& options, int threads)
        : w_(w),
          options_(options),
          threads_(threads),
          basis_(w.rows, capacity(w, options), threads),
          fp32_pass_(w.dtype != DType::f64) {}

    Pivots run(const Interrupted& interrupted);

  private:
    static int64_t capacity(const MatrixView& w, const PivotOptions& options);
    bool start();
    Outcome block(bool fresh);
    void choose_candidates();
    Outcome pivot_block(bool certify_first);
    bool certified(double value, int64_t column) const;
    void take_block();
    template <class T>
    void lower_bounds(const Panel& added);
    void project_explicit(const Panel& added, const double* q, int64_t height, int64_t first,
                          int64_t ld, double* rows);
    void refresh(double known2);
    void set_exact(int64_t column, double norm2);
    bool bracketed() const;
    bool wants_explicit() const;
    void make_explicit();
    void compact();
    void gather_residual(const int64_t* columns, int64_t count);

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
    // The residual of the columns kept_, and where in it a column is.
    bool explicit_ = false;
    Panel matrix_, compacted_;
    std::vector<int64_t> kept_, place_;
    std::vector<double> left2_;
    std::vector<int64_t> accepted_;
    std::vector<double> lower_;
    double floor2_ = 0.0;  // magnitude rule: (tau |R_11|)²
    Pivots found_;
};

// Columns that the basis can hold: an explicit search needs one block beyond where it begins.
int64_t Search::capacity(const MatrixView& w, const PivotOptions& options) {
    const auto whole = static_cast<double>(std::min(w.rows, w.columns));
    if (options.limit <= EXPLICIT_LIMIT * whole) return options.limit;
    const double before = options.rule == RankRule::none ? 0.0 : EXPLICIT_FROM * whole;
    const auto most = static_cast<int64_t>(before) + 1 + std::max<int64_t>(options.block, 128);
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
    if (!explicit_ && wants_explicit()) make_explicit();
    if (explicit_) compact();
    choose_candidates();
    const int64_t count = static_cast<int64_t>(candidates_.size());
    gather_residual(candidates_.data(), count);
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
    // An explicit residual costs nothing to look at, so smaller blocks suffice there.
    const int64_t most = explicit_
                             ? std::clamp<int64_t>(std::min(w_.rows, w_.columns) / 16, 32, 128)
                             : options_.block;
    const int64_t count = std::min<int64_t>(most, order_.size());
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
    if (explicit_) basis_.clear();  // the residual is orthogonal to what was taken before
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
    const int64_t columns = explicit_ ? matrix_.columns : w_.columns;
    const int64_t width = std::clamp<int64_t>(round_up(columns / (4 * threads_), TILE_N), TILE_N,
                                              1024 / static_cast<int64_t>(sizeof(T)));
    parallel_for(threads_, (columns + width - 1) / width, [&](int64_t tile) {
        const int64_t first = tile * width, last = std::min(first + width, columns);
        thread_local AlignedBuffer<T> rows_buffer;
        T* rows = rows_buffer.reserve(height * width);
        const int64_t ld = round_up(last - first, TILE_N);
        if constexpr (sizeof(T) == 4) {
            dense_kernels().project_f32(w_, q, height, first, last, rows, ld);
        } else if (explicit_) {
            project_explicit(added, q, height, first, ld, rows);
        } else {
            dense_kernels().project_f64(w_, q, height, first, last, rows, ld);
        }
        for (int64_t i = first; i < last; ++i) {
            const int64_t j = explicit_ ? kept_[i] : i;
            double lowered = 0.0, noise = 0.0;
            for (int64_t s = 0; s < count; ++s) {
                const double value = rows[s * ld + i - first];
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

// rows[., ld] = addedᵀ E for ld columns of the explicit residual E, and E -= added rows.
void Search::project_explicit(const Panel& added, const double* q, int64_t height, int64_t first,
                              int64_t ld, double* rows) {
    std::fill(rows, rows + height * ld, 0.0);
    double* tile = matrix_.row(0) + first;
    dense_kernels().gemm_tn({height, ld, w_.rows, q, height, tile, matrix_.ld, rows, ld, 1.0});
    dense_kernels().gemm_nn({round_up(w_.rows, TILE_M), ld, added.columns, added.row(0), added.ld,
                             rows, ld, tile, matrix_.ld, -1.0});
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
        gather_residual(columns, count);
        for (int64_t j = 0; j < count; ++j) {
            double norm2 = 0.0;
            for (int64_t i = 0; i < w_.rows; ++i)
                norm2 += residual_.row(i)[j] * residual_.row(i)[j];
            set_exact(columns[j], norm2);
            alive_[columns[j]] = independent(columns[j], norm2);
        }
    }
}

bool Search::wants_explicit() const {
    const double whole = static_cast<double>(std::min(w_.rows, w_.columns));
    if (options_.limit <= EXPLICIT_LIMIT * whole) return false;
    return options_.rule == RankRule::none || basis_.size() >= EXPLICIT_FROM * whole;
}

void Search::make_explicit() {
    kept_.clear();
    place_.resize(w_.columns);
    for (int64_t j = 0; j < w_.columns; ++j) {
        if (alive_[j]) kept_.push_back(j);
    }
    matrix_.gather(w_, kept_.data(), static_cast<int64_t>(kept_.size()), threads_);
    basis_.project_out(matrix_);
    for (size_t i = 0; i < kept_.size(); ++i) place_[kept_[i]] = static_cast<int64_t>(i);
    explicit_ = true;
    fp32_pass_ = false;
}

// Drops columns that are pivots or dependent by now, once they are a fifth.
void Search::compact() {
    std::vector<int64_t> alive;
    for (int64_t j : kept_) {
        if (alive_[j]) alive.push_back(j);
    }
    if (alive.size() * 5 > kept_.size() * 4) return;
    std::vector<int64_t> places;
    for (size_t i = 0; i < alive.size(); ++i) {
        places.push_back(place_[alive[i]]);
        place_[alive[i]] = static_cast<int64_t>(i);
    }
    compacted_.gather(matrix_.view(), places.data(), static_cast<int64_t>(places.size()), threads_);
    std::swap(matrix_, compacted_);
    kept_ = std::move(alive);
}

// Residuals of the given columns in fp64, to residual_.
void Search::gather_residual(const int64_t* columns, int64_t count) {
    if (!explicit_) {
        residual_.gather(w_, columns, count, threads_);
        basis_.project_out(residual_);
        return;
    }
    std::vector<int64_t> places(count);
    for (int64_t i = 0; i < count; ++i) places[i] = place_[columns[i]];
    residual_.gather(matrix_.view(), places.data(), count, threads_);
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
