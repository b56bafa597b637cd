// Products of a token's small matrices on tiles, and the layouts they pass through in between.
// "Rows" are an A operand: bf16 rows, ld elements apart. "Tiles" are a B operand: tile (j, d) holds
// columns 16 j.. and depth 32 d.., at data + (j * depth_tiles + d) * 512.
#pragma once

#include "tiles.h"

namespace qrlora::amx {

constexpr int64_t tile_elements = 512;

// A sum over groups (tokens) of A_g B_g: both operands advance by a step from group to group.
struct Operands {
    const bf16* a;
    int64_t lda, a_step;
    const bf16* b;
    int64_t b_step;
    int64_t depth_tiles, groups;
};

// Tiles 0..3 (I by J of them): C += sum_g A_g B_g.
template <int I, int J>
inline void add_tiles(const Operands& o, int64_t i, int64_t j) {
    const int64_t stride = o.lda * static_cast<int64_t>(sizeof(bf16));
    for (int64_t g = 0; g < o.groups; ++g) {
        const bf16* a = o.a + g * o.a_step + i * 16 * o.lda;
        const bf16* b = o.b + g * o.b_step + j * o.depth_tiles * tile_elements;
        const bf16* b1 = b + o.depth_tiles * tile_elements;
        for (int64_t d = 0; d < o.depth_tiles; ++d) {
            QRLORA_TILE_LOAD(4, a + d * 32, stride);
            QRLORA_TILE_LOAD(6, b + d * tile_elements, 64);
            _tile_dpbf16ps(0, 4, 6);
            if constexpr (J == 2) {
                QRLORA_TILE_LOAD(7, b1 + d * tile_elements, 64);
                _tile_dpbf16ps(1, 4, 7);
            }
            if constexpr (I == 2) {
                QRLORA_TILE_LOAD(5, a + 16 * o.lda + d * 32, stride);
                _tile_dpbf16ps(2, 5, 6);
                if constexpr (J == 2) _tile_dpbf16ps(3, 5, 7);
            }
        }
    }
}

template <int I, int J>
inline void product_block(const Operands& o, int64_t i, int64_t j, float* c, int64_t ldc,
                          bool accumulate) {
    c += i * 16 * ldc + j * 16;
    float* below = c + 16 * ldc;
    const int64_t stride = ldc * static_cast<int64_t>(sizeof(float));
    if (accumulate) {
        QRLORA_TILE_LOAD(0, c, stride);
        if constexpr (J == 2) QRLORA_TILE_LOAD(1, c + 16, stride);
        if constexpr (I == 2) QRLORA_TILE_LOAD(2, below, stride);
        if constexpr (I == 2 && J == 2) QRLORA_TILE_LOAD(3, below + 16, stride);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    add_tiles<I, J>(o, i, j);
    _tile_stored(0, c, stride);
    if constexpr (J == 2) _tile_stored(1, c + 16, stride);
    if constexpr (I == 2) _tile_stored(2, below, stride);
    if constexpr (I == 2 && J == 2) _tile_stored(3, below + 16, stride);
}

// C [16 row_tiles, 16 column_tiles] fp32 (+)= sum_g A_g B_g.
inline void tile_product(const Operands& o, int64_t row_tiles, int64_t column_tiles, float* c,
                         int64_t ldc, bool accumulate = false) {
    for (int64_t i = 0; i < row_tiles; i += 2)
        for (int64_t j = 0; j < column_tiles; j += 2) {
            const bool two_rows = i + 1 < row_tiles, two_columns = j + 1 < column_tiles;
            if (two_rows && two_columns)
                product_block<2, 2>(o, i, j, c, ldc, accumulate);
            else if (two_rows)
                product_block<2, 1>(o, i, j, c, ldc, accumulate);
            else if (two_columns)
                product_block<1, 2>(o, i, j, c, ldc, accumulate);
            else
                product_block<1, 1>(o, i, j, c, ldc, accumulate);
        }
}

inline __m512i round_pair(const float* low, const float* high) {
    return (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(high), _mm512_loadu_ps(low));
}

// fp32 rows p, p + 1 of 16 columns to one row of pairs.
inline __m512i round_rows_to_pairs(const float* row, int64_t ld) {
    const __m512i step =
        _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                         21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(step, round_pair(row, row + ld));
}

// C [32 depth_tiles, 16 column_tiles] fp32 to tiles, the first of them depth `first` of `of`.
inline void to_tiles(const float* c, int64_t ldc, int64_t depth_tiles, int64_t column_tiles,
                     bf16* to, int64_t first, int64_t of) {
    for (int64_t j = 0; j < column_tiles; ++j)
        for (int64_t d = 0; d < depth_tiles; ++d)
            for (int64_t p = 0; p < 16; ++p)
                _mm512_store_si512(to + (j * of + first + d) * tile_elements + p * 32,
                                   round_rows_to_pairs(c + (32 * d + 2 * p) * ldc + 16 * j, ldc));
}

// C [rows, 32 depth_tiles] fp32 to rows.
inline void to_rows(const float* c, int64_t ldc, int64_t rows, int64_t depth_tiles, bf16* to,
                    int64_t ld) {
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t d = 0; d < depth_tiles; ++d) {
            const float* at = c + i * ldc + 32 * d;
            _mm512_storeu_si512(to + i * ld + 32 * d, round_pair(at, at + 16));
        }
}

// C [16 column_tiles, 32 depth_tiles] fp32 to the tiles of its transpose.
inline void to_transposed_tiles(const float* c, int64_t ldc, int64_t column_tiles,
                                int64_t depth_tiles, bf16* to) {
    for (int64_t j = 0; j < column_tiles; ++j)
        for (int64_t d = 0; d < depth_tiles; ++d, to += tile_elements) {
            __m512i r[16];
            for (int64_t i = 0; i < 16; ++i) {
                const float* at = c + (16 * j + i) * ldc + 32 * d;
                r[i] = round_pair(at, at + 16);
            }
            transpose_words(r);
            for (int64_t i = 0; i < 16; ++i) _mm512_store_si512(to + i * 32, r[i]);
        }
}

// C [32 depth_tiles, 16 row_tiles] fp32 to the rows of its transpose.
inline void to_transposed_rows(const float* c, int64_t ldc, int64_t depth_tiles, int64_t row_tiles,
                               bf16* to, int64_t ld) {
    for (int64_t j = 0; j < row_tiles; ++j)
        for (int64_t d = 0; d < depth_tiles; ++d) {
            __m512i r[16];
            for (int64_t p = 0; p < 16; ++p)
                r[p] = round_rows_to_pairs(c + (32 * d + 2 * p) * ldc + 16 * j, ldc);
            transpose_words(r);
            for (int64_t i = 0; i < 16; ++i)
                _mm512_storeu_si512(to + (16 * j + i) * ld + 32 * d, r[i]);
        }
}

// bf16 [rows, columns] in memory, rows ld apart, to zero-padded tiles.
inline void pack_tiles(const bf16* from, int64_t ld, int64_t rows, int64_t columns, bf16* to,
                       int64_t depth_tiles, int64_t column_tiles) {
    for (int64_t j = 0; j < column_tiles; j += 2) {
        const __mmask32 mask = first32(columns - 16 * j);
        bf16* left = to + j * depth_tiles * tile_elements;
        bf16* right = left + depth_tiles * tile_elements;
        for (int64_t p = 0; p < 16 * depth_tiles; ++p) {
            const bf16* at = from + 2 * p * ld + 16 * j;
            __m512i low, high;
            pair_rows(_mm512_maskz_loadu_epi16(2 * p < rows ? mask : 0, at),
                      _mm512_maskz_loadu_epi16(2 * p + 1 < rows ? mask : 0, at + ld), low, high);
            _mm512_store_si512(left + p * 32, low);
            if (j + 1 < column_tiles) _mm512_store_si512(right + p * 32, high);
        }
    }
}

// C [rows, columns] fp32 rounded into bf16 memory whose rows lie side by side.
inline void store_rounded(const float* c, int64_t ldc, int64_t rows, int64_t columns, bf16* to) {
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < columns; j += 16)
            _mm256_mask_storeu_epi16(to + i * columns + j, first16(columns - j),
                                     (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(c + i * ldc + j)));
}

}  // namespace qrlora::amx
