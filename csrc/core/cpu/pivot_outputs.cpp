// q and r of a search that is asked for them: what it computes to find the pivots is what they are
// made of. A function of the matrix and the number of pivots, so that a later search for as many
// gives the same bits.
#include <algorithm>

#include "pivot_search.h"
#include "qrlora/cpu/parallel.h"

namespace qrlora {

// Room for the block's rows of r, zeroed, and how many of them each column gets: an accepted one
// ends at its diagonal, one that was taken or dependent before has none.
void Search::add_rows() {
    const int64_t count = static_cast<int64_t>(accepted_.size());
    const int64_t row = w_.columns * bytes_of(*options_.factors);
    const int64_t before = block_start() * row, after = before + count * row;
    PivotFactors& factors = *found_.factors;
    if (options_.rule == RankRule::none) factors.r.reserve(options_.limit * row);
    unsigned char* r = factors.r.grow(after, before);
    std::fill(r + before, r + after, 0);
    factors.diagonal.resize(block_start() + count);
    new_rows_.resize(w_.columns);
    for (int64_t j = 0; j < w_.columns; ++j) new_rows_[j] = alive_[j] ? count : 0;
    for (int64_t s = 0; s < count; ++s) new_rows_[block_column(s)] = s + 1;
}

void Search::store_r(int64_t s, int64_t column, double value) {
    const int64_t at = (block_start() + s) * w_.columns + column;
    store(found_.factors->r.data(), *options_.factors, at, value);
}

void Search::store_diagonal(int64_t s, double value) {
    found_.factors->diagonal[block_start() + s] = value;
    store_r(s, block_column(s), value);
}

void Search::store_basis() {
    constexpr int64_t chunk = 64;
    const int64_t size = basis_.size();
    found_.factors->r.fit(w_.columns * size * bytes_of(*options_.factors));
    unsigned char* q = found_.factors->q.reserve(w_.rows * size * bytes_of(*options_.factors));
    const Panel& qt = basis_.transposed();
    parallel_for(threads_, (w_.rows + chunk - 1) / chunk, [&](int64_t part) {
        const int64_t first = part * chunk, last = std::min(first + chunk, w_.rows);
        for (int64_t left = 0; left < size; left += LANES) {
            const int64_t right = std::min(left + LANES, size);
            for (int64_t i = first; i < last; ++i) {
                for (int64_t j = left; j < right; ++j)
                    store(q, *options_.factors, i * size + j, qt.row(j)[i]);
            }
        }
    });
}

}  // namespace qrlora
