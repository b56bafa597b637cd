// C = A_0 B_0 + A_1 B_1 + bias + addend in blocks of 32x32 that stay in tile registers from the
// first product's first element to the last rounding. A is read where it lies; B is packed panel by
// panel, a panel being as many columns as half of the L2 cache holds.
#include <algorithm>

#include "few_rows.h"

namespace qrlora::amx {

namespace {

constexpr int64_t panel_bytes = 5 << 18;
constexpr int64_t narrow = 256;  // columns under which reading A again costs more than packing B

// How C is cut into tasks. An element's sum does not depend on the cut, nor on the threads.
struct Cut {
    int64_t depth, panel, panels, rows, chunks;
    explicit Cut(const Gemm& g) : depth(padded_depth(g)) {
        const int64_t cached = panel_bytes / 2 / std::max<int64_t>(depth, 1);
        const int64_t share = std::max(narrow, tiles(g.n, g.threads));
        panels = tiles(g.n, std::max(side, std::min(share, cached) / side * side));
        if (panels > 1 && panels < 4 * g.threads) panels = round_up(panels, g.threads);
        panel = round_up(tiles(g.n, panels), side);
        panels = tiles(g.n, panel);
        rows = round_up(tiles(g.m, tiles(g.threads, panels)), side);
        chunks = tiles(g.m, rows);
    }
};

class Task {
  public:
    Task(const Gemm& g, const Cut& cut, Scratch& scratch) : g_(g), cut_(cut) {
        auto* bytes = static_cast<char*>(
            scratch.get(block_bytes + (cut.panel + side) * cut.depth * sizeof(bf16)));
        block_ = reinterpret_cast<float*>(bytes);
        tiles_ = reinterpret_cast<bf16*>(bytes + block_bytes);
        rows_ = tiles_ + cut.panel * cut.depth;
    }

    void run(int64_t panel, int64_t chunk) {
        const int64_t j0 = panel * cut_.panel, j1 = std::min(g_.n, j0 + cut_.panel);
        const int64_t i1 = std::min(g_.m, (chunk + 1) * cut_.rows);
        pack_panel(j0, j1);
        for (int64_t i = chunk * cut_.rows; i < i1; i += side) {
            Rows a[2];
            bf16* copy = rows_;
            for (int t = 0; t < g_.count; ++t)
                a[t] = rows_of(g_.products[t].a, g_.products[t].depth, i, g_.m, copy);
            for (int64_t j = j0; j < j1; j += side) {
                multiply_all(g_, a, tiles_ + (j - j0) * cut_.depth, g_.n - j > 16);
                finish_waiting();
                store_block(block_);
                row_ = i, column_ = j;
            }
        }
        finish_waiting();
    }

  private:
    // A block is rounded while the tile unit is busy with the next one.
    void finish_waiting() {
        if (row_ >= 0) finish(g_, block_, row_, column_);
        row_ = -1;
    }

    // Columns [j0, j1) of both B, in tile order, one group of 32 columns after the other.
    void pack_panel(int64_t j0, int64_t j1) {
        bf16* to = tiles_;
        for (int t = 0; t < g_.count; ++t) {
            const Product& p = g_.products[t];
            // Where rows are contiguous, a strip of rows over all columns is read as it lies.
            const int64_t strip = p.b.row == 1 ? p.depth : tile_depth;
            for (int64_t d = 0; d < p.depth; d += strip)
                for (int64_t j = j0; j < j1; j += side) {
                    if (p.b.row == 1) prefetch_columns(g_, p, j);
                    pack_b(p.b.data + d * p.b.row + j * p.b.col, p.b.row, p.b.col,
                           std::min(strip, p.depth - d), g_.n - j,
                           to + (j - j0) * cut_.depth + d * side);
                }
            to += side * round_up(p.depth, tile_depth);
        }
    }

    const Gemm& g_;
    const Cut& cut_;
    float* block_;
    int64_t row_ = -1, column_ = 0;  // where the block goes; no block waits if row_ < 0
    bf16 *tiles_, *rows_;
};

// Waking a thread takes as long as some millions of multiplications.
int useful_threads(const Gemm& g) {
    constexpr int64_t grain = 1 << 22;
    const int64_t work = std::max(side, g.m) * g.n * padded_depth(g);
    return static_cast<int>(std::min<int64_t>(g.threads, 1 + work / grain));
}

}  // namespace

void gemm(const Gemm& asked) {
    if (asked.m == 0 || asked.n == 0) return;
    Gemm g = asked;
    g.threads = useful_threads(asked);
    if (is_few(g)) return columns_contiguous(g) ? gemm_by_columns(g) : gemm_by_rows(g);
    const Cut cut(g);
#pragma omp parallel num_threads(g.threads)
    {
        thread_local Scratch scratch;
        const TileScope tiles;
        Task task(g, cut, scratch);
#pragma omp for schedule(dynamic, 1)
        for (int64_t t = 0; t < cut.panels * cut.chunks; ++t)
            task.run(t % cut.panels, t / cut.panels);
    }
}

void column_dots(int64_t m, int64_t n, const bf16* u, int64_t u_row, const bf16* v, int64_t v_row,
                 float scale, float* out) {
    for (int64_t j = 0; j < n; j += 16) {
        const __mmask16 mask = first16(n - j);
        __m512 sum[4] = {};
        for (int64_t i = 0; i < m; ++i)
            sum[i & 3] = _mm512_fmadd_ps(load_bf16(mask, u + i * u_row + j),
                                         load_bf16(mask, v + i * v_row + j), sum[i & 3]);
        const __m512 all =
            _mm512_add_ps(_mm512_add_ps(sum[0], sum[1]), _mm512_add_ps(sum[2], sum[3]));
        _mm512_mask_storeu_ps(out + j, mask, _mm512_mul_ps(all, _mm512_set1_ps(scale)));
    }
}

}  // namespace qrlora::amx
