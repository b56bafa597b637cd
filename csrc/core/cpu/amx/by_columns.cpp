// C^T = B^T A^T for few rows of A: 32 columns of B, contiguous in memory, are the rows of the left
// operand and stay where they are; A is brought into tile order once.
#include <algorithm>

#include "few_rows.h"

namespace qrlora::amx {

namespace {

// One thread's working set: blocks of C, C^T, the tiles of A^T and copies of B's columns.
struct Work {
    float *blocks, *turned;
    bf16 *right, *copies;
    Work(const FewRows& few_rows, Arena& arena)
        : blocks(arena.take<float>(few * side)),
          turned(arena.take<float>(few * side)),
          right(arena.take<bf16>((few_rows.tall * padded_depth(few_rows.g) + tile_depth) * 16)),
          copies(arena.take<bf16>(side * padded_depth(few_rows.g))) {}
};

class Task : FewRows {
  public:
    Task(const Gemm& gemm, Arena arena) : FewRows(gemm), work_(*this, arena) { pack_right(); }

    void run(int64_t first, int64_t last) {
        for (int64_t j = first; j < last; j += side) {
            bf16* copy = work_.copies;
            for (int t = 0; t < g.count; ++t) left_[t] = left_of(g.products[t], j, copy);
            if (tall == 1)
                multiply_low<1>();
            else if (tall == 2)
                multiply_low<2>();
            else if (tall == 3)
                multiply_tall<3>();
            else
                multiply_tall<4>();
            turn();
            finish_blocks(work_.blocks, j);
        }
    }

  private:
    // 32 columns of B as rows: the depth that is read in place, and a copy of what is not.
    struct Left {
        Rows inside, copy;
        int64_t depth, rest;
    };

    // The tiles of A^T. pack_b writes two tiles each time; where one is wanted, the next call
    // writes over the other.
    void pack_right() const {
        bf16* to = work_.right;
        for (int t = 0; t < g.count; ++t) {
            const Product& p = g.products[t];
            for (int64_t d = 0; d < p.depth; d += tile_depth, to += tall * 512)
                for (int64_t i = 0; i < tall; i += 2)
                    pack_b(p.a.data + d * p.a.col + i * 16 * p.a.row, p.a.col, p.a.row,
                           std::min(tile_depth, p.depth - d), g.m - i * 16, to + i * 512);
        }
    }

    // In place where columns are contiguous, but for what a tile would read over an end.
    Left left_of(const Product& p, int64_t j, bf16*& copy) const {
        const bool in_place = p.b.row == 1 && g.n - j >= side;
        const bf16* from = p.b.data + j * p.b.col;
        Left left{{from, p.b.col}, {}, in_place ? p.depth / tile_depth * tile_depth : 0, 0};
        left.rest = p.depth - left.depth;
        if (left.rest == 0) return left;
        const int64_t ld = round_up(left.rest, tile_depth);
        pack_a(from + left.depth * p.b.row, p.b.col, p.b.row, left.rest, g.n - j, copy, ld);
        left.copy = {copy, ld};
        copy += side * ld;
        return left;
    }

    // add(rows, depth, tiles of A^T) for each stretch of the depth, from B's column `column` on.
    template <typename Add>
    void over_depth(int64_t column, const Add& add) const {
        const bf16* right = work_.right;
        for (int t = 0; t < g.count; ++t) {
            const Left& l = left_[t];
            add(Rows{l.inside.data + column * l.inside.ld, l.inside.ld}, l.depth, right);
            right += tall * 16 * l.depth;
            add(Rows{l.copy.data + column * l.copy.ld, l.copy.ld}, l.rest, right);
            right += tall * 16 * round_up(l.rest, tile_depth);
        }
    }

    // Up to 32 rows of A: 32 columns of B at once.
    template <int TALL>
    void multiply_low() {
        zero_block();
        over_depth(0, [](Rows left, int64_t depth, const bf16* right) {
            const int64_t stride = left.ld * static_cast<int64_t>(sizeof(bf16));
            const bf16* below = left.data + 16 * left.ld;
            for (int64_t p = 0; p < depth; p += tile_depth, right += TALL * 512) {
                QRLORA_TILE_LOAD(4, left.data + p, stride);
                QRLORA_TILE_LOAD(6, right, 64);
                _tile_dpbf16ps(0, 4, 6);
                QRLORA_TILE_LOAD(5, below + p, stride);
                _tile_dpbf16ps(2, 5, 6);
                if constexpr (TALL == 2) {
                    QRLORA_TILE_LOAD(7, right + 512, 64);
                    _tile_dpbf16ps(1, 4, 7);
                    _tile_dpbf16ps(3, 5, 7);
                }
            }
        });
        float *turned = work_.turned, *below = turned + 16 * few;
        _tile_stored(0, turned, few * 4);
        _tile_stored(2, below, few * 4);
        if constexpr (TALL == 2) {
            _tile_stored(1, turned + 16, few * 4);
            _tile_stored(3, below + 16, few * 4);
        }
    }

    // More rows: 16 columns and then the others.
    template <int TALL>
    void multiply_tall() {
        for (int64_t column = 0; column < side; column += 16) {
            zero_block();
            over_depth(column, [](Rows left, int64_t depth, const bf16* right) {
                const int64_t stride = left.ld * static_cast<int64_t>(sizeof(bf16));
                for (int64_t p = 0; p < depth; p += tile_depth, right += TALL * 512) {
                    QRLORA_TILE_LOAD(4, left.data + p, stride);
                    QRLORA_TILE_LOAD(5, right, 64);
                    _tile_dpbf16ps(0, 4, 5);
                    QRLORA_TILE_LOAD(6, right + 512, 64);
                    _tile_dpbf16ps(1, 4, 6);
                    QRLORA_TILE_LOAD(7, right + 1024, 64);
                    _tile_dpbf16ps(2, 4, 7);
                    if constexpr (TALL == 4) {
                        QRLORA_TILE_LOAD(5, right + 1536, 64);
                        _tile_dpbf16ps(3, 4, 5);
                    }
                }
            });
            float* to = work_.turned + column * few;
            _tile_stored(0, to, few * 4);
            _tile_stored(1, to + 16, few * 4);
            _tile_stored(2, to + 32, few * 4);
            if constexpr (TALL == 4) _tile_stored(3, to + 48, few * 4);
        }
    }

    // C^T [32, 64] to blocks of C.
    void turn() {
        for (int64_t i = 0; i < g.m; i += 16)
            for (int64_t j = 0; j < side; j += 16) {
                __m512i r[16];
                for (int64_t l = 0; l < 16; ++l)
                    r[l] = _mm512_load_si512(work_.turned + (j + l) * few + i);
                transpose_words(r);
                for (int64_t l = 0; l < 16; ++l)
                    _mm512_store_si512(work_.blocks + (i + l) * side + j, r[l]);
            }
    }

    const Work work_;
    Left left_[2];
};

}  // namespace

void gemm_by_columns(const Gemm& g) {
    const int64_t chunk = std::min<int64_t>(256, round_up((g.n + g.threads - 1) / g.threads, side));
    in_parallel(g.threads, arena_bytes<Work>(FewRows(g)), [&](Team team) {
        const TileScope scope;
        Task task(g, Arena(team.scratch()));
        team.for_dynamic(tiles(g.n, chunk),
                         [&](int64_t i) { task.run(i * chunk, std::min(g.n, (i + 1) * chunk)); });
    });
}

}  // namespace qrlora::amx
