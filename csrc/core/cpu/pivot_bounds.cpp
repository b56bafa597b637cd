// What is known of the columns that are not pivots: bounds of their residual norms.
#include <algorithm>
#include <cmath>

#include "pivot_search.h"
#include "qrlora/cpu/parallel.h"

namespace qrlora {

// The residuals of the accepted candidates, to accepted_panel_, and the factor of their Gram.
void Search::gather_accepted() {
    const int64_t count = static_cast<int64_t>(accepted_.size());
    lower_.resize(count * count);
    if (explicit_) {
        // The Gram carried over blocks is exact enough to choose by, not to orthonormalise with.
        accepted_panel_.gather(residual_columns(), accepted_.data(), count, threads_);
        multiply_tn(accepted_panel_, count, accepted_panel_, products_, threads_, true);
        for (int64_t i = 0; i < count; ++i) {
            std::copy(products_.row(i), products_.row(i) + count, lower_.begin() + i * count);
        }
    } else {
        accepted_panel_.shape(w_.rows, count);
        accepted_panel_.clear_padding();
        for (int64_t i = 0; i < w_.rows; ++i) {
            for (int64_t j = 0; j < count; ++j) {
                accepted_panel_.row(i)[j] = residual_.row(i)[accepted_[j]];
            }
        }
        for (int64_t i = 0; i < count; ++i) {
            for (int64_t j = 0; j < count; ++j) {
                const auto [first, second] = std::minmax(accepted_[i], accepted_[j]);
                lower_[i * count + j] = gram_.row(first)[second];
            }
        }
    }
    cholesky(lower_, count);
}

// Grows the basis by the accepted candidates and lowers every bound by them.
void Search::take_block() {
    const int64_t count = static_cast<int64_t>(accepted_.size());
    gather_accepted();
    // An explicit residual is orthogonal to what was taken before, as far as it has not shrunk.
    if (explicit_ && !found_.factors) basis_.clear();
    basis_.append(accepted_panel_, lower_, !explicit_ || shrunk());
    enter_growth(count);
    if (found_.factors) add_rows();
    if (explicit_) {
        update_explicit(accepted_panel_);
    } else if (fp32_pass_) {
        lower_bounds<float>(accepted_panel_);
    } else {
        lower_bounds<double>(accepted_panel_);
    }
    for (size_t i = 0; i < candidates_.size(); ++i) {
        const int64_t j = candidates_[i];
        set_exact(j, std::max(left2_[i], 0.0));
        slack_[j] += error2_[i];
        // What rounding may have hidden is computed again before it counts as nothing.
        alive_[j] = independent(j, left2_[i] + error2_[i]);
    }
    if (explicit_) lower_gram();
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
    const double eps = sizeof(T) == 4 ? EPS32 : EPS64;
    const double unit = 8 * eps * std::sqrt(static_cast<double>(count));
    const int64_t columns = w_.columns;
    const int64_t width = std::clamp<int64_t>(round_up(columns / (4 * threads_), TILE_N), TILE_N,
                                              1024 / static_cast<int64_t>(sizeof(T)));
    parallel_for(threads_, (columns + width - 1) / width, [&](int64_t tile) {
        const int64_t first = tile * width, last = std::min(first + width, columns);
        thread_local AlignedBuffer<T> rows_buffer;
        T* rows = rows_buffer.reserve(height * width);
        const int64_t ld = round_up(last - first, TILE_N);
        if constexpr (sizeof(T) == 4) {
            dense_kernels().project_f32(w_, q, height, first, last, rows, ld);
        } else {
            dense_kernels().project_f64(w_, q, height, first, last, rows, ld);
        }
        for (int64_t j = first; j < last; ++j) lower_bound(j, rows + j - first, ld, unit);
        if (!found_.factors) return;
        for (int64_t s = 0; s < count; ++s) {
            for (int64_t j = first; j < last; ++j) {
                if (s < new_rows_[j]) store_r(s, j, rows[s * ld + j - first]);
            }
        }
    });
    // The norms are fp64 where the pass is fp32.
    for (int64_t s = 0; found_.factors && s < count; ++s) store_diagonal(s, block_norm(s));
}

// How much larger the new pivots were when the search began.
void Search::enter_growth(int64_t count) {
    growth_.resize(count);
    for (int64_t s = 0; s < count; ++s) {
        growth_[s] = start2_[block_column(s)] / (block_norm(s) * block_norm(s));
    }
}

// Takes the new rows of r out of column j's bound; `unit` is the rounding of the product.
template <class T>
void Search::lower_bound(int64_t j, const T* row, int64_t stride, double unit) {
    double lowered = 0.0, noise = 0.0;
    for (size_t s = 0; s < growth_.size(); ++s) {
        const double value = row[s * stride];
        lowered += value * value;
        noise += growth_[s] * value * value;
    }
    noise2_[j] += noise;
    const double error = unit * std::sqrt(start2_[j]);
    norm2_[j] = std::max(norm2_[j] - lowered, 0.0);
    // |r + e|² differs from |r|² by at most 2|r||e| + |e|².
    slack_[j] += 2 * std::sqrt(lowered) * error + error * error + 4 * EPS64 * norm2_[j];
}

template void Search::lower_bound(int64_t, const double*, int64_t, double);

// Enters a norm² that was computed in fp64.
void Search::set_exact(int64_t column, double norm2) {
    const double error = 8 * EPS64 * std::sqrt(noise2_[column]);
    norm2_[column] = norm2;
    slack_[column] = 2 * std::sqrt(norm2) * error + error * error;
}

// Recomputes in fp64 the norms of all columns whose bound reaches known2.
void Search::refresh(double known2) {
    fp32_pass_ = false;
    held_.clear();
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

// The candidates' residuals, to residual_. Those of the block before that are candidates again
// stay, less the newest directions; candidates_ is put in the order in which residual_ has them.
void Search::refill_residual() {
    const int64_t count = static_cast<int64_t>(candidates_.size());
    if (static_cast<int64_t>(held_.size()) != count) held_.clear();  // the panel changes its shape
    std::vector<int64_t> order, places;
    for (int64_t j : candidates_) chosen_[j] = 1;
    for (size_t i = 0; i < held_.size(); ++i) {
        if (!chosen_[held_[i]]) continue;
        chosen_[held_[i]] = 0;
        order.push_back(held_[i]);
        places.push_back(static_cast<int64_t>(i));
    }
    const int64_t kept = static_cast<int64_t>(order.size());
    for (int64_t j : candidates_) {
        if (chosen_[j]) order.push_back(j);
        chosen_[j] = 0;
    }
    candidates_ = held_ = order;
    if (kept == 0) {
        gather_residual(candidates_.data(), count);
    } else {
        constexpr int64_t chunk = 256;
        parallel_for(threads_, (w_.rows + chunk - 1) / chunk, [&](int64_t part) {
            for (int64_t i = part * chunk; i < std::min((part + 1) * chunk, w_.rows); ++i) {
                double* row = residual_.row(i);
                for (int64_t j = 0; j < kept; ++j) row[j] = row[places[j]];
            }
        });
        basis_.project_out(residual_, 0, kept, held_at_);
        residual_.replace(kept, w_, candidates_.data() + kept, count - kept, threads_);
        basis_.project_out(residual_, kept, count, 0);
    }
    held_at_ = basis_.size();
}

// Residuals of the given columns in fp64, to residual_.
void Search::gather_residual(const int64_t* columns, int64_t count) {
    if (explicit_) {
        std::vector<int64_t> places(count);
        for (int64_t i = 0; i < count; ++i) places[i] = place_[columns[i]];
        residual_.gather(residual_columns(), places.data(), count, threads_);
    } else {
        residual_.gather(w_, columns, count, threads_);
        basis_.project_out(residual_);
    }
}

}  // namespace qrlora
