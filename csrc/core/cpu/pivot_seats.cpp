// The candidates of a search that keeps the residual matrix. Most of them stay candidates in the
// next block: they keep their seats in front of the matrix, and their Gram, which falls with the
// accepted ones as their norms do, so that only newcomers are multiplied with everyone.
#include <algorithm>

#include "pivot_search.h"
#include "qrlora/cpu/parallel.h"

namespace qrlora {

namespace {

constexpr int64_t SEATS = 32;  // rows of the matrix in one task of a product

}  // namespace

// Candidates move to the front of the residual matrix; candidates_ is put in their order.
void Search::seat_candidates() {
    const int64_t count = static_cast<int64_t>(candidates_.size());
    for (int64_t j : candidates_) chosen_[j] = 1;
    newcomers_.clear();
    auto next = candidates_.begin();
    for (int64_t seat = 0; seat < count; ++seat) {
        const int64_t here = kept_[seat];
        if (chosen_[here]) {
            if (!known_[seat]) newcomers_.push_back(seat);
            continue;
        }
        while (place_[*next] < count) ++next;
        const int64_t from = place_[*next];
        double *to_row = matrix_.row(seat), *from_row = matrix_.row(from);
        if (alive_[here]) {
            std::swap_ranges(to_row, to_row + w_.rows, from_row);
        } else {
            std::copy(from_row, from_row + w_.rows, to_row);
        }
        std::swap(kept_[seat], kept_[from]);
        std::swap(place_[here], place_[*next]);
        newcomers_.push_back(seat);
    }
    for (int64_t j : candidates_) chosen_[j] = 0;
    std::copy(kept_.begin(), kept_.begin() + count, candidates_.begin());
    drop_dead(count);
}

// Drops, from the given row on, columns that are pivots or dependent by now: the last ones move
// into their places.
void Search::drop_dead(int64_t from) {
    int64_t size = static_cast<int64_t>(kept_.size());
    for (int64_t i = from; i < size; ++i) {
        while (i < size && !alive_[kept_[i]]) {
            --size;
            if (i == size) break;
            kept_[i] = kept_[size];
            place_[kept_[i]] = i;
            std::copy(matrix_.row(size), matrix_.row(size) + w_.rows, matrix_.row(i));
        }
    }
    kept_.resize(size);
    matrix_.rows = size;
}

// The newcomers' rows and columns of the candidates' Gram.
void Search::meet_newcomers() {
    const int64_t count = static_cast<int64_t>(candidates_.size());
    const int64_t fresh = static_cast<int64_t>(newcomers_.size());
    if (fresh == 0) return;
    residual_.gather(residual_columns(), newcomers_.data(), fresh, threads_);
    products_.shape(count, fresh);
    const int64_t padded = round_up(count, TILE_M);
    parallel_for(threads_, (padded + SEATS - 1) / SEATS, [&](int64_t part) {
        const int64_t first = part * SEATS;
        dense_kernels().gemm_nn({std::min(SEATS, padded - first), round_up(fresh, LANES), w_.rows,
                                 matrix_.row(first), matrix_.ld, residual_.row(0), residual_.ld,
                                 products_.row(first), products_.ld, 1.0, true});
    });
    for (int64_t n = 0; n < fresh; ++n) {
        const int64_t seat = newcomers_[n];
        for (int64_t i = 0; i < count; ++i) {
            gram_.row(std::min(i, seat))[std::max(i, seat)] = products_.row(i)[n];
        }
        error2_[seat] = GRAM_ERROR * gram_.row(seat)[seat];
        known_[seat] = 1;
    }
}

// Takes the accepted candidates out of the Gram of the others.
void Search::lower_gram() {
    const int64_t count = static_cast<int64_t>(candidates_.size());
    const int64_t steps = static_cast<int64_t>(accepted_.size());
    for (int64_t left = 0; left < count; left += TILE_N) {
        // The upper triangle is what is read.
        const int64_t rows = std::min(round_up(count, TILE_M), left + TILE_N);
        dense_kernels().gemm_tn({rows, TILE_N, steps, factor_.row(0), factor_.ld,
                                 factor_.row(0) + left, factor_.ld, gram_.row(0) + left, gram_.ld,
                                 -1.0});
    }
    for (int64_t i = 0; i < count; ++i) known_[i] = error2_[i] <= CARRY * left2_[i];
}

}  // namespace qrlora
