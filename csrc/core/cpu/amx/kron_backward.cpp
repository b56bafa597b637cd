// dA, dB and the update's dX in one pass over x and dy, on tiles. A group of tokens is brought into
// tile order first, so that dA and dB are loaded and stored once per group and not per token.
#include <algorithm>
#include <vector>

#include "../arena.h"
#include "../kron_chunks.h"
#include "kron_tiles.h"
#include "qrlora/cpu/kron.h"
#include "qrlora/cpu/parallel.h"

namespace qrlora::amx {

namespace {

constexpr int64_t group = 8;  // tokens

// Tiles along each side: 16 rows or columns, or 32 of the depth.
struct Sides {
    int64_t r, n, k, r_depth, n_depth, k_depth;
    explicit Sides(const KronShape& d)
        : r(tiles(d.r, 16)),
          n(tiles(d.n, 16)),
          k(tiles(d.k, 16)),
          r_depth(tiles(d.r, 32)),
          n_depth(tiles(d.n, 32)),
          k_depth(tiles(d.k, 32)) {}
};

// One thread's working set. Everything starts as zero and padding is never written.
struct Work {
    bf16 *x_rows, *dy_rows, *x_tiles, *dy_tiles, *s_transposed, *t_transposed, *t_rows;
    float *square, *t, *dx;
    Work(const KronShape& d, const Sides& c, Arena& arena)
        : x_rows(arena.take<bf16>(c.r * 16 * c.k_depth * 32)),
          dy_rows(arena.take<bf16>(group * c.n * 16 * c.r_depth * 32)),
          x_tiles(arena.take<bf16>(group * c.k * c.r_depth * tile_elements)),
          dy_tiles(arena.take<bf16>(c.r * c.n_depth * tile_elements)),
          s_transposed(arena.take<bf16>(group * c.r * c.r_depth * tile_elements)),
          t_transposed(arena.take<bf16>(group * c.r * 16 * c.r_depth * 32)),
          t_rows(arena.take<bf16>(c.r * 16 * d.terms * c.r_depth * 32)),
          square(arena.take<float>(c.r_depth * c.r_depth * 1024)),
          t(arena.take<float>(d.terms * c.r_depth * c.r_depth * 1024)),
          dx(arena.take<float>(c.r * 16 * c.k * 16)) {}
};

class Backward {
  public:
    Backward(const KronShape& d, const KronBackward& args)
        : d_(d), args_(args), c_(d), chunks_(d.tokens), ld_(c_.r_depth * 32) {
        left_t_ = allocate(d.terms * ld_ * c_.n_depth * 32);
        right_ = allocate(c_.r * c_.k_depth * tile_elements);
        right_t_ = allocate(c_.k * d.terms * c_.r_depth * tile_elements);
        pack_factors();
        if (args.da) da_ = allocate<float>(chunks_.count * size(c_.n, c_.r));
        if (args.db) db_ = allocate<float>(chunks_.count * size(c_.r, c_.k));
    }

    void run() {
        const int64_t bytes = arena_bytes<Work>(d_, c_);
        in_parallel(chunks_.threads(d_.threads), bytes, [&](Team team) {
            std::memset(team.scratch(), 0, bytes);
            Arena arena(team.scratch());
            const Work w(d_, c_, arena);
            const TileScope scope;
            team.for_dynamic(chunks_.count, [&](int64_t chunk) {
                const int64_t last = std::min(d_.tokens, (chunk + 1) * chunks_.tokens);
                for (int64_t m = chunk * chunks_.tokens; m < last; m += group)
                    add_group(m, std::min(group, last - m), chunk, w);
            });
        });
        if (args_.da)
            sum_chunks(da_.get(), size(c_.n, c_.r), d_.n, c_.r * 16, 1, args_.scaling, args_.da);
        if (args_.db) sum_chunks(db_.get(), size(c_.r, c_.k), d_.k, 1, c_.k * 16, 1.0, args_.db);
    }

  private:
    static int64_t size(int64_t row_tiles, int64_t column_tiles) {
        return row_tiles * column_tiles * 256;
    }

    void pack_factors() {
        const auto* left_t = static_cast<const bf16*>(args_.left_t);
        const auto* right_t = static_cast<const bf16*>(args_.right_t);
        std::vector<bf16> stacked(d_.terms * ld_ * d_.k, bf16{0});
        for (int64_t t = 0; t < d_.terms; ++t) {
            copy_rows(left_t + t * d_.r * d_.n, d_.n, d_.r, d_.n,
                      left_t_.get() + t * ld_ * c_.n_depth * 32, ld_, c_.n_depth * 32);
            std::copy_n(right_t + t * d_.r * d_.k, d_.r * d_.k, stacked.begin() + t * ld_ * d_.k);
        }
        pack_tiles(stacked.data(), d_.k, d_.terms * ld_, d_.k, right_t_.get(),
                   d_.terms * c_.r_depth, c_.k);
        pack_tiles(static_cast<const bf16*>(args_.right), d_.r, d_.k, d_.r, right_.get(),
                   c_.k_depth, c_.r);
    }

    void add_group(int64_t m, int64_t tokens, int64_t chunk, const Work& w) {
        for (int64_t g = 0; g < tokens; ++g) add_token(m + g, g, w);
        if (args_.da) {
            Operands o{dy(m),
                       d_.r,
                       args_.dy.stride,
                       w.s_transposed,
                       c_.r * c_.r_depth * tile_elements,
                       c_.r_depth,
                       tokens};
            if (copies_dy()) o.a = w.dy_rows, o.lda = ld_, o.a_step = c_.n * 16 * ld_;
            tile_product(o, c_.n, c_.r, da_.get() + chunk * size(c_.n, c_.r), c_.r * 16, true);
        }
        if (args_.db)
            tile_product({w.t_transposed, ld_, c_.r * 16 * ld_, w.x_tiles,
                          c_.k * c_.r_depth * tile_elements, c_.r_depth, tokens},
                         c_.r, c_.k, db_.get() + chunk * size(c_.r, c_.k), c_.k * 16, true);
    }

    void add_token(int64_t m, int64_t g, const Work& w) {
        if (args_.da) prepare_da(m, g, w);
        if (!args_.db && !args_.dx) return;
        pack_tiles(dy(m), d_.r, d_.n, d_.r, w.dy_tiles, c_.n_depth, c_.r);
        tile_product({left_t_.get(), c_.n_depth * 32, 0, w.dy_tiles, 0, c_.n_depth, 1},
                     d_.terms * c_.r_depth * 2, c_.r, w.t, ld_);
        if (args_.dx) store_dx(m, w);
        if (args_.db) prepare_db(m, g, w);
    }

    // S = X R_0, transposed to be the right operand of dA += dY S^T.
    void prepare_da(int64_t m, int64_t g, const Work& w) {
        const bf16* rows = x(m);
        int64_t ld = d_.k;
        if (d_.r % 16 || d_.k % 32) {
            ld = c_.k_depth * 32;
            copy_rows(rows, d_.k, d_.r, d_.k, w.x_rows, c_.r * 16, ld);
            rows = w.x_rows;
        }
        tile_product({rows, ld, 0, right_.get(), 0, c_.k_depth, 1}, c_.r, c_.r, w.square, ld_);
        to_transposed_tiles(w.square, ld_, c_.r, c_.r_depth,
                            w.s_transposed + g * c_.r * c_.r_depth * tile_elements);
        if (copies_dy())
            copy_rows(dy(m), d_.r, d_.n, d_.r, w.dy_rows + g * c_.n * 16 * ld_, c_.n * 16, ld_);
    }

    // dX = [T_0 T_1] [R_0^T; R_1^T]
    void store_dx(int64_t m, const Work& w) {
        const int64_t depth = d_.terms * c_.r_depth;
        for (int64_t t = 0; t < d_.terms; ++t)
            to_rows(w.t + t * ld_ * ld_, ld_, c_.r * 16, c_.r_depth, w.t_rows + t * ld_,
                    depth * 32);
        tile_product({w.t_rows, depth * 32, 0, right_t_.get(), 0, depth, 1}, c_.r, c_.k, w.dx,
                     c_.k * 16);
        store_rounded(w.dx, c_.k * 16, d_.r, d_.k, static_cast<bf16*>(args_.dx) + m * d_.r * d_.k);
    }

    // dB^T += (T_0 + s T_1)^T X; T_0 is overwritten.
    void prepare_db(int64_t m, int64_t g, const Work& w) {
        float* t = w.t;
        const int64_t square = ld_ * ld_;
        if (d_.terms == 2)
            for (int64_t i = 0; i < square; ++i)
                t[i] += static_cast<float>(args_.scaling) * t[square + i];
        to_transposed_rows(t, ld_, c_.r_depth, c_.r, w.t_transposed + g * c_.r * 16 * ld_, ld_);
        pack_tiles(x(m), d_.k, d_.r, d_.k, w.x_tiles + g * c_.k * c_.r_depth * tile_elements,
                   c_.r_depth, c_.k);
    }

    // out [rows, r] = scale * the sum, in order, of the chunks' parts.
    void sum_chunks(const float* parts, int64_t part, int64_t rows, int64_t row, int64_t column,
                    double scale, void* out) const {
        for (int64_t i = 0; i < rows; ++i)
            for (int64_t j = 0; j < d_.r; ++j) {
                float sum = 0;
                for (int64_t c = 0; c < chunks_.count; ++c)
                    sum += parts[c * part + i * row + j * column];
                static_cast<float*>(out)[i * d_.r + j] = static_cast<float>(scale) * sum;
            }
    }

    bool copies_dy() const { return d_.n % 16 || d_.r % 32; }
    const bf16* x(int64_t m) const {
        return static_cast<const bf16*>(args_.x.data) + m * args_.x.stride;
    }
    const bf16* dy(int64_t m) const {
        return static_cast<const bf16*>(args_.dy.data) + m * args_.dy.stride;
    }

    const KronShape d_;
    const KronBackward args_;
    const Sides c_;
    const KronChunks chunks_;
    const int64_t ld_;  // r padded to whole depth tiles
    Zeroed<bf16> left_t_, right_, right_t_;
    Zeroed<float> da_, db_;
};

}  // namespace

void kron_backward(const KronShape& d, DType, const KronBackward& args) { Backward(d, args).run(); }

}  // namespace qrlora::amx
