// At most 32 rows of A. B is the larger operand by far, is read once, as it lies, and sets the pace.
#pragma once

#include "block.h"

namespace qrlora::amx {

// What the two ways of reading B have in common.
struct FewRows {
    const Gemm& g;
    const int64_t tall;  // tiles of 16 rows of A: 1 or 2
    const int64_t rows;  // rows of such a tile: those of A where one tile holds them all
    explicit FewRows(const Gemm& gemm)
        : g(gemm), tall(gemm.m > 16 ? 2 : 1), rows(std::min<int64_t>(gemm.m, 16)) {}
};

// Fetches the stretch of memory that is needed next into the L2 cache while the present one is
// multiplied: `count` rows of `width` elements, one after the other as they lie. One line in four is
// asked for; the processor's own prefetcher sees a stream and brings the others. Asking for all of
// them fills the buffers that the tile loads need themselves.
class Ahead {
  public:
    Ahead() = default;
    Ahead(const bf16* from, int64_t ld, int64_t width, int64_t count)
        : at_(from), end_(from + width), rows_(count), width_(width), ld_(ld) {}

    void lines(int64_t count) {
        for (int64_t i = 0; i < count && rows_ > 0; i += step) {
            _mm_prefetch(at_, _MM_HINT_T1);
            at_ += step * line;
            if (at_ < end_) continue;
            end_ += ld_;
            at_ = end_ - width_;
            --rows_;
        }
    }

  private:
    static constexpr int64_t line = 64 / sizeof(bf16), step = 4;
    const bf16 *at_ = nullptr, *end_ = nullptr;
    int64_t rows_ = 0, width_ = 0, ld_ = 0;
};

// Whether B comes from farther away than the L2 cache.
inline bool is_far(const Product& p, int64_t columns) {
    return columns * p.depth * static_cast<int64_t>(sizeof(bf16)) > (1 << 20);
}

inline bool columns_contiguous(const Gemm& g) {
    for (int t = 0; t < g.count; ++t)
        if (g.products[t].b.row != 1) return false;
    return true;
}

// Columns of every B are contiguous: C^T = B^T A^T with B in place as the left operand.
void gemm_by_columns(const Gemm& g);

// Rows are: B in pairs of rows as the right operand, C in the L2 cache.
void gemm_by_rows(const Gemm& g);

}  // namespace qrlora::amx
