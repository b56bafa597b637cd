// C = A B for at most 32 rows of A where rows of B are contiguous: 32 or 64 rows at a time are
// swept from end to end, two and two made pairs in the L1 cache, while C waits in the L2 cache and
// the tiles of A stay in their registers.
#include <algorithm>

#include "few_rows.h"

namespace qrlora::amx {

namespace {

constexpr int64_t widest = 4096;  // columns of a panel: 32 rows of C in fp32 are 512 KiB
// A sweep of 64 rows halves the traffic of C, but the processor fetches no more than 32 streams
// ahead: only where B is in the L2 cache.
constexpr int64_t cached = 1 << 21;
constexpr int64_t deepest = 2 * tile_depth;

class Task : FewRows {
  public:
    Task(const Gemm& gemm, int64_t panel, Scratch& scratch) : FewRows(gemm) {
        const int64_t sums = panel * tall * rows, left = padded_depth(g) * tall * rows;
        auto* bytes = static_cast<char*>(
            scratch.get(block_bytes + sums * sizeof(float) +
                        (side * deepest + left + side * tile_depth) * sizeof(bf16)));
        block_ = reinterpret_cast<float*>(bytes);
        sums_ = block_ + side * side;
        pairs_ = reinterpret_cast<bf16*>(sums_ + sums);
        left_ = pairs_ + side * deepest;
        pack_left();
    }

    void run(int64_t first, int64_t last) {
        const int64_t block = side * tall * rows;
        std::memset(sums_, 0, tiles(last - first, side) * block * sizeof(float));
        const bf16* left = left_;
        for (int t = 0; t < g.count; ++t) {
            const Product& p = g.products[t];
            const int64_t bytes = p.depth * (last - first) * static_cast<int64_t>(sizeof(bf16));
            const int64_t sweep = bytes <= cached ? deepest : tile_depth;
            for (int64_t d = 0; d < p.depth; d += sweep) {
                const bool deep = sweep == deepest && p.depth - d > tile_depth;
                if (tall == 2)
                    deep ? add<true, true>(p, left, d, first, last)
                         : add<false, true>(p, left, d, first, last);
                else
                    deep ? add<true, false>(p, left, d, first, last)
                         : add<false, false>(p, left, d, first, last);
                left += (deep ? 2 : 1) * tall * rows * tile_depth;
            }
        }
        const float* sums = sums_;
        for (int64_t j = first; j < last; j += side, sums += block) {
            collect(sums);
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
                pack_a(p.a.data + d * p.a.col, p.a.row, p.a.col, std::min(tile_depth, p.depth - d),
                       g.m, to, tile_depth);
        }
    }

    // Adds rows [d, d + 32) of B, or [d, d + 64) if `deep`, to columns [first, last) of the sums. A
    // has `two` tiles of rows: 2 and 3 for the first 32 rows of B, 4 and 5 for the others.
    template <bool deep, bool two>
    void add(const Product& p, const bf16* left, int64_t d, int64_t first, int64_t last) {
        const int64_t depth = std::min(deep ? deepest : tile_depth, p.depth - d);
        const int64_t tile = rows * tile_depth, half = tall * rows * 16;
        _tile_loadd(2, left, 64);
        if constexpr (two) _tile_loadd(3, left + tile, 64);
        if constexpr (deep) _tile_loadd(4, left + tall * tile, 64);
        if constexpr (deep && two) _tile_loadd(5, left + 3 * tile, 64);
        const bf16* from = p.b.data + d * p.b.row + first * p.b.col;
        float* sums = sums_;
        for (int64_t j = first; j < last; j += side, from += side * p.b.col, sums += 2 * half) {
            pack_b(from, p.b.row, p.b.col, depth, g.n - j, pairs_);
            add_half<deep, two>(pairs_, sums);
            add_half<deep, two>(pairs_ + 512, sums + half);
        }
    }

    // The sums of 16 columns.
    template <bool deep, bool two>
    void add_half(const bf16* pairs, float* sums) const {
        float* below = sums + rows * 16;
        _tile_loadd(0, sums, 64);
        if constexpr (two) _tile_loadd(1, below, 64);
        _tile_loadd(6, pairs, 64);
        _tile_dpbf16ps(0, 2, 6);
        if constexpr (two) _tile_dpbf16ps(1, 3, 6);
        if constexpr (deep) {
            _tile_loadd(7, pairs + side * tile_depth, 64);
            _tile_dpbf16ps(0, 4, 7);
            if constexpr (two) _tile_dpbf16ps(1, 5, 7);
        }
        _tile_stored(0, sums, 64);
        if constexpr (two) _tile_stored(1, below, 64);
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
    const int64_t panels = round_up(tiles(g.n, widest), g.threads);
    const int64_t panel = round_up(tiles(g.n, panels), side);
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
