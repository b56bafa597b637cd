// C = A_0 B_0 + A_1 B_1 + bias + addend in blocks of 32x32 that stay in tile registers from the
// first product's first element to the last rounding. A is read where it lies; B is packed panel by
// panel, a panel being at most as many columns as half of the L2 cache holds. Where the products
// are so deep that these would be few, and A read again for each few, they are cut into segments: a
// block's sums then wait in memory, in fp32, from one segment to the next.
#include <algorithm>

#include "few_rows.h"

namespace qrlora::amx {

namespace {

constexpr int64_t panel_bytes = 1 << 20;
constexpr int64_t deepest = 9 << 8;   // elements of a segment
constexpr int64_t tallest = 1 << 11;  // rows whose sums may wait
constexpr int64_t narrow = 256;  // columns under which reading A again costs more than packing B

// How C is cut into tasks. An element's sum does not depend on the cut, nor on the threads.
struct Cut {
    int64_t depth, segments, segment, panel, panels, rows, chunks;
    bool from_memory;  // B is too large for the cache
    explicit Cut(const Gemm& g) : depth(padded_depth(g)) {
        from_memory = g.n * depth * static_cast<int64_t>(sizeof(bf16)) > 1 << 20;
        const int64_t summed = std::max(depth, tile_depth);  // nothing at all is a segment too
        segment = round_up(tiles(summed, tiles(summed, deepest)), tile_depth);
        segments = tiles(summed, segment);
        const int64_t cached = panel_bytes / 2 / segment;
        const int64_t share = std::max(narrow, tiles(g.n, g.threads));
        panels = tiles(g.n, std::max(side, std::min(share, cached) / side * side));
        if (panels > 1 && panels < 4 * g.threads) panels = round_up(panels, g.threads);
        panel = round_up(tiles(g.n, panels), side);
        panels = tiles(g.n, panel);
        rows = tiles(g.m, tiles(g.threads, panels));
        if (segments > 1) rows = tiles(g.m, tiles(g.m, std::min(rows, tallest)));
        rows = round_up(rows, side);
        chunks = tiles(g.m, rows);
    }
};

// The part [from, to) of the products' padded depth.
Gemm part(const Gemm& g, int64_t from, int64_t to) {
    Gemm narrowed = g;
    narrowed.count = 0;
    int64_t begin = 0;
    for (int t = 0; t < g.count; ++t) {
        Product p = g.products[t];
        const int64_t low = std::max<int64_t>(0, from - begin);
        const int64_t high = std::min(p.depth, to - begin);
        begin += round_up(p.depth, tile_depth);
        if (low >= high) continue;
        p.a.data += low * p.a.col;
        p.b.data += low * p.b.row;
        p.depth = high - low;
        narrowed.products[narrowed.count++] = p;
    }
    return narrowed;
}

// One thread's working set: a block of C, the sums that wait between segments, the tiles of B's
// panel and copies of A's rows.
struct Work {
    float *block, *sums;
    bf16 *tiles, *rows;
    Work(const Cut& cut, Arena& arena)
        : block(arena.take<float>(side * side)),
          sums(arena.take<float>(cut.segments > 1 ? cut.rows * cut.panel : 0)),
          tiles(arena.take<bf16>(cut.panel * cut.segment)),
          rows(arena.take<bf16>(side * cut.segment)) {}
};

class Task {
  public:
    Task(const Gemm& g, const Cut& cut, Arena arena) : whole_(g), cut_(cut), work_(cut, arena) {}

    void run(int64_t panel, int64_t chunk) {
        const int64_t j0 = panel * cut_.panel, j1 = std::min(whole_.n, j0 + cut_.panel);
        const int64_t i0 = chunk * cut_.rows, i1 = std::min(whole_.m, i0 + cut_.rows);
        for (int64_t s = 0; s < cut_.segments; ++s) {
            const int64_t from = s * cut_.segment, to = std::min(cut_.depth, from + cut_.segment);
            g_ = part(whole_, from, to);
            depth_ = to - from;
            pack_panel(j0, j1);
            float* sums = work_.sums;
            for (int64_t i = i0; i < i1; i += side, sums += side * cut_.panel)
                run_rows(i, j0, j1, sums, s == 0, s + 1 == cut_.segments);
        }
        finish_waiting();
    }

  private:
    // Blocks of C in rows from i on; what is summed so far is in `sums`, block by block.
    void run_rows(int64_t i, int64_t j0, int64_t j1, float* sums, bool first, bool last) {
        Rows a[2];
        bf16* copy = work_.rows;
        for (int t = 0; t < g_.count; ++t)
            a[t] = rows_of(g_.products[t].a, g_.products[t].depth, i, g_.m, copy);
        for (int64_t j = j0; j < j1; j += side, sums += side * side) {
            first ? zero_block() : load_block(sums);
            multiply_all(g_, a, work_.tiles + (j - j0) * depth_, g_.m - i, g_.n - j);
            if (!last) {
                store_block(sums);
                continue;
            }
            finish_waiting();
            store_block(work_.block);
            row_ = i, column_ = j;
        }
    }

    // A block is rounded while the tile unit is busy with the next one.
    void finish_waiting() {
        if (row_ >= 0) finish(whole_, work_.block, row_, column_);
        row_ = -1;
    }

    // Columns [j0, j1) of both B, in tile order, one group of 32 columns after the other.
    void pack_panel(int64_t j0, int64_t j1) {
        bf16* to = work_.tiles;
        for (int t = 0; t < g_.count; ++t) {
            const Product& p = g_.products[t];
            // Where rows are contiguous, a strip of rows over all columns is read as it lies.
            const int64_t strip = p.b.row == 1 ? p.depth : tile_depth;
            for (int64_t d = 0; d < p.depth; d += strip)
                for (int64_t j = j0; j < j1; j += side) {
                    if (p.b.row == 1 && cut_.from_memory) prefetch_columns(g_, p, j);
                    pack_b(p.b.data + d * p.b.row + j * p.b.col, p.b.row, p.b.col,
                           std::min(strip, p.depth - d), g_.n - j,
                           to + (j - j0) * depth_ + d * side);
                }
            to += side * round_up(p.depth, tile_depth);
        }
    }

    const Gemm& whole_;
    const Cut& cut_;
    Gemm g_;  // the segment's part of it
    int64_t depth_ = 0;
    int64_t row_ = -1, column_ = 0;  // where the block goes; no block waits if row_ < 0
    const Work work_;
};

// Waking a thread takes as long as some millions of multiplications.
int useful_threads(const Gemm& g) {
    constexpr int64_t grain = 1 << 22;
    const int64_t work = std::max(side, g.m) * g.n * padded_depth(g);
    return static_cast<int>(std::min<int64_t>(g.threads, 1 + work / grain));
}

}  // namespace

void half::gemm(const Gemm& asked) {
    if (asked.m == 0 || asked.n == 0) return;
    Gemm g = asked;
    g.threads = useful_threads(asked);
    if (is_few(g)) return columns_contiguous(g) ? gemm_by_columns(g) : gemm_by_rows(g);
    const Cut cut(g);
    in_parallel(g.threads, arena_bytes<Work>(cut), [&](Team team) {
        const TileScope scope;
        Task task(g, cut, Arena(team.scratch()));
        team.for_dynamic(cut.panels * cut.chunks,
                         [&](int64_t i) { task.run(i % cut.panels, i / cut.panels); });
    });
}

}  // namespace qrlora::amx
