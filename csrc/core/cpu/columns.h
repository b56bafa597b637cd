// Few rows times a large matrix on a team of threads: each owns columns of the product, so a
// result's bits do not depend on the number of threads.
#pragma once

#include <algorithm>

#include "qrlora/cpu/parallel.h"
#include "qrlora/strided.h"
#include "skinny.h"

namespace qrlora::QRLORA_ISA {

template <typename T>
Layout<T> layout(const Strided2d& m) {
    return {static_cast<const T*>(m.data), m.row, m.col};
}

template <typename T>
Layout<T> transposed_layout(const Strided2d& m) {
    return layout<T>(transposed(m));
}

// Waking a thread takes as long as reading some hundred kilobytes of the weight [n, k].
inline int useful_threads(int threads, int64_t m, int64_t n, int64_t k) {
    constexpr int64_t grain = 1 << 19;
    const int64_t work = std::max<int64_t>(4, m) * n * k;
    return static_cast<int>(std::min<int64_t>(threads, 1 + work / grain));
}

// Columns that keep C in the L1 cache, but make whole stretches of memory.
inline int64_t cached_columns(int64_t m) {
    return std::max<int64_t>(512, 8192 / std::max<int64_t>(1, m));
}

// Columns of C [m, columns] += A B at a time: where B is read by rows, as many as are cached; where
// it is read by columns, a few.
template <typename T>
int64_t block_columns(int64_t m, Layout<T> b, int64_t columns, int threads) {
    const int64_t cached = b.col == 1 ? cached_columns(m) : 64;
    const int64_t share = (columns + threads - 1) / threads;
    return std::max<int64_t>(16, std::min(cached, (share + 15) / 16 * 16));
}

// Bytes of add_product's `part` for such a block.
template <typename T>
int64_t part_bytes(int64_t m) {
    return std::min(ROWS_AT_ONCE, m) * cached_columns(m) * static_cast<int64_t>(sizeof(T));
}

// Calls body(first, last) for blocks of rows or columns, shared among the threads of the team,
// which do not wait for each other at its end.
template <typename Body>
void over_blocks(Team team, int64_t count, int64_t block, const Body& body) {
    team.for_static((count + block - 1) / block,
                    [&](int64_t b) { body(b * block, std::min(count, (b + 1) * block)); });
}

}  // namespace qrlora::QRLORA_ISA
