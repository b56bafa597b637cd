// Dense building blocks of the pivoted QR, written over vectors of the target's width.
#include "dense.h"

#include <algorithm>

namespace qrlora::QRLORA_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64;
#elif defined(__AVX__)
constexpr int VECTOR_BYTES = 32;
#else
constexpr int VECTOR_BYTES = 16;
#endif
constexpr int64_t STEP_BLOCK = 64;  // steps summed in registers before they join c

template <class T>
struct Vector {
    typedef T type __attribute__((vector_size(VECTOR_BYTES), aligned(alignof(T)), may_alias));
    static constexpr int64_t lanes = VECTOR_BYTES / sizeof(T);
};

// Sixteen vector registers hold 4 rows of sums and the operands, thirty-two hold 8.
constexpr int MICRO_ROWS = VECTOR_BYTES == 64 ? 8 : 4;
constexpr int64_t MICRO_VECTORS = 2;
// One tile of these instead of two, the second of which would wait for its loads.
constexpr int64_t WIDEST = VECTOR_BYTES == 64 ? 3 : MICRO_VECTORS;
template <class T>
constexpr int64_t MICRO_COLUMNS = MICRO_VECTORS * Vector<T>::lanes;

// MICRO_ROWS x WIDTH vectors of c (+)= alpha * a b, the sum over all steps in order. One of a's
// strides is 1: that of its rows (a transposed factor) or that of the steps.
template <class T, bool TRANSPOSED, int WIDTH>
inline void micro_tile(const T* a, int64_t lda, const T* b, int64_t ldb, int64_t steps, T alpha,
                       T* c, int64_t ldc, bool assign) {
    using V = typename Vector<T>::type;
    static_assert(TILE_N % MICRO_COLUMNS<T> == 0 && TILE_M % MICRO_ROWS == 0, "whole tiles");
    V sum[MICRO_ROWS][WIDTH] = {};
#pragma GCC unroll 8
    for (int i = 0; i < MICRO_ROWS; ++i) {
        for (int j = 0; j < WIDTH; ++j) {
            __builtin_prefetch(c + i * ldc + j * Vector<T>::lanes, 1);
        }
    }
    // In a long product, the rows of the next tile are on their way while this one is computed.
    const bool ahead = !TRANSPOSED && steps == STEP_BLOCK;
    for (int64_t s = 0; s < steps; ++s) {
        if (ahead && s % Vector<T>::lanes == 0) {
#pragma GCC unroll 8
            for (int i = 0; i < MICRO_ROWS; ++i) {
                __builtin_prefetch(a + (i + MICRO_ROWS) * lda + s);
            }
        }
        const V* line = reinterpret_cast<const V*>(b + s * ldb);
        V right[WIDTH];
        for (int j = 0; j < WIDTH; ++j) right[j] = line[j];
#pragma GCC unroll 8
        for (int i = 0; i < MICRO_ROWS; ++i) {
            const T value = TRANSPOSED ? a[s * lda + i] : a[i * lda + s];
            for (int j = 0; j < WIDTH; ++j) sum[i][j] += value * right[j];
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < MICRO_ROWS; ++i) {
        V* line = reinterpret_cast<V*>(c + i * ldc);
        for (int j = 0; j < WIDTH; ++j)
            line[j] = assign ? alpha * sum[i][j] : line[j] + alpha * sum[i][j];
    }
}

template <class T, bool TRANSPOSED>
void gemm(const Gemm<T>& g) {
    for (int64_t first = 0; first < g.steps; first += STEP_BLOCK) {
        const int64_t steps = std::min(STEP_BLOCK, g.steps - first);
        int64_t vectors = 0;
        for (int64_t n = 0; n < g.n; n += vectors * Vector<T>::lanes) {
            const int64_t left = (g.n - n) / Vector<T>::lanes;
            vectors = left == WIDEST ? WIDEST : std::min(left, MICRO_VECTORS);
            const auto tile = vectors == WIDEST          ? micro_tile<T, TRANSPOSED, WIDEST>
                              : vectors == MICRO_VECTORS ? micro_tile<T, TRANSPOSED, MICRO_VECTORS>
                                                         : micro_tile<T, TRANSPOSED, 1>;
            for (int64_t m = 0; m < g.m; m += MICRO_ROWS) {
                const T* a = TRANSPOSED ? g.a + first * g.lda + m : g.a + m * g.lda + first;
                tile(a, g.lda, g.b + first * g.ldb + n, g.ldb, steps, g.alpha, g.c + m * g.ldc + n,
                     g.ldc, g.assign && first == 0);
            }
        }
    }
}

template <class S>
double as_double(S value) {
    return static_cast<double>(value);
}
template <class S>
float as_float(S value) {
    return static_cast<float>(value);
}
float as_float(bf16 value) { return to_float(value); }
double as_double(bf16 value) { return static_cast<double>(to_float(value)); }

template <class T, class S>
T convert(S value) {
    if constexpr (sizeof(T) == 8) {
        return as_double(value);
    } else {
        return as_float(value);
    }
}

// Calls body(pointer to the typed data) for the view's dtype.
template <class Body>
void with_type(const MatrixView& w, const Body& body) {
    switch (w.dtype) {
        case DType::f32:
            return body(static_cast<const float*>(w.data));
        case DType::f64:
            return body(static_cast<const double*>(w.data));
        case DType::bf16:
            return body(static_cast<const bf16*>(w.data));
        case DType::f16:
            return body(static_cast<const _Float16*>(w.data));
    }
}

// Rows ahead of the one being copied that are asked for: each begins in a page of its own, where
// the processor's own prefetching begins anew. Asking past the end of a matrix is harmless.
constexpr int64_t AHEAD = 4;

template <class S>
void prefetch_row(const S* line, int64_t columns) {
    const auto* bytes = reinterpret_cast<const char*>(line);
    const int64_t size = columns * static_cast<int64_t>(sizeof(S));
    for (int64_t at = 0; at < size; at += 64) __builtin_prefetch(bytes + at);
}

// Copies rows x columns of w, converted, into strips of `strip` columns, each [rows, strip] and
// contiguous: the power-of-two row stride of a weight would fall into a few cache sets. Columns
// past `columns` are set to 0. With strip = ld the result is one row-major block.
template <class T, class S>
void convert_block(const MatrixView& w, const S* data, int64_t row, int64_t rows, int64_t first,
                   int64_t columns, T* out, int64_t strip) {
    const S* corner = data + row * w.row_stride + first * w.column_stride;
    const auto width_at = [&](int64_t left) { return std::min(strip, columns - left); };
    if (w.column_stride == 1) {
        for (int64_t i = 0; i < rows; ++i) {
            const S* line = corner + i * w.row_stride;
            prefetch_row(line + AHEAD * w.row_stride, columns);
            T* to = out + i * strip;
            for (int64_t left = 0; left < columns; left += strip, to += rows * strip) {
                const int64_t width = width_at(left);
                for (int64_t j = 0; j < width; ++j) to[j] = convert<T>(line[left + j]);
                std::fill(to + width, to + strip, T(0));
            }
        }
        return;
    }
    for (int64_t left = 0; left < columns; left += strip, out += rows * strip) {
        const int64_t width = width_at(left);
        for (int64_t j = 0; j < width; ++j) {
            const S* line = corner + (left + j) * w.column_stride;
            for (int64_t i = 0; i < rows; ++i) {
                out[i * strip + j] = convert<T>(line[i * w.row_stride]);
            }
        }
        for (int64_t i = 0; i < rows; ++i) {
            std::fill(out + i * strip + width, out + (i + 1) * strip, T(0));
        }
    }
}

template <class T>
void project(const MatrixView& w, const T* q, int64_t m, int64_t first, int64_t last, T* acc,
             int64_t ld) {
    const int64_t columns = last - first;
    constexpr int64_t strip = MICRO_COLUMNS<T>;
    thread_local AlignedBuffer<T> buffer;
    T* block = buffer.reserve(STEP_BLOCK * ld);
    with_type(w, [&](auto* data) {
        for (int64_t row = 0; row < w.rows; row += STEP_BLOCK) {
            const int64_t rows = std::min(STEP_BLOCK, w.rows - row);
            convert_block(w, data, row, rows, first, columns, block, strip);
            for (int64_t n = 0; n < columns; n += strip) {
                gemm<T, true>({m, strip, rows, q + row * m, m, block + rows * n, strip, acc + n, ld,
                               T(1), row == 0});
            }
        }
    });
}

void column_norms2(const MatrixView& w, int64_t first, int64_t last, double* out) {
    const int64_t columns = last - first, ld = round_up(columns, TILE_N);
    thread_local AlignedBuffer<double> buffer;
    double* block = buffer.reserve((STEP_BLOCK + 1) * ld);
    double* part = block + STEP_BLOCK * ld;
    std::fill(out, out + columns, 0.0);
    with_type(w, [&](auto* data) {
        for (int64_t row = 0; row < w.rows; row += STEP_BLOCK) {
            const int64_t rows = std::min(STEP_BLOCK, w.rows - row);
            convert_block(w, data, row, rows, first, columns, block, ld);
            std::fill(part, part + columns, 0.0);
            for (int64_t i = 0; i < rows; ++i) {
                const double* line = block + i * ld;
                for (int64_t j = 0; j < columns; ++j) part[j] += line[j] * line[j];
            }
            for (int64_t j = 0; j < columns; ++j) out[j] += part[j];
        }
    });
}

void gather(const MatrixView& w, int64_t row, int64_t rows, const int64_t* columns, int64_t count,
            double* out, int64_t ld) {
    with_type(w, [&](auto* data) {
        const auto* from = data + row * w.row_stride;
        for (int64_t i0 = 0; i0 < rows; i0 += 8) {
            const int64_t i1 = std::min(i0 + 8, rows);
            for (int64_t j = 0; j < count; ++j) {
                const auto* line = from + columns[j] * w.column_stride;
                for (int64_t i = i0; i < i1; ++i) {
                    out[i * ld + j] = convert<double>(line[i * w.row_stride]);
                }
            }
        }
    });
}

}  // namespace

const DenseKernels& dense_kernels() {
    static const DenseKernels kernels{
        gemm<double, true>, gemm<double, false>, column_norms2, gather,
        project<float>,     project<double>,
    };
    return kernels;
}

}  // namespace qrlora::QRLORA_ISA
