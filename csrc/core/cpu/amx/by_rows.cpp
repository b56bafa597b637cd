// C = A B for few rows of A where rows of B are contiguous: 32 or 64 rows of B at a time are swept
// from end to end, two and two made pairs in the L1 cache, while C waits in the cache and the tiles
// of A stay in their registers.
#include <algorithm>

#include "few_rows.h"

namespace qrlora::amx {

namespace {

// Bytes of B that the L2 cache can hold. Then a sweep is 64 rows deep, which halves the traffic of
// C, and no wider than C fits the L1 cache; else it follows long stretches of memory, and no more
// rows than the processor fetches ahead by itself.
constexpr int64_t cached = 5 << 19;
constexpr int64_t deepest = 2 * tile_depth;
constexpr int64_t narrow = 1 << 13, wide = 1 << 17;  // elements of C

bool is_cached(const Gemm& g) {
    return g.n * padded_depth(g) * static_cast<int64_t>(sizeof(bf16)) <= cached;
}

// One thread's working set: blocks of C, a panel's sums, pairs of B's rows and the tiles of A.
struct Work {
    float *blocks, *sums;
    bf16 *pairs, *left;
    Work(const FewRows& of, int64_t panel, Arena& arena)
        : blocks(arena.take<float>(few * side)),
          sums(arena.take<float>(panel * of.tall * of.rows)),
          pairs(arena.take<bf16>(side * deepest)),
          left(arena.take<bf16>(padded_depth(of.g) * of.tall * of.rows + side * tile_depth)) {}
};

class Task : FewRows {
  public:
    Task(const Gemm& gemm, int64_t panel, Arena arena) : FewRows(gemm), work_(*this, panel, arena) {
        pack_left();
    }

    void run(int64_t first, int64_t last) {
        const int64_t block = side * tall * rows;
        const int64_t sweep = tall <= 2 && is_cached(g) ? deepest : tile_depth;
        std::memset(work_.sums, 0, tiles(last - first, side) * block * sizeof(float));
        const bf16* left = work_.left;
        for (int t = 0; t < g.count; ++t) {
            const Product& p = g.products[t];
            for (int64_t d = 0; d < p.depth; d += sweep) {
                const bool deep = sweep == deepest && p.depth - d > tile_depth;
                if (tall == 1)
                    deep ? add<2, 1>(p, left, d, first, last) : add<1, 1>(p, left, d, first, last);
                else if (tall == 2)
                    deep ? add<2, 2>(p, left, d, first, last) : add<1, 2>(p, left, d, first, last);
                else
                    tall == 3 ? add<1, 3>(p, left, d, first, last)
                              : add<1, 4>(p, left, d, first, last);
                left += (deep ? 2 : 1) * tall * rows * tile_depth;
            }
        }
        const float* sums = work_.sums;
        for (int64_t j = first; j < last; j += side, sums += block) {
            collect(sums);
            finish_blocks(work_.blocks, j);
        }
    }

  private:
    // The tiles of A. pack_a writes 32 rows each time; those that are not wanted, the next call
    // writes over.
    void pack_left() const {
        bf16* to = work_.left;
        for (int t = 0; t < g.count; ++t) {
            const Product& p = g.products[t];
            for (int64_t d = 0; d < p.depth; d += tile_depth, to += tall * rows * tile_depth)
                for (int64_t i = 0; i < g.m; i += side)
                    pack_a(p.a.data + i * p.a.row + d * p.a.col, p.a.row, p.a.col,
                           std::min(tile_depth, p.depth - d), g.m - i, to + i * tile_depth,
                           tile_depth);
        }
    }

    // Adds rows [d, d + 32 DEEP) of B to columns [first, last) of the sums. Tiles 2 to 5 hold A:
    // TALL tiles of rows for each 32 rows of B.
    template <int DEEP, int TALL>
    void add(const Product& p, const bf16* left, int64_t d, int64_t first, int64_t last) {
        const int64_t depth = std::min(DEEP * tile_depth, p.depth - d), tile = rows * tile_depth;
        QRLORA_TILE_LOAD(2, left, 64);
        if constexpr (DEEP * TALL > 1) QRLORA_TILE_LOAD(3, left + tile, 64);
        if constexpr (DEEP * TALL > 2) QRLORA_TILE_LOAD(4, left + 2 * tile, 64);
        if constexpr (DEEP * TALL > 3) QRLORA_TILE_LOAD(5, left + 3 * tile, 64);
        const int64_t half = TALL * rows * 16;
        const bf16* from = p.b.data + d * p.b.row + first * p.b.col;
        float* sums = work_.sums;
        bf16* pairs = work_.pairs;
        for (int64_t j = first; j < last; j += side, from += side * p.b.col, sums += 2 * half) {
            pack_b(from, p.b.row, p.b.col, depth, g.n - j, pairs);
            if constexpr (TALL > 2) {
                add_tall<TALL>(pairs, sums);
                add_tall<TALL>(pairs + 512, sums + half);
            } else {
                add_low<DEEP, TALL>(pairs, sums);
                add_low<DEEP, TALL>(pairs + 512, sums + half);
            }
        }
    }

    // The sums of 16 columns, for up to 32 rows of A.
    template <int DEEP, int TALL>
    void add_low(const bf16* pairs, float* sums) const {
        float* below = sums + rows * 16;
        QRLORA_TILE_LOAD(0, sums, 64);
        if constexpr (TALL == 2) QRLORA_TILE_LOAD(1, below, 64);
        QRLORA_TILE_LOAD(6, pairs, 64);
        _tile_dpbf16ps(0, 2, 6);
        if constexpr (TALL == 2) _tile_dpbf16ps(1, 3, 6);
        if constexpr (DEEP == 2) {
            QRLORA_TILE_LOAD(7, pairs + side * tile_depth, 64);
            if constexpr (TALL == 1) _tile_dpbf16ps(0, 3, 7);
            if constexpr (TALL == 2) {
                _tile_dpbf16ps(0, 4, 7);
                _tile_dpbf16ps(1, 5, 7);
            }
        }
        _tile_stored(0, sums, 64);
        if constexpr (TALL == 2) _tile_stored(1, below, 64);
    }

    // The same for more rows.
    template <int TALL>
    static void add_tall(const bf16* pairs, float* sums) {
        QRLORA_TILE_LOAD(6, pairs, 64);
        QRLORA_TILE_LOAD(0, sums, 64);
        _tile_dpbf16ps(0, 2, 6);
        _tile_stored(0, sums, 64);
        QRLORA_TILE_LOAD(1, sums + 256, 64);
        _tile_dpbf16ps(1, 3, 6);
        _tile_stored(1, sums + 256, 64);
        QRLORA_TILE_LOAD(7, sums + 512, 64);
        _tile_dpbf16ps(7, 4, 6);
        _tile_stored(7, sums + 512, 64);
        if constexpr (TALL == 4) {
            QRLORA_TILE_LOAD(0, sums + 768, 64);
            _tile_dpbf16ps(0, 5, 6);
            _tile_stored(0, sums + 768, 64);
        }
    }

    // The sums of 32 columns as blocks.
    void collect(const float* sums) {
        for (int64_t j = 0; j < side; j += 16)
            for (int64_t i = 0; i < tall * rows; ++i, sums += 16)
                _mm512_store_ps(work_.blocks + i * side + j, _mm512_load_ps(sums));
    }

    const Work work_;
};

}  // namespace

void gemm_by_rows(const Gemm& g) {
    const int64_t columns = (is_cached(g) ? narrow : wide) / round_up(g.m, 16);
    const int64_t panels = round_up(tiles(g.n, columns), g.threads);
    const int64_t panel = round_up(tiles(g.n, panels), side);
    in_parallel(g.threads, arena_bytes<Work>(FewRows(g), panel), [&](Team team) {
        const TileScope scope(std::min<int64_t>(g.m, 16));
        Task task(g, panel, Arena(team.scratch()));
        team.for_dynamic(tiles(g.n, panel),
                         [&](int64_t i) { task.run(i * panel, std::min(g.n, (i + 1) * panel)); });
    });
}

}  // namespace qrlora::amx
