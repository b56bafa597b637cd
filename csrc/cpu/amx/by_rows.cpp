// C = A B for at most 32 rows of A where rows of B are contiguous: 64 rows at a time are swept from
// end to end, two and two made pairs in the L1 cache, while C waits in the L2 cache and the tiles of
// A stay in their registers.
#include <algorithm>

#include "few_rows.h"

namespace qrlora::amx {

namespace {

constexpr int64_t sweep = 2 * tile_depth;
constexpr int64_t widest = 4096;  // columns of a panel: 32 rows of C in fp32 are 512 KiB

class Task : FewRows {
  public:
    Task(const Gemm& gemm, int64_t panel, Scratch& scratch) : FewRows(gemm) {
        const int64_t sums = side * side + panel * tall * rows,
                      left = padded_depth(g) * tall * rows + side * tile_depth;
        auto* bytes = static_cast<char*>(
            scratch.get(sums * sizeof(float) + (left + sweep * side) * sizeof(bf16)));
        block_ = reinterpret_cast<float*>(bytes);
        sums_ = block_ + side * side;
        pairs_ = reinterpret_cast<bf16*>(sums_ + panel * tall * rows);
        left_ = pairs_ + sweep * side;
        pack_left();
    }

    void run(int64_t first, int64_t last) {
        std::memset(sums_, 0, round_up(last - first, side) * tall * rows * sizeof(float));
        const bf16* left = left_;
        for (int t = 0; t < g.count; ++t) {
            const Product& p = g.products[t];
            for (int64_t d = 0; d < p.depth; d += sweep) {
                const bool two = p.depth - d > tile_depth;
                if (tall == 1)
                    two ? add<2, 1>(p, left, d, first, last) : add<1, 1>(p, left, d, first, last);
                else
                    two ? add<2, 2>(p, left, d, first, last) : add<1, 2>(p, left, d, first, last);
                left += (two ? 2 : 1) * tall * rows * tile_depth;
            }
        }
        for (int64_t j = first; j < last; j += side) {
            collect(sums_ + (j - first) * tall * rows);
            finish(g, block_, 0, j);
        }
    }

  private:
    // The tiles of A. pack_a writes 32 rows each time; those that are not wanted, the next call
    // writes over.
    void pack_left() {
        bf16* to = left_;
        for (int t = 0; t < g.count; ++t) {
            const Product& p = g.products[t];
            for (int64_t d = 0; d < p.depth; d += tile_depth, to += tall * rows * tile_depth)
                pack_a(p.a.data + d * p.a.col, p.a.row, p.a.col,
                       std::min(tile_depth, p.depth - d), g.m, to, tile_depth);
        }
    }

    // Adds rows [d, d + 32 DEEP) of B to columns [first, last) of the sums; A has TALL tiles.
    template <int DEEP, int TALL>
    void add(const Product& p, const bf16* left, int64_t d, int64_t first, int64_t last) {
        const int64_t depth = std::min(sweep, p.depth - d), tile = rows * tile_depth;
        Ahead ahead;
        if (p.b.col == 1 && is_far(p, g.n))
            ahead = {p.b.data + (d + sweep) * p.b.row + first, p.b.row, last - first,
                     std::min(sweep, p.depth - d - sweep)};
        _tile_loadd(2, left, 64);
        if constexpr (DEEP * TALL >= 2) _tile_loadd(3, left + tile, 64);
        if constexpr (DEEP * TALL == 4) {
            _tile_loadd(4, left + 2 * tile, 64);
            _tile_loadd(5, left + 3 * tile, 64);
        }
        const bf16* from = p.b.data + d * p.b.row + first * p.b.col;
        float* sums = sums_;
        for (int64_t j = first; j < last; j += side, from += side * p.b.col) {
            ahead.lines(sweep);
            pack_b(from, p.b.row, p.b.col, depth, g.n - j, pairs_);
            add_tile<DEEP, TALL>(pairs_, sums);
            add_tile<DEEP, TALL>(pairs_ + 512, sums + TALL * rows * 16);
            sums += 2 * TALL * rows * 16;
        }
    }

    // Sums of 16 columns.
    template <int DEEP, int TALL>
    void add_tile(const bf16* pairs, float* sums) const {
        float* below = sums + rows * 16;
        _tile_loadd(0, sums, 64);
        if constexpr (TALL == 2) _tile_loadd(1, below, 64);
        _tile_loadd(6, pairs, 64);
        _tile_dpbf16ps(0, 2, 6);
        if constexpr (TALL == 2) _tile_dpbf16ps(1, 3, 6);
        if constexpr (DEEP == 2) {
            _tile_loadd(7, pairs + 1024, 64);
            if constexpr (TALL == 1) {
                _tile_dpbf16ps(0, 3, 7);
            } else {
                _tile_dpbf16ps(0, 4, 7);
                _tile_dpbf16ps(1, 5, 7);
            }
        }
        _tile_stored(0, sums, 64);
        if constexpr (TALL == 2) _tile_stored(1, below, 64);
    }

    // The sums of 32 columns as a block.
    void collect(const float* sums) {
        for (int64_t j = 0; j < side; j += 16)
            for (int64_t i = 0; i < tall * rows; ++i, sums += 16)
                _mm512_store_ps(block_ + i * side + j, _mm512_load_ps(sums));
    }

    float *block_, *sums_;
    bf16 *pairs_, *left_;
};

}  // namespace

void gemm_by_rows(const Gemm& g) {
    const int64_t panels = round_up((g.n + widest - 1) / widest, g.threads);
    const int64_t panel = round_up((g.n + panels - 1) / panels, side);
#pragma omp parallel num_threads(g.threads)
    {
        thread_local Scratch scratch;
        const TileScope scope(std::min<int64_t>(g.m, 16));
        Task task(g, panel, scratch);
#pragma omp for schedule(dynamic, 1)
        for (int64_t j = 0; j < g.n; j += panel) task.run(j, std::min(g.n, j + panel));
    }
}

}  // namespace qrlora::amx
