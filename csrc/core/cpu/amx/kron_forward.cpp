// Y = sum_t L_t (X R_t) per token on tiles: S is rounded to bf16 once, on its way from the first
// product to the second, and never leaves the L1 cache.
#include "../arena.h"
#include "../kron_chunks.h"
#include "kron_tiles.h"
#include "qrlora/cpu/kron.h"
#include "qrlora/cpu/parallel.h"

namespace qrlora::amx {

namespace {

class Forward {
  public:
    Forward(const KronShape& d, KronRows x, const bf16* left, const bf16* right, bf16* y)
        : d_(d),
          x_(x),
          y_(y),
          r_tiles_(tiles(d.r, 16)),
          r_depth_(tiles(d.r, 32)),
          k_depth_(tiles(d.k, 32)),
          n_tiles_(tiles(d.n, 16)),
          depth_(d.terms * r_depth_) {
        left_ = allocate(n_tiles_ * 16 * depth_ * 32);
        right_ = allocate(d.terms * r_tiles_ * k_depth_ * tile_elements);
        for (int64_t t = 0; t < d.terms; ++t) {
            for (int64_t i = 0; i < d.n; ++i)
                std::memcpy(left_.get() + (i * depth_ + t * r_depth_) * 32,
                            left + (i * d.terms + t) * d.r, d.r * sizeof(bf16));
            pack_tiles(right + t * d.k * d.r, d.r, d.k, d.r,
                       right_.get() + t * r_tiles_ * k_depth_ * tile_elements, k_depth_, r_tiles_);
        }
    }

    void run() {
        const KronChunks chunks(d_.tokens);
        const int64_t bytes = arena_bytes<Work>(*this);
        in_parallel(chunks.threads(d_.threads), bytes, [&](Team team) {
            std::memset(team.scratch(), 0, bytes);
            Arena arena(team.scratch());
            const Work work(*this, arena);
            const TileScope scope;
            team.for_dynamic(chunks.count, [&](int64_t chunk) {
                const int64_t first = chunk * chunks.tokens;
                for (int64_t m = first; m < first + chunks.tokens && m < d_.tokens; ++m)
                    one(m, work);
            });
        });
    }

  private:
    // One thread's working set, of a token. Rows of S past r stay zero: they pad the depth of the
    // second product.
    struct Work {
        bf16 *token, *s_tiles;
        float *s, *out;
        Work(const Forward& f, Arena& arena)
            : token(arena.take<bf16>(f.r_tiles_ * 16 * f.k_depth_ * 32)),
              s_tiles(arena.take<bf16>(f.r_tiles_ * f.depth_ * tile_elements)),
              s(arena.take<float>(f.r_depth_ * 32 * f.r_tiles_ * 16)),
              out(arena.take<float>(f.n_tiles_ * 16 * f.r_tiles_ * 16)) {}
    };

    void one(int64_t m, const Work& w) const {
        const bf16* x = static_cast<const bf16*>(x_.data) + m * x_.stride;
        int64_t ld = d_.k;
        if (d_.r % 16 || d_.k % 32) {
            ld = k_depth_ * 32;
            copy_rows(x, d_.k, d_.r, d_.k, w.token, r_tiles_ * 16, ld);
            x = w.token;
        }
        const int64_t ldc = r_tiles_ * 16;
        for (int64_t t = 0; t < d_.terms; ++t) {
            const bf16* right = right_.get() + t * r_tiles_ * k_depth_ * tile_elements;
            tile_product({x, ld, 0, right, 0, k_depth_, 1}, r_tiles_, r_tiles_, w.s, ldc);
            to_tiles(w.s, ldc, r_depth_, r_tiles_, w.s_tiles, t * r_depth_, depth_);
        }
        tile_product({left_.get(), depth_ * 32, 0, w.s_tiles, 0, depth_, 1}, n_tiles_, r_tiles_,
                     w.out, ldc);
        store_rounded(w.out, ldc, d_.n, d_.r, y_ + m * d_.n * d_.r);
    }

    const KronShape d_;
    const KronRows x_;
    bf16* y_;
    const int64_t r_tiles_, r_depth_, k_depth_, n_tiles_, depth_;
    Zeroed<bf16> left_, right_;
};

}  // namespace

void kron_forward(const KronShape& d, DType, const KronForward& args) {
    Forward(d, args.x, static_cast<const bf16*>(args.left), static_cast<const bf16*>(args.right),
            static_cast<bf16*>(args.y))
        .run();
}

}  // namespace qrlora::amx
