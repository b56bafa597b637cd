// At most 32 rows of A: B is the larger operand by far, is read once, and sets the pace. Where its
// columns are contiguous it is read in place, as the left operand of C^T = B^T A^T; where its rows
// are, it is swept 64 rows at a time over a wide panel, while C waits in the L2 cache.
#include <algorithm>

#include "block.h"

namespace qrlora::amx {

namespace {

constexpr int64_t sweep = 2 * tile_depth;

bool columns_contiguous(const Gemm& g) {
    for (int t = 0; t < g.count; ++t)
        if (g.products[t].b.row != 1) return false;
    return true;
}

int64_t panel_columns(const Gemm& g, bool in_place) {
    return std::min<int64_t>(in_place ? 256 : 1024,
                             round_up((g.n + g.threads - 1) / g.threads, side));
}

class Task {
  public:
    Task(const Gemm& g, int64_t panel, Scratch& scratch) : g_(g), panel_(panel) {
        const int64_t depth = padded_depth(g), blocks = std::max<int64_t>(2, panel / side);
        auto* bytes = static_cast<char*>(
            scratch.get(blocks * block_bytes + (2 * depth + sweep) * side * sizeof(bf16)));
        blocks_ = reinterpret_cast<float*>(bytes);
        tiles_ = reinterpret_cast<bf16*>(bytes + blocks * block_bytes);
        rows_ = tiles_ + (depth + sweep) * side;
    }

    void run_in_place(int64_t panel) {
        bf16* to = tiles_;
        for (int t = 0; t < g_.count; ++t) {
            const Product& p = g_.products[t];
            pack_b(p.a.data, p.a.col, p.a.row, p.depth, g_.m, to);
            to += side * round_up(p.depth, tile_depth);
        }
        float *block = blocks_, *turned = blocks_ + side * side;
        const int64_t end = std::min(g_.n, (panel + 1) * panel_);
        for (int64_t j = panel * panel_; j < end; j += side) {
            Rows b[2];
            bf16* copy = rows_;
            for (int t = 0; t < g_.count; ++t) {
                const Product& p = g_.products[t];
                prefetch_columns(g_, p, j);
                b[t] = rows_of({p.b.data, p.b.col, p.b.row}, p.depth, j, g_.n, copy);
            }
            multiply_all(g_, b, tiles_, g_.m > 16);
            store_block(turned);
            turn(turned, block);
            finish(g_, block, 0, j);
        }
    }

    void run_swept(int64_t panel) {
        const int64_t j0 = panel * panel_, j1 = std::min(g_.n, j0 + panel_);
        std::memset(blocks_, 0, round_up(j1 - j0, side) / side * block_bytes);
        bf16* copy = rows_;
        for (int t = 0; t < g_.count; ++t) {
            const Product& p = g_.products[t];
            const Rows a = rows_of(p.a, p.depth, 0, g_.m, copy);
            for (int64_t d = 0; d < p.depth; d += sweep)
                for (int64_t j = j0; j < j1; j += side) {
                    if (g_.m > 16)
                        add<true>(p, a, d, j, block_at(j - j0));
                    else
                        add<false>(p, a, d, j, block_at(j - j0));
                }
        }
        for (int64_t j = j0; j < j1; j += side) finish(g_, block_at(j - j0), 0, j);
    }

  private:
    float* block_at(int64_t j) { return blocks_ + j * side; }

    template <bool tall>
    void add(const Product& p, Rows a, int64_t d, int64_t j, float* block) {
        const int64_t depth = std::min(sweep, p.depth - d);
        pack_b(p.b.data + d * p.b.row + j * p.b.col, p.b.row, p.b.col, depth, g_.n - j, tiles_);
        load_block<tall>(block);
        multiply<true, tall>({a.data + d, a.ld}, tiles_, depth);
        store_block<tall>(block);
    }

    // to = from^T
    static void turn(const float* from, float* to) {
        for (int64_t i = 0; i < side; i += 16)
            for (int64_t j = 0; j < side; j += 16) {
                __m512i r[16];
                for (int64_t l = 0; l < 16; ++l)
                    r[l] = _mm512_load_si512(from + (j + l) * side + i);
                transpose_words(r);
                for (int64_t l = 0; l < 16; ++l) _mm512_store_si512(to + (i + l) * side + j, r[l]);
            }
    }

    const Gemm& g_;
    const int64_t panel_;
    float* blocks_;
    bf16 *tiles_, *rows_;
};

}  // namespace

void gemm_few_rows(const Gemm& g) {
    const bool in_place = columns_contiguous(g);
    const int64_t panel = panel_columns(g, in_place), panels = (g.n + panel - 1) / panel;
#pragma omp parallel num_threads(g.threads)
    {
        thread_local Scratch scratch;
        const TileScope scope;
        Task task(g, panel, scratch);
#pragma omp for schedule(dynamic, 1)
        for (int64_t t = 0; t < panels; ++t) {
            if (in_place)
                task.run_in_place(t);
            else
                task.run_swept(t);
        }
    }
}

}  // namespace qrlora::amx
