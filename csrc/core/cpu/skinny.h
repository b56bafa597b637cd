// Products with few rows on the left: C [m, n] += A [m, depth] B [depth, n]. B is the larger
// operand by far and is read where it lies, once for each 32 rows. The order of every sum depends
// on depth and layout alone.
#pragma once

#include <algorithm>
#include <array>
#include <type_traits>
#include <utility>

#include "vec.h"

namespace qrlora::QRLORA_ISA {

// Element (i, j) at data[i * row + j * col].
template <typename T>
struct Layout {
    const T* data;
    int64_t row, col;
};

template <int VALUE>
constexpr std::integral_constant<int, VALUE> constant{};

template <typename T, int BYTES>
struct Part {
    typedef T type __attribute__((vector_size(BYTES)));
};

// Half of a vector, without a way through memory: that would keep every sum of a tile there.
template <typename T, int BYTES, int FIRST, int... I>
inline typename Part<T, BYTES / 2>::type half_of(typename Part<T, BYTES>::type v,
                                                 std::integer_sequence<int, I...>) {
#if defined(__has_builtin) && __has_builtin(__builtin_shufflevector)
    return __builtin_shufflevector(v, v, (FIRST + I)...);
#else
    return typename Part<T, BYTES / 2>::type{v[FIRST + I]...};
#endif
}

template <typename T, int BYTES>
inline T total(typename Part<T, BYTES>::type v) {
    constexpr int lanes = BYTES / sizeof(T);
    if constexpr (lanes == 2) {
        return v[0] + v[1];
    } else {
        constexpr std::make_integer_sequence<int, lanes / 2> indices;
        return total<T, BYTES / 2>(half_of<T, BYTES, 0>(v, indices) +
                                   half_of<T, BYTES, lanes / 2>(v, indices));
    }
}

// v with zeros in all but its last `count` lanes.
template <typename T>
inline typename Vec<T>::type last_lanes(typename Vec<T>::type v, int64_t count) {
    using Bits = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
    typedef Bits Mask __attribute__((vector_size(QRLORA_VECTOR_BYTES)));
    constexpr int64_t lanes = Vec<T>::lanes;
    static constexpr auto bits = [] {
        std::array<Bits, 2 * lanes> all{};
        for (int64_t i = lanes; i < 2 * lanes; ++i) all[i] = -1;
        return all;
    }();
    Mask mask, masked;
    std::memcpy(&mask, bits.data() + count, sizeof mask);
    std::memcpy(&masked, &v, sizeof v);
    masked &= mask;
    std::memcpy(&v, &masked, sizeof v);
    return v;
}

// B's columns are contiguous, ldb apart, as are A's rows: ROWS x COLUMNS dot products at once.
template <typename T, int ROWS, int COLUMNS>
inline void dot_tile(const T* a, int64_t lda, const T* b, int64_t ldb, int64_t depth, T* c,
                     int64_t ldc) {
    constexpr int64_t lanes = Vec<T>::lanes;
    typename Vec<T>::type sum[ROWS][COLUMNS];
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < COLUMNS; ++j) sum[i][j] = typename Vec<T>::type{};
    const auto add = [&](int64_t p, const auto& part) {
        typename Vec<T>::type column[COLUMNS];
#pragma GCC unroll 8
        for (int j = 0; j < COLUMNS; ++j) column[j] = part(load(b + j * ldb + p));
#pragma GCC unroll 4
        for (int i = 0; i < ROWS; ++i) {
            const auto row = part(load(a + i * lda + p));
#pragma GCC unroll 8
            for (int j = 0; j < COLUMNS; ++j) sum[i][j] += row * column[j];
        }
    };
    int64_t p = 0;
    for (; p + lanes <= depth; p += lanes) add(p, [](auto v) { return v; });
    const bool scalars = depth < lanes;
    if (p < depth && !scalars)  // what is left over, in a load that reaches back
        add(depth - lanes, [&](auto v) { return last_lanes<T>(v, depth - p); });
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < COLUMNS; ++j)
            c[i * ldc + j] += total<T, QRLORA_VECTOR_BYTES>(sum[i][j]);
    if (!scalars) return;
    for (int i = 0; i < ROWS; ++i)
        for (int j = 0; j < COLUMNS; ++j) {
            T rest = 0;
            for (int64_t t = 0; t < depth; ++t) rest += a[i * lda + t] * b[j * ldb + t];
            c[i * ldc + j] += rest;
        }
}

template <typename T, int COLUMNS>
inline void dot_columns(int64_t m, const T* a, int64_t lda, const T* b, int64_t ldb, int64_t depth,
                        T* c, int64_t ldc) {
    int64_t i = 0;
    for (; i + 4 <= m; i += 4)
        dot_tile<T, 4, COLUMNS>(a + i * lda, lda, b, ldb, depth, c + i * ldc, ldc);
    if (i + 2 <= m) {
        dot_tile<T, 2, COLUMNS>(a + i * lda, lda, b, ldb, depth, c + i * ldc, ldc);
        i += 2;
    }
    if (i < m) dot_tile<T, 1, COLUMNS>(a + i * lda, lda, b, ldb, depth, c + i * ldc, ldc);
}

template <typename T>
inline void add_dots(int64_t m, Layout<T> a, Layout<T> b, int64_t depth, int64_t first,
                     int64_t last, T* c, int64_t ldc) {
    constexpr int COLUMNS = QRLORA_VECTOR_BYTES == 64 ? 4 : 2;  // 4 rows of sums fill the registers
    int64_t j = first;
    for (; j + COLUMNS <= last; j += COLUMNS)
        dot_columns<T, COLUMNS>(m, a.data, a.row, b.data + j * b.col, b.col, depth, c + j, ldc);
    for (; j < last; ++j)
        dot_columns<T, 1>(m, a.data, a.row, b.data + j * b.col, b.col, depth, c + j, ldc);
}

// B's rows are contiguous, ldb apart: ROWS x VECTORS sums over `steps` of its rows, added to C but
// for the first `skip` columns.
template <typename T, int BYTES, int ROWS, int VECTORS>
inline void row_tile(Layout<T> a, const T* b, int64_t ldb, int64_t steps, int64_t skip, T* c,
                     int64_t ldc) {
    using V = typename Part<T, BYTES>::type;
    constexpr int64_t lanes = BYTES / sizeof(T);
    V sum[ROWS][VECTORS];
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) sum[i][v] = V{};
    for (int64_t p = 0; p < steps; ++p) {
        V line[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) std::memcpy(&line[v], b + p * ldb + v * lanes, BYTES);
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; ++i) {
            const T scale = a.data[i * a.row + p * a.col];
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; ++v) sum[i][v] += scale * line[v];
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) {
            // A long sum is made of short ones, which keeps its error low.
            T* to = c + i * ldc + v * lanes;
            if (skip <= v * lanes) {
                V at;
                std::memcpy(&at, to, BYTES);
                at += sum[i][v];
                std::memcpy(to, &at, BYTES);
            } else {
                T part[lanes];
                std::memcpy(part, &sum[i][v], BYTES);
                for (int64_t t = skip - v * lanes; t < lanes; ++t) to[t] += part[t];
            }
        }
}

template <typename T, int BYTES, int VECTORS>
inline void row_tiles(int64_t m, Layout<T> a, const T* b, int64_t ldb, int64_t steps, int64_t skip,
                      T* c, int64_t ldc) {
    int64_t i = 0;
    const auto from = [&] { return Layout<T>{a.data + i * a.row, a.row, a.col}; };
    if constexpr (BYTES == 64 && VECTORS == 4) {
        // B's lines often lie a multiple of 4 KB apart and do not stay in the L1 cache together:
        // more rows at a time fetch them less often.
        constexpr int64_t half = 2 * BYTES / sizeof(T);
        for (; i + 8 <= m; i += 8) {
            T* to = c + i * ldc;
            if (skip < half) row_tile<T, BYTES, 8, 2>(from(), b, ldb, steps, skip, to, ldc);
            row_tile<T, BYTES, 8, 2>(from(), b + half, ldb, steps, skip - half, to + half, ldc);
        }
    }
    for (; i + 4 <= m; i += 4)
        row_tile<T, BYTES, 4, VECTORS>(from(), b, ldb, steps, skip, c + i * ldc, ldc);
    if (i + 2 <= m) {
        row_tile<T, BYTES, 2, VECTORS>(from(), b, ldb, steps, skip, c + i * ldc, ldc);
        i += 2;
    }
    if (i < m) row_tile<T, BYTES, 1, VECTORS>(from(), b, ldb, steps, skip, c + i * ldc, ldc);
}

template <typename T>
inline void add_rows(int64_t m, Layout<T> a, Layout<T> b, int64_t depth, int64_t first,
                     int64_t last, T* c, int64_t ldc) {
    constexpr int SIZE = sizeof(T);
    constexpr int64_t lanes = Vec<T>::lanes;
    constexpr int VECTORS = QRLORA_VECTOR_BYTES == 64 ? 4 : 2;  // 4 rows of sums fill the registers
    constexpr int64_t wide = VECTORS * lanes;
    for (int64_t p = 0; p < depth; p += 32) {
        const int64_t steps = std::min<int64_t>(32, depth - p);
        const Layout<T> left{a.data + p * a.col, a.row, a.col};
        const T* lines = b.data + p * b.row;
        const auto tiles = [&](auto bytes, auto vectors, int64_t j, int64_t skip = 0) {
            row_tiles<T, bytes(), vectors()>(m, left, lines + j, b.row, steps, skip, c + j, ldc);
        };
        int64_t j = first;
        for (; j + wide <= last; j += wide)
            tiles(constant<QRLORA_VECTOR_BYTES>, constant<VECTORS>, j);
        if (j == last) continue;
        if (last - first >= wide) {
            // What is left over, in a tile that reaches back over columns which are done: cheaper
            // than narrow tiles.
            const int64_t rest = last - j;
            if (rest <= wide / 2)
                tiles(constant<QRLORA_VECTOR_BYTES>, constant<VECTORS / 2>, last - wide / 2,
                      wide / 2 - rest);
            else
                tiles(constant<QRLORA_VECTOR_BYTES>, constant<VECTORS>, last - wide, wide - rest);
            continue;
        }
        for (; j + lanes <= last; j += lanes) tiles(constant<QRLORA_VECTOR_BYTES>, constant<1>, j);
        if constexpr (QRLORA_VECTOR_BYTES > 16)
            for (; j + 16 / SIZE <= last; j += 16 / SIZE) tiles(constant<16>, constant<1>, j);
        for (; j < last; ++j) tiles(constant<SIZE>, constant<1>, j);
    }
}

// As add_rows, but stretches of B's rows are summed on their own: over 14,336 rows added straight
// to C the error grows past twice that of a library's product. `part` has room for the result.
template <typename T>
inline void add_stretches(int64_t m, Layout<T> a, Layout<T> b, int64_t depth, int64_t first,
                          int64_t last, T* c, int64_t ldc, T* part) {
    constexpr int64_t stretch = 1024;
    if (depth <= stretch) return add_rows(m, a, b, depth, first, last, c, ldc);
    const int64_t columns = last - first;
    for (int64_t p = 0; p < depth; p += stretch) {
        std::fill_n(part, m * columns, T(0));
        add_rows<T>(m, {a.data + p * a.col, a.row, a.col},
                    {b.data + p * b.row + first, b.row, b.col}, std::min(stretch, depth - p), 0,
                    columns, part, columns);
        for (int64_t i = 0; i < m; ++i)
            for (int64_t j = 0; j < columns; ++j) c[i * ldc + first + j] += part[i * columns + j];
    }
}

constexpr int64_t ROWS_AT_ONCE = 32;  // of C, so few that they stay in the cache

// Columns [first, last) of C += A B; `part` has room for ROWS_AT_ONCE rows of them.
template <typename T>
inline void add_product(int64_t m, Layout<T> a, Layout<T> b, int64_t depth, int64_t first,
                        int64_t last, T* c, int64_t ldc, T* part) {
    for (int64_t i = 0; i < m; i += ROWS_AT_ONCE) {
        const Layout<T> some{a.data + i * a.row, a.row, a.col};
        const int64_t rows = std::min(ROWS_AT_ONCE, m - i);
        if (b.col == 1)
            add_stretches(rows, some, b, depth, first, last, c + i * ldc, ldc, part);
        else
            add_dots(rows, some, b, depth, first, last, c + i * ldc, ldc);
    }
}

}  // namespace qrlora::QRLORA_ISA
