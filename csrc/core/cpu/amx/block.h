// A block of C, 32 rows by 32 columns, in tiles 0..3, and its way to memory.
#pragma once

#include <algorithm>

#include "gemm.h"
#include "tiles.h"

namespace qrlora::amx {

constexpr int64_t side = 32;
constexpr int64_t block_bytes = side * side * sizeof(float);

inline int64_t padded_depth(const Gemm& g) {
    int64_t depth = 0;
    for (int t = 0; t < g.count; ++t) depth += round_up(g.products[t].depth, tile_depth);
    return depth;
}

struct Rows {
    const bf16* data;
    int64_t ld;  // elements
};

// Adds A [32, depth] B [depth, 32] to tiles 0..3; without `tall` only the upper half, without
// `wide` only the left one.
template <bool tall, bool wide>
inline void multiply(Rows a, const bf16* b, int64_t depth) {
    const int64_t stride = a.ld * static_cast<int64_t>(sizeof(bf16));
    const bf16* below = a.data + 16 * a.ld;
    for (int64_t p = 0; p < depth; p += tile_depth, b += 1024) {
        QRLORA_TILE_LOAD(4, a.data + p, stride);
        QRLORA_TILE_LOAD(6, b, 64);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (wide) {
            QRLORA_TILE_LOAD(7, b + 512, 64);
            _tile_dpbf16ps(1, 4, 7);
        }
        if constexpr (tall) {
            QRLORA_TILE_LOAD(5, below + p, stride);
            _tile_dpbf16ps(2, 5, 6);
            if constexpr (wide) _tile_dpbf16ps(3, 5, 7);
        }
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

// The common block, whole and with one bf16 result: a cache line per row.
inline void finish_whole(const Gemm& g, const float* block, int64_t i0, int64_t j0) {
    const int64_t rows = std::min(side, g.m - i0);
    const __mmask16 all = first16(16);
    const __m512 none = _mm512_setzero_ps();
    const __m512 bias_low = g.bias ? load_bf16(all, g.bias + j0) : none;
    const __m512 bias_high = g.bias ? load_bf16(all, g.bias + j0 + 16) : none;
    bf16* c = static_cast<bf16*>(g.c) + i0 * g.ldc + j0;
    const bf16* addend = g.addend ? g.addend + i0 * g.ldc + j0 : nullptr;
    for (int64_t i = 0; i < rows; ++i, block += side, c += g.ldc) {
        __m512 low = _mm512_add_ps(_mm512_load_ps(block), bias_low);
        __m512 high = _mm512_add_ps(_mm512_load_ps(block + 16), bias_high);
        if (addend) {
            low = _mm512_add_ps(low, load_bf16(all, addend + i * g.ldc));
            high = _mm512_add_ps(high, load_bf16(all, addend + i * g.ldc + 16));
        }
        _mm512_storeu_si512(c, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
}

// One rounding: block [32, 32] fp32 + bias + addend into C.
inline void finish(const Gemm& g, const float* block, int64_t i0, int64_t j0) {
    if (g.n - j0 >= side && !g.fp32_out && !g.scaled) return finish_whole(g, block, i0, j0);
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

// Rows i.. of a matrix where they lie, or a padded copy where a tile would reach over their
// end.
inline Rows rows_of(const Matrix& a, int64_t depth, int64_t i, int64_t count, bf16*& copy) {
    const bf16* from = a.data + i * a.row;
    if (a.col == 1 && count - i >= side && depth % tile_depth == 0) return {from, a.row};
    const int64_t ld = round_up(depth, tile_depth);
    pack_a(from, a.row, a.col, depth, count - i, copy, ld);
    const Rows copied{copy, ld};
    copy += side * ld;
    return copied;
}

// Asks for the 32 columns of B from j on ahead of their use, one after the other: tiles walk them
// all at once, in too many places for the processor's own prefetching.
inline void prefetch_columns(const Gemm& g, const Product& p, int64_t j) {
    constexpr int64_t line = 64 / sizeof(bf16);
    for (int64_t i = j; i < std::min(j + side, g.n); ++i)
        for (int64_t d = 0; d < p.depth; d += line)
            _mm_prefetch(p.b.data + i * p.b.col + d, _MM_HINT_T1);
}

inline void zero_block() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

inline void load_block(const float* block) {
    QRLORA_TILE_LOAD(0, block, side * 4);
    QRLORA_TILE_LOAD(1, block + 16, side * 4);
    QRLORA_TILE_LOAD(2, block + 16 * side, side * 4);
    QRLORA_TILE_LOAD(3, block + 16 * side + 16, side * 4);
}

inline void store_block(float* block) {
    _tile_stored(0, block, side * 4);
    _tile_stored(1, block + 16, side * 4);
    _tile_stored(2, block + 16 * side, side * 4);
    _tile_stored(3, block + 16 * side + 16, side * 4);
}

// Adds the products' sum to tiles 0..3, of which only 16 rows, or columns, need be right where the
// matrix has no more.
inline void multiply_all(const Gemm& g, const Rows (&a)[2], const bf16* b, int64_t rows,
                         int64_t columns) {
    const bool tall = rows > 16, wide = columns > 16;
    const auto add = tall   ? wide ? multiply<true, true> : multiply<true, false>
                     : wide ? multiply<false, true>
                            : multiply<false, false>;
    for (int t = 0; t < g.count; ++t) {
        const int64_t depth = g.products[t].depth;
        add(a[t], b, depth);
        b += side * round_up(depth, tile_depth);
    }
}

}  // namespace qrlora::amx
