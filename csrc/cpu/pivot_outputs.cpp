// q and r of a search that is asked for them: what it computes to find the pivots is what they are
// made of. A function of the matrix and the number of pivots, so that a later search for as many
// gives the same bits.
#include <algorithm>

#include "qrlora/cpu/pivot_search.h"

namespace qrlora {

// How many of the block's rows of r each column gets: an accepted one ends at its diagonal, one
// that was taken or dependent before has none.
void Search::count_new_rows() {
    const int64_t count = static_cast<int64_t>(accepted_.size());
    new_rows_.resize(w_.columns);
    for (int64_t j = 0; j < w_.columns; ++j) new_rows_[j] = alive_[j] ? count : 0;
    for (int64_t s = 0; s < count; ++s) new_rows_[block_column(s)] = s + 1;
}

void Search::store_r(int64_t s, int64_t column, double value) {
    store(out_->r, out_->dtype, (block_start() + s) * w_.columns + column, value);
}

void Search::store_diagonal(int64_t s, double value) {
    out_->diagonal[block_start() + s] = value;
    store_r(s, block_column(s), value);
}

void Search::store_basis() {
    constexpr int64_t chunk = 64;
    const int64_t size = basis_.size();
    parallel_for(threads_, (w_.rows + chunk - 1) / chunk, [&](int64_t part) {
        for (int64_t i = part * chunk; i < std::min((part + 1) * chunk, w_.rows); ++i) {
            const double* row = basis_.panel().row(i);
            for (int64_t j = 0; j < size; ++j) {
                store(out_->q, out_->dtype, i * options_.limit + j, row[j]);
            }
        }
    });
}

}  // namespace qrlora
