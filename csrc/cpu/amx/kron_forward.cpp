// Y = sum_t L_t (X R_t) per token on tiles: S is rounded to bf16 once, on its way from the first
// product to the second, and never leaves the L1 cache.
#include "kron_tiles.h"
#include "qrlora/cpu/amx.h"

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
#pragma omp parallel num_threads(chunks.threads(d_.threads))
        {
            const TileScope scope;
            const auto token = allocate(r_tiles_ * 16 * k_depth_ * 32);
            const auto s_tiles = allocate(r_tiles_ * depth_ * tile_elements);
            // Rows of S past r stay zero: they pad the depth of the second product.
            const auto s = allocate<float>(r_depth_ * 32 * r_tiles_ * 16);
            const auto out = allocate<float>(n_tiles_ * 16 * r_tiles_ * 16);
#pragma omp for schedule(dynamic, 1)
            for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
                const int64_t first = chunk * chunks.tokens;
                for (int64_t m = first; m < first + chunks.tokens && m < d_.tokens; ++m)
                    one(m, token.get(), s.get(), s_tiles.get(), out.get());
            }
        }
    }

  private:
    void one(int64_t m, bf16* token, float* s, bf16* s_tiles, float* out) {
        const bf16* x = static_cast<const bf16*>(x_.data) + m * x_.stride;
        int64_t ld = d_.k;
        if (d_.r % 16 || d_.k % 32) {
            ld = k_depth_ * 32;
            copy_rows(x, d_.k, d_.r, d_.k, token, r_tiles_ * 16, ld);
            x = token;
        }
        const int64_t ldc = r_tiles_ * 16;
        for (int64_t t = 0; t < d_.terms; ++t) {
            const bf16* right = right_.get() + t * r_tiles_ * k_depth_ * tile_elements;
            tile_product({x, ld, 0, right, 0, k_depth_, 1}, r_tiles_, r_tiles_, s, ldc);
            to_tiles(s, ldc, r_depth_, r_tiles_, s_tiles, t * r_depth_, depth_);
        }
        tile_product({left_.get(), depth_ * 32, 0, s_tiles, 0, depth_, 1}, n_tiles_, r_tiles_, out,
                     ldc);
        store_rounded(out, ldc, d_.n, d_.r, y_ + m * d_.n * d_.r);
    }

    const KronShape d_;
    const KronRows x_;
    bf16* y_;
    const int64_t r_tiles_, r_depth_, k_depth_, n_tiles_, depth_;
    Zeroed<bf16> left_, right_;
};

}  // namespace

void kron_forward(const KronShape& d, KronRows x, const bf16* left, const bf16* right, bf16* y) {
    Forward(d, x, left, right, y).run();
}

}  // namespace qrlora::amx
