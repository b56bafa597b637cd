// C^T = B^T A^T for at most 32 rows of A: 32 columns of B, contiguous in memory, are the rows of
// the left operand and stay where they are; A is brought into tile order once.
#include <algorithm>

#include "few_rows.h"

namespace qrlora::amx {

namespace {

int64_t deepest(const Gemm& g) {
    return round_up(std::max(g.products[0].depth, g.products[1].depth), tile_depth);
}

class Task : FewRows {
  public:
    Task(const Gemm& gemm, Scratch& scratch) : FewRows(gemm) {
        const int64_t depth = padded_depth(g);
        auto* bytes = static_cast<char*>(
            scratch.get(2 * block_bytes +
                        ((tall * depth + tile_depth) * 16 + side * deepest(g)) * sizeof(bf16)));
        block_ = reinterpret_cast<float*>(bytes);
        turned_ = block_ + side * side;
        right_ = reinterpret_cast<bf16*>(turned_ + side * side);
        copies_ = right_ + (tall * depth + tile_depth) * 16;
        pack_right();
    }

    void run(int64_t first, int64_t last) {
        for (int64_t j = first; j < last; j += side) {
            zero_block();
            const bf16* right = right_;
            for (int t = 0; t < g.count; ++t) {
                const Product& p = g.products[t];
                if (tall == 2)
                    add_product<true>(p, j, right);
                else
                    add_product<false>(p, j, right);
                right += tall * 16 * round_up(p.depth, tile_depth);
            }
            store_block(turned_);
            turn();
            finish(g, block_, 0, j);
        }
    }

  private:
    // The tiles of A^T. pack_b writes two tiles each time; where one is wanted, the next call
    // writes over the other.
    void pack_right() {
        bf16* to = right_;
        for (int t = 0; t < g.count; ++t) {
            const Product& p = g.products[t];
            for (int64_t d = 0; d < p.depth; d += tile_depth, to += tall * 512)
                pack_b(p.a.data + d * p.a.col, p.a.col, p.a.row, std::min(tile_depth, p.depth - d),
                       g.m, to);
        }
    }

    // Columns [j, j + 32) of B: in place where they are contiguous, but for what a tile would read
    // over an end.
    template <bool two>
    void add_product(const Product& p, int64_t j, const bf16* right) {
        const bool in_place = p.b.row == 1 && g.n - j >= side;
        const int64_t inside = in_place ? p.depth / tile_depth * tile_depth : 0;
        const bf16* left = p.b.data + j * p.b.col;
        add<two>({left, p.b.col}, inside, right);
        if (inside == p.depth) return;
        const int64_t rest = p.depth - inside, ld = round_up(rest, tile_depth);
        pack_a(left + inside, p.b.col, p.b.row, rest, g.n - j, copies_, ld);
        add<two>({copies_, ld}, rest, right + inside * tall * 16);
    }

    template <bool two>
    static void add(Rows left, int64_t depth, const bf16* right) {
        const int64_t stride = left.ld * static_cast<int64_t>(sizeof(bf16));
        const bf16* below = left.data + 16 * left.ld;
        for (int64_t p = 0; p < depth; p += tile_depth, right += two ? 1024 : 512) {
            _tile_loadd(4, left.data + p, stride);
            _tile_loadd(6, right, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(5, below + p, stride);
            _tile_dpbf16ps(2, 5, 6);
            if constexpr (two) {
                _tile_loadd(7, right + 512, 64);
                _tile_dpbf16ps(1, 4, 7);
                _tile_dpbf16ps(3, 5, 7);
            }
        }
    }

    void turn() {
        for (int64_t i = 0; i < g.m; i += 16)
            for (int64_t j = 0; j < side; j += 16) {
                __m512i r[16];
                for (int64_t l = 0; l < 16; ++l)
                    r[l] = _mm512_load_si512(turned_ + (j + l) * side + i);
                transpose_words(r);
                for (int64_t l = 0; l < 16; ++l)
                    _mm512_store_si512(block_ + (i + l) * side + j, r[l]);
            }
    }

    float *block_, *turned_;
    bf16 *right_, *copies_;
};

}  // namespace

void gemm_by_columns(const Gemm& g) {
    const int64_t chunk = std::min<int64_t>(256, round_up((g.n + g.threads - 1) / g.threads, side));
#pragma omp parallel num_threads(g.threads)
    {
        thread_local Scratch scratch;
        const TileScope scope;
        Task task(g, scratch);
#pragma omp for schedule(dynamic, 1)
        for (int64_t j = 0; j < g.n; j += chunk) task.run(j, std::min(g.n, j + chunk));
    }
}

}  // namespace qrlora::amx
