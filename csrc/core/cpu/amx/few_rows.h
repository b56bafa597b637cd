// At most 64 rows of A. B is the larger operand by far, is read once, as it lies, and sets the
// pace.
#pragma once

#include "../arena.h"
#include "block.h"
#include "qrlora/cpu/parallel.h"

namespace qrlora::amx {

constexpr int64_t few = 64;

// From 49 rows on the larger blocks are faster where B is small.
inline bool is_few(const Gemm& g) {
    return g.m <= few - 16 || (g.m <= few && g.n * padded_depth(g) > 1 << 19);
}

// What the two ways of reading B have in common.
struct FewRows {
    const Gemm& g;
    const int64_t tall;  // tiles of 16 rows of A: 1 to 4
    const int64_t rows;  // rows of such a tile: those of A where one tile holds them all
    explicit FewRows(const Gemm& gemm)
        : g(gemm), tall(tiles(gemm.m, 16)), rows(std::min<int64_t>(gemm.m, 16)) {}

    // Rounds blocks of 32 rows of A each, in columns from j on, into C.
    void finish_blocks(const float* blocks, int64_t j) const {
        for (int64_t i = 0; i < g.m; i += side, blocks += side * side) finish(g, blocks, i, j);
    }
};

// The deepest product is the weight's and decides how B is read; the other may lie either way.
inline bool columns_contiguous(const Gemm& g) {
    const bool second = g.count == 2 && g.products[1].depth > g.products[0].depth;
    return g.products[second].b.row == 1;
}

// Columns of B are contiguous: C^T = B^T A^T with B in place as the left operand.
void gemm_by_columns(const Gemm& g);

// Rows are: B in pairs of rows as the right operand, C in the L2 cache.
void gemm_by_rows(const Gemm& g);

}  // namespace qrlora::amx
