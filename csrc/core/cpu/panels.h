// Many rows times a matrix in panels: C [m, n] = start + A [m, depth] B [depth, n]. A panel holds a
// few columns of B, row after row, so that the inner loop reads on and on. The order of every sum
// depends on depth alone.
#pragma once

#include <algorithm>

#include "columns.h"
#include "skinny.h"
#include "small_gemm.h"

namespace qrlora::QRLORA_ISA {

// 6 rows by four vectors fill the 32 registers of AVX-512, by two the 16 of the others. The fewer
// rows, the fewer elements of A that are brought to all lanes; 12 where a panel has fewer columns.
constexpr int PANEL_VECTORS = QRLORA_VECTOR_BYTES == 64 ? 4 : 2;
constexpr int PANEL_ROWS = 6;
template <typename T>
constexpr int64_t panel_width = PANEL_VECTORS * Vec<T>::lanes;

// Terms summed in registers before C: as many as MKL takes with AVX2, whose fp32 bits these are. A
// long sum is made of short ones, which keeps its error low.
constexpr int64_t PANEL_SUM = 192;
// Rows and columns of A that stay in the L2 cache.
constexpr int64_t CACHED_SUMS = QRLORA_VECTOR_BYTES == 64 ? 4 : 2;
constexpr int64_t CACHED_ROWS = 384 / CACHED_SUMS;
template <typename T>
constexpr int64_t cached_depth = CACHED_SUMS * PANEL_SUM * sizeof(float) / sizeof(T);

template <typename T>
constexpr int64_t whole_panels(int64_t columns) {
    return (columns + panel_width<T> - 1) / panel_width<T> * panel_width<T>;
}

// A block of C [m, n]: rows from i on, columns from j on.
struct Block {
    int64_t i, rows, j, columns;
};

// Calls body(block) for blocks of C [m, n], shared among the threads of the team. A thread that has
// columns of its own reads its own panels only.
template <typename T, typename Body>
void over_shares(Team team, int64_t m, int64_t n, int threads, const Body& body) {
    // The size of parts of `count`, each of whole units, so that every thread has one.
    const auto share = [&](int64_t count, int64_t unit) {
        const int64_t units = (count + unit - 1) / unit;
        return std::max<int64_t>(1, (units + threads - 1) / threads) * unit;
    };
    const int64_t count = whole_panels<T>(n) / panel_width<T>;
    if (count >= 4 * threads || count % threads == 0)
        over_blocks(team, n, share(n, panel_width<T>),
                    [&](int64_t j, int64_t end) { body(Block{0, m, j, end - j}); });
    else
        over_blocks(team, m, share(m, PANEL_ROWS),
                    [&](int64_t i, int64_t end) { body(Block{i, end - i, 0, n}); });
}

// Columns [first, last) of B, of all its `depth` rows, in panels one after the other; what the last
// one has no columns for is zero.
template <typename T>
inline void pack_panels(Layout<T> b, int64_t depth, int64_t first, int64_t last, T* panels) {
    constexpr int64_t width = panel_width<T>, lanes = Vec<T>::lanes, stretch = 16;
    for (int64_t j = first; j < last; j += width, panels += depth * width) {
        const int64_t columns = std::min(width, last - j);
        const T* from = b.data + j * b.col;
        if (columns < width) std::fill_n(panels, depth * width, T(0));
        if (b.col == 1) {
            for (int64_t p = 0; p < depth; ++p)
                std::copy_n(from + p * b.row, columns, panels + p * width);
            continue;
        }
        // Columns are contiguous: whole squares are turned.
        const bool turns = b.row == 1;
        const int64_t deep = turns ? depth / lanes * lanes : 0;
        const int64_t wide = turns ? columns / lanes * lanes : 0;
        for (int64_t p = 0; p < deep; p += lanes)
            for (int64_t c = 0; c < wide; c += lanes) {
                typename Vec<T>::type square[lanes];
                for (int64_t i = 0; i < lanes; ++i) square[i] = load(from + (c + i) * b.col + p);
                transpose<T>(square);
                for (int64_t i = 0; i < lanes; ++i) store(panels + (p + i) * width + c, square[i]);
            }
        const auto one_by_one = [&](int64_t low, int64_t high, int64_t c0) {
            for (int64_t p = low; p < high; p += stretch)
                for (int64_t c = c0; c < columns; ++c)
                    for (int64_t q = p; q < std::min(high, p + stretch); ++q)
                        panels[q * width + c] = from[q * b.row + c * b.col];
        };
        one_by_one(0, deep, wide);
        one_by_one(deep, depth, 0);
    }
}

// What C begins with: row i at data[i * ld]; null: zeros.
template <typename T>
struct Start {
    const T* data;
    int64_t ld;
};

// An addend, and with a bias their sum in C.
template <typename T>
inline Start<T> start_of(const T* addend, const T* bias, int64_t rows, int64_t columns, T* c,
                         int64_t ld) {
    if (!bias) return {addend, ld};
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < columns; ++j) c[i * ld + j] = addend[i * ld + j] + bias[j];
    return {c, ld};
}

// ROWS rows of C by the first `columns` of one panel, which are in VECTORS vectors, over up to
// PANEL_SUM of its rows.
template <typename T, int ROWS, int VECTORS>
inline void panel_tile(int64_t steps, const T* a, int64_t lda, const T* panel, int64_t columns,
                       Start<T> start, T* c, int64_t ldc) {
    constexpr int64_t lanes = Vec<T>::lanes;
    Sums<T, ROWS, VECTORS> sum;
    sum_products<T, ROWS, VECTORS>(steps, {a, lda, 1}, panel, panel_width<T>, sum);
    if (columns == VECTORS * lanes) {
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; ++v) {
                auto total = sum[i][v];
                if (start.data) total += load(start.data + i * start.ld + v * lanes);
                store(c + i * ldc + v * lanes, total);
            }
        return;
    }
    T part[ROWS * VECTORS * lanes];
    std::memcpy(part, sum, sizeof part);
    for (int i = 0; i < ROWS; ++i)
        for (int64_t j = 0; j < columns; ++j) {
            const T total = part[i * VECTORS * lanes + j];
            c[i * ldc + j] = start.data ? total + start.data[i * start.ld + j] : total;
        }
}

// The same over all of `steps`, a sum after the other.
template <typename T, int ROWS, int VECTORS>
inline void panel_rows(int64_t steps, const T* a, int64_t lda, const T* panel, int64_t columns,
                       Start<T> start, T* c, int64_t ldc) {
    int64_t p = 0;
    do {  // at least once: an empty sum is the start
        panel_tile<T, ROWS, VECTORS>(std::min(PANEL_SUM, steps - p), a + p, lda,
                                     panel + p * panel_width<T>, columns, start, c, ldc);
        start = {c, ldc};
        p += PANEL_SUM;
    } while (p < steps);
}

// Elements of `part` below.
template <typename T>
constexpr int64_t panel_room = CACHED_ROWS * cached_depth<T>;

// C [m, columns] = start + A [m, depth] times panels of `depth` rows. `part` takes rows of A that
// are far apart, each in a page of its own.
template <typename T>
inline void times_panels(int64_t m, const T* a, int64_t lda, int64_t depth, const T* panels,
                         int64_t columns, Start<T> start, T* c, int64_t ldc, T* part) {
    constexpr int64_t lanes = Vec<T>::lanes, width = panel_width<T>, near = 2 * cached_depth<T>;
    int64_t p = 0;
    do {
        const int64_t steps = std::min(cached_depth<T>, depth - p);
        for (int64_t i0 = 0; i0 < m; i0 += CACHED_ROWS) {
            const int64_t end = std::min(m, i0 + CACHED_ROWS);
            const T* left = a + i0 * lda + p;
            int64_t ld = lda;
            if (lda > near && columns >= 8 * width && end - i0 > PANEL_ROWS) {
                for (int64_t i = 0; i < end - i0; ++i)
                    std::copy_n(left + i * lda, steps, part + i * cached_depth<T>);
                left = part;
                ld = cached_depth<T>;
            }
            const auto panel = [&](int64_t j, auto vectors) {
                int64_t i = i0;
                const auto rows = [&](auto count) {
                    for (; i + count() <= end; i += count()) {
                        Start<T> at = start;
                        if (at.data) at.data += i * at.ld + j;
                        panel_rows<T, count(), vectors()>(
                            steps, left + (i - i0) * ld, ld, panels + j * depth + p * width,
                            std::min(width, columns - j), at, c + i * ldc + j, ldc);
                    }
                };
                if constexpr (2 * vectors() <= PANEL_VECTORS) rows(constant<2 * PANEL_ROWS>);
                rows(constant<PANEL_ROWS>);
                rows(constant<4>);
                rows(constant<2>);
                rows(constant<1>);
            };
            int64_t j = 0;
            for (; j + width <= columns; j += width) panel(j, constant<PANEL_VECTORS>);
            const int64_t rest = (columns - j + lanes - 1) / lanes;
            if (rest == 1) panel(j, constant<1>);
            if (rest == 2) panel(j, constant<2>);
            if constexpr (PANEL_VECTORS == 4) {
                if (rest == 3) panel(j, constant<3>);
                if (rest == 4) panel(j, constant<4>);
            }
        }
        start = {c, ldc};
        p += steps;
    } while (p < depth);
}

// From so many rows on it pays to bring B into panels for one product.
constexpr int64_t MANY_ROWS = 33;
// Elements of such panels at a time: what stays near a core, but at least one.
constexpr int64_t CACHED_PANELS = 1 << 19;

// Elements of `part` below.
template <typename T>
int64_t made_panels_room(int64_t depth) {
    return panel_room<T> + std::max(CACHED_PANELS, depth * panel_width<T>);
}

// times_panels by panels that are made of columns [first, first + columns) of B, a few at a time.
template <typename T>
void times_made_panels(int64_t m, const T* a, int64_t lda, int64_t depth, Layout<T> b,
                       int64_t first, int64_t columns, Start<T> start, T* c, int64_t ldc, T* part) {
    const int64_t most =
        std::max(CACHED_PANELS / std::max(depth, int64_t{1}) / panel_width<T>, int64_t{1});
    T* panels = part + panel_room<T>;
    for (int64_t j = 0; j < columns; j += most * panel_width<T>) {
        const int64_t some = std::min(most * panel_width<T>, columns - j);
        pack_panels(b, depth, first + j, first + j + some, panels);
        const Start<T> from{start.data ? start.data + j : nullptr, start.ld};
        times_panels(m, a, lda, depth, panels, some, from, c + j, ldc, part);
    }
}

}  // namespace qrlora::QRLORA_ISA
