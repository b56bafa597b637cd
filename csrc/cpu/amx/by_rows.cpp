// C = A B for at most 32 rows of A where rows of B are contiguous: 32 rows at a time are swept from
// end to end, two and two made pairs in the L1 cache, while C waits in the L2 cache and the tiles of
// A stay in their registers.
#include <algorithm>

#include "few_rows.h"

namespace qrlora::amx {

namespace {

constexpr int64_t widest = 4096;  // columns of a panel: 32 rows of C in fp32 are 512 KiB

class Task : FewRows {
  public:
    Task(const Gemm& gemm, int64_t panel, Scratch& scratch) : FewRows(gemm) {
        const int64_t sums = panel * tall * rows, left = padded_depth(g) * tall * rows;
        auto* bytes = static_cast<char*>(
            scratch.get(block_bytes + sums * sizeof(float) +
                        (side * tile_depth + left + side * tile_depth) * sizeof(bf16)));
        block_ = reinterpret_cast<float*>(bytes);
        sums_ = block_ + side * side;
        pairs_ = reinterpret_cast<bf16*>(sums_ + sums);
        left_ = pairs_ + side * tile_depth;
        pack_left();
    }

    void run(int64_t first, int64_t last) {
        const int64_t block = side * tall * rows;
        std::memset(sums_, 0, tiles(last - first, side) * block * sizeof(float));
        const bf16* left = left_;
        for (int t = 0; t < g.count; ++t) {
            const Product& p = g.products[t];
            for (int64_t d = 0; d < p.depth; d += tile_depth, left += tall * rows * tile_depth) {
                if (tall == 2)
                    add<true>(p, left, d, first, last);
                else
                    add<false>(p, left, d, first, last);
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
                pack_a(p.a.data + d * p.a.col, p.a.row, p.a.col,
                       std::min(tile_depth, p.depth - d), g.m, to, tile_depth);
        }
    }

    // Adds rows [d, d + 32) of B to columns [first, last) of the sums.
    template <bool two>
    void add(const Product& p, const bf16* left, int64_t d, int64_t first, int64_t last) {
        const int64_t depth = std::min(tile_depth, p.depth - d), tile = rows * 16;
        _tile_loadd(4, left, 64);
        if constexpr (two) _tile_loadd(5, left + side * 16, 64);
        const bf16* from = p.b.data + d * p.b.row + first * p.b.col;
        float* sums = sums_;
        for (int64_t j = first; j < last; j += side, from += side * p.b.col) {
            pack_b(from, p.b.row, p.b.col, depth, g.n - j, pairs_);
            for (int64_t half = 0; half < 2; ++half) {
                _tile_loadd(0, sums, 64);
                _tile_loadd(6, pairs_ + half * 512, 64);
                _tile_dpbf16ps(0, 4, 6);
                if constexpr (two) {
                    _tile_loadd(1, sums + tile, 64);
                    _tile_dpbf16ps(1, 5, 6);
                    _tile_stored(1, sums + tile, 64);
                }
                _tile_stored(0, sums, 64);
                sums += (two ? 2 : 1) * tile;
            }
        }
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
