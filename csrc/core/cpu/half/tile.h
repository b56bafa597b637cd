// ROWS rows of C by VECTORS vectors of columns, whose sums stay in registers.
#pragma once

#include "vectors.h"

namespace qrlora::QRLORA_ISA::half {

// A panel of B is as wide as a tile can be; the last one has as many vectors as it needs.
constexpr int MOST_VECTORS = QRLORA_VECTOR_BYTES == 64 ? 4 : 2;
constexpr int64_t panel_width = MOST_VECTORS * lanes;

// Rows that fill the registers beside so many vectors.
template <int VECTORS>
constexpr int TALLEST = QRLORA_VECTOR_BYTES < 64 ? 6
                        : VECTORS <= 2           ? 12
                                                 : 24 / VECTORS;

// A, pair (i, p) at data[i * row + p * pair].
struct Left {
    const bf16* data;
    int64_t row, pair;
};

template <int VECTORS>
inline void load_words(const bf16* words, Words (&b)[VECTORS]) {
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) std::memcpy(&b[v], words + v * 2 * lanes, sizeof b[v]);
}

inline Words pair_everywhere(const bf16* at) {
    uint32_t pair;
    std::memcpy(&pair, at, sizeof pair);
    return Words{} + pair;
}

// Adds A [ROWS, 2 pairs] times a panel of as many rows.
template <int ROWS, int VECTORS>
inline void add_pairs(int64_t pairs, Left a, const bf16* panel, Floats (&sum)[ROWS][VECTORS]) {
    for (int64_t p = 0; p < pairs; ++p, a.data += a.pair, panel += VECTORS * 2 * lanes) {
        Words b[VECTORS];
#if defined(__AVX512BF16__)
        load_words(panel, b);
#pragma GCC unroll 12
        for (int i = 0; i < ROWS; ++i) {
            const auto left = (__m512bh)pair_everywhere(a.data + i * a.row);
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; ++v)
                sum[i][v] = _mm512_dpbf16_ps(sum[i][v], left, (__m512bh)b[v]);
        }
#else
        // The registers of AVX2 hold no more than one half of each pair.
        const auto add = [&](auto half_of) {
            load_words(panel, b);
#pragma GCC unroll 12
            for (int i = 0; i < ROWS; ++i) {
                const Floats left = half_of(pair_everywhere(a.data + i * a.row));
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS; ++v) sum[i][v] += left * half_of(b[v]);
            }
        };
        add([](Words pair) { return even(pair); });
        add([](Words pair) { return odd(pair); });
#endif
    }
}

// One of the products that meet in a tile.
struct Term {
    Left a;
    const bf16* panel;
    int64_t pairs;
};

// Where whole vectors of a tile of C go: C + bias + addend, and the same scaled; all but C may be
// null.
struct Plain {
    bf16* c;
    const bf16 *bias, *addend;
    const float* scale;
    bf16* scaled;
    int64_t ld;
};

template <int ROWS, int VECTORS>
inline void finish_plain(const Plain& to, Floats (&sum)[ROWS][VECTORS]) {
    if (to.bias)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) {
            const Floats bias = widen(load_halves(to.bias + v * lanes));
#pragma GCC unroll 12
            for (int i = 0; i < ROWS; ++i) sum[i][v] += bias;
        }
    if (to.addend)
#pragma GCC unroll 12
        for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; ++v)
                sum[i][v] += widen(load_halves(to.addend + i * to.ld + v * lanes));
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v)
            store_halves(to.c + i * to.ld + v * lanes, narrow(sum[i][v]));
    if (!to.scaled) return;
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) {
        const Floats scale = load(to.scale + v * lanes);
#pragma GCC unroll 12
        for (int i = 0; i < ROWS; ++i)
            store_halves(to.scaled + i * to.ld + v * lanes, narrow(sum[i][v] * scale));
    }
}

// The sum of the terms, from row `row` of their A on, over what `sums` [ROWS, VECTORS vectors],
// rows ld apart, hold unless `fresh`: to C as it is `plain`, or else into `sums`.
template <int ROWS, int VECTORS>
void tile(const Term* terms, int count, int64_t row, bool fresh, float* sums, int64_t ld,
          const Plain* plain) {
    Floats sum[ROWS][VECTORS] = {};
    if (!fresh)
#pragma GCC unroll 12
        for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; ++v) sum[i][v] = load(sums + i * ld + v * lanes);
    for (int t = 0; t < count; ++t) {
        Left a = terms[t].a;
        a.data += row * a.row;
        add_pairs<ROWS, VECTORS>(terms[t].pairs, a, terms[t].panel, sum);
    }
    if (plain) return finish_plain<ROWS, VECTORS>(*plain, sum);
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) store(sums + i * ld + v * lanes, sum[i][v]);
}

}  // namespace qrlora::QRLORA_ISA::half
