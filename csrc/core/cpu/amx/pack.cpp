// Operands brought into tile order.
#include "tiles.h"

namespace qrlora::amx {

namespace {

// 16 rows (the first `rows` of them present) of 32 elements (the first `width`).
inline void load_rows(const bf16* from, int64_t stride, int64_t rows, int64_t width,
                      __m512i (&r)[16]) {
    const __mmask32 mask = first32(width);
    for (int64_t i = 0; i < 16; ++i)
        r[i] =
            i < rows ? _mm512_maskz_loadu_epi16(mask, from + i * stride) : _mm512_setzero_si512();
}

// Columns of B are contiguous in memory: each tile is a transpose in units of pairs.
void pack_b_by_columns(const bf16* b, int64_t col, int64_t depth, int64_t columns, bf16* to) {
    for (int64_t p = 0; p < depth; p += tile_depth)
        for (int64_t j = 0; j < 32; j += 16, to += 512) {
            __m512i r[16];
            load_rows(b + j * col + p, col, columns - j, depth - p, r);
            transpose_words(r);
            for (int i = 0; i < 16; ++i) _mm512_store_si512(to + i * 32, r[i]);
        }
}

// A whole block: masks would take the execution port that the interleaving needs.
void pack_b_whole(const bf16* b, int64_t row, int64_t depth, bf16* to) {
    for (int64_t p = 0; p < depth; p += tile_depth, b += tile_depth * row, to += 1024)
#pragma GCC unroll 16
        for (int64_t i = 0; i < 16; ++i) {
            const bf16* even = b + 2 * i * row;
            __m512i low, high;
            pair_rows(_mm512_loadu_si512(even), _mm512_loadu_si512(even + row), low, high);
            _mm512_store_si512(to + i * 32, low);
            _mm512_store_si512(to + 512 + i * 32, high);
        }
}

// Rows of B are contiguous in memory: two rows interleave to pairs.
void pack_b_by_rows(const bf16* b, int64_t row, int64_t depth, int64_t columns, bf16* to) {
    if (columns >= 32 && depth % tile_depth == 0) return pack_b_whole(b, row, depth, to);
    const __mmask32 mask = first32(columns);
    for (int64_t p = 0; p < depth; p += tile_depth, to += 1024)
        for (int64_t i = 0; i < 16; ++i) {
            const int64_t at = p + 2 * i;
            const __m512i even = _mm512_maskz_loadu_epi16(at < depth ? mask : 0, b + at * row);
            const __m512i odd =
                _mm512_maskz_loadu_epi16(at + 1 < depth ? mask : 0, b + (at + 1) * row);
            __m512i low, high;
            pair_rows(even, odd, low, high);
            _mm512_store_si512(to + i * 32, low);
            _mm512_store_si512(to + 512 + i * 32, high);
        }
}

// Columns of A are contiguous in memory (A is a transpose): pairs, then a transpose of pairs.
void pack_a_transposed(const bf16* a, int64_t col, int64_t depth, int64_t rows, bf16* to,
                       int64_t ld) {
    const __mmask32 mask = first32(rows);
    for (int64_t p = 0; p < depth; p += tile_depth) {
        __m512i low[16], high[16];
        for (int64_t i = 0; i < 16; ++i) {
            const int64_t at = p + 2 * i;
            const __m512i even = _mm512_maskz_loadu_epi16(at < depth ? mask : 0, a + at * col);
            const __m512i odd =
                _mm512_maskz_loadu_epi16(at + 1 < depth ? mask : 0, a + (at + 1) * col);
            pair_rows(even, odd, low[i], high[i]);
        }
        transpose_words(low);
        transpose_words(high);
        for (int64_t i = 0; i < 16; ++i) {
            _mm512_store_si512(to + i * ld + p, low[i]);
            _mm512_store_si512(to + (i + 16) * ld + p, high[i]);
        }
    }
}

}  // namespace

void pack_b(const bf16* b, int64_t row, int64_t col, int64_t depth, int64_t columns, bf16* to) {
    if (row == 1)
        pack_b_by_columns(b, col, depth, columns, to);
    else
        pack_b_by_rows(b, row, depth, columns, to);
}

void pack_a(const bf16* a, int64_t row, int64_t col, int64_t depth, int64_t rows, bf16* to,
            int64_t ld) {
    if (col != 1) return pack_a_transposed(a, col, depth, rows, to, ld);
    copy_rows(a, row, rows, depth, to, 32, ld);
}

}  // namespace qrlora::amx
