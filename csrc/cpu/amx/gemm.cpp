// C = A_0 B_0 + A_1 B_1 + bias + addend in blocks of 32x32 that stay in tile registers from the
// first product's first element to the last rounding. A is read where it lies; B is packed panel by
// panel, a panel being as many columns as half of the L2 cache holds.
#include <algorithm>

#include "qrlora/cpu/amx.h"
#include "tiles.h"

namespace qrlora::amx {

namespace {

constexpr int64_t side = 32;  // rows and columns of a block of C: four tiles
constexpr int64_t panel_bytes = 1 << 20;

// How C is cut into tasks. An element's sum does not depend on the cut, nor on the threads.
struct Cut {
    int64_t panel, panels, rows, chunks;
    explicit Cut(const Gemm& g) {
        int64_t depth = 0;
        for (int i = 0; i < g.count; ++i) depth += round_up(g.products[i].depth, tile_depth);
        const int64_t fits = std::max(side, panel_bytes / 2 / std::max<int64_t>(depth, 1));
        const int64_t share = (g.n + g.threads - 1) / g.threads;
        panel = std::min(fits / side * side, round_up(share, side));
        panels = (g.n + panel - 1) / panel;
        const int64_t wanted = panels >= g.threads ? 1 : (g.threads + panels - 1) / panels;
        rows = round_up((g.m + wanted - 1) / wanted, side);
        chunks = (g.m + rows - 1) / rows;
    }
};

struct Rows {
    const bf16* data;
    int64_t ld;  // elements
};

// Adds A [32, depth] B [depth, 32] to tiles 0..3.
inline void multiply(Rows a, const bf16* b, int64_t depth) {
    const int64_t stride = a.ld * static_cast<int64_t>(sizeof(bf16));
    const bf16* below = a.data + 16 * a.ld;
    for (int64_t p = 0; p < depth; p += tile_depth, b += 1024) {
        _tile_loadd(4, a.data + p, stride);
        _tile_loadd(6, b, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, b + 512, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, below + p, stride);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
}

inline __m512 widen(__m256i v) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
}

inline __m512 load_bf16(__mmask16 mask, const bf16* p) {
    return widen(_mm256_maskz_loadu_epi16(mask, p));
}

inline void store_bf16(bf16* p, __mmask16 mask, __m512 v) {
    _mm256_mask_storeu_epi16(p, mask, (__m256i)_mm512_cvtneps_pbh(v));
}

// One rounding: block [32, 32] fp32 + bias + addend into C.
void finish(const Gemm& g, const float* block, int64_t i0, int64_t j0) {
    const int64_t rows = std::min(side, g.m - i0);
    for (int64_t j = 0; j < side && j0 + j < g.n; j += 16) {
        const __mmask16 mask = first16(g.n - j0 - j);
        const __m512 bias = g.bias ? load_bf16(mask, g.bias + j0 + j) : _mm512_setzero_ps();
        const __m512 scale =
            g.scaled ? _mm512_maskz_loadu_ps(mask, g.column_scale + j0 + j) : _mm512_setzero_ps();
        for (int64_t i = 0; i < rows; ++i) {
            const int64_t at = (i0 + i) * g.ldc + j0 + j;
            __m512 v = _mm512_add_ps(_mm512_load_ps(block + i * side + j), bias);
            if (g.addend) v = _mm512_add_ps(v, load_bf16(mask, g.addend + at));
            if (g.fp32_out)
                _mm512_mask_storeu_ps(static_cast<float*>(g.c) + at, mask, v);
            else
                store_bf16(static_cast<bf16*>(g.c) + at, mask, v);
            if (g.scaled) store_bf16(g.scaled + at, mask, _mm512_mul_ps(v, scale));
        }
    }
}

class Task {
  public:
    Task(const Gemm& g, const Cut& cut, Scratch& scratch) : g_(g), cut_(cut) {
        int64_t depth = 0;
        for (int i = 0; i < g.count; ++i) depth += round_up(g.products[i].depth, tile_depth);
        auto* bytes =
            static_cast<char*>(scratch.get((cut.panel + side) * depth * 2 + side * side * 4));
        block_ = reinterpret_cast<float*>(bytes);
        b_ = reinterpret_cast<bf16*>(bytes + side * side * 4);
        a_ = b_ + cut.panel * depth;
        depth_ = depth;
    }

    void run(int64_t panel, int64_t chunk) {
        const int64_t j0 = panel * cut_.panel, j1 = std::min(g_.n, j0 + cut_.panel);
        const int64_t i1 = std::min(g_.m, (chunk + 1) * cut_.rows);
        for (int64_t j = j0; j < j1; j += side) pack_columns(j, b_ + (j - j0) * depth_);
        for (int64_t i = chunk * cut_.rows; i < i1; i += side) {
            Rows a[2];
            bf16* to = a_;
            for (int t = 0; t < g_.count; ++t) a[t] = rows(g_.products[t], i, to);
            for (int64_t j = j0; j < j1; j += side) multiply_block(a, i, j, b_ + (j - j0) * depth_);
        }
    }

  private:
    void pack_columns(int64_t j, bf16* to) {
        for (int t = 0; t < g_.count; ++t) {
            const Product& p = g_.products[t];
            pack_b(p.b.data + j * p.b.col, p.b.row, p.b.col, p.depth, g_.n - j, to);
            to += side * round_up(p.depth, tile_depth);
        }
    }

    // Rows i.. of A where they lie, or a padded copy where a tile would reach over their end.
    Rows rows(const Product& p, int64_t i, bf16*& to) {
        const bf16* from = p.a.data + i * p.a.row;
        if (p.a.col == 1 && g_.m - i >= side && p.depth % tile_depth == 0) return {from, p.a.row};
        const int64_t ld = round_up(p.depth, tile_depth);
        pack_a(from, p.a.row, p.a.col, p.depth, g_.m - i, to, ld);
        const Rows copy{to, ld};
        to += side * ld;
        return copy;
    }

    void multiply_block(const Rows (&a)[2], int64_t i, int64_t j, const bf16* b) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int t = 0; t < g_.count; ++t) {
            multiply(a[t], b, g_.products[t].depth);
            b += side * round_up(g_.products[t].depth, tile_depth);
        }
        _tile_stored(0, block_, side * 4);
        _tile_stored(1, block_ + 16, side * 4);
        _tile_stored(2, block_ + 16 * side, side * 4);
        _tile_stored(3, block_ + 16 * side + 16, side * 4);
        finish(g_, block_, i, j);
    }

    const Gemm& g_;
    const Cut& cut_;
    float* block_;
    bf16 *b_, *a_;
    int64_t depth_;
};

}  // namespace

void gemm(const Gemm& g) {
    if (g.m == 0 || g.n == 0) return;
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
