// Dense building blocks of the pivoted QR, written over vectors of the target's width.
#include "qrlora/cpu/dense.h"

#include <algorithm>
#include <type_traits>

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
constexpr int64_t CONVERT_ROWS = STEP_BLOCK;  // so that converting does not change a sum

template <class T>
struct Vector {
    typedef T type __attribute__((vector_size(VECTOR_BYTES), aligned(alignof(T)), may_alias));
    static constexpr int64_t lanes = VECTOR_BYTES / sizeof(T);
};

// ROWS x (2 vectors) of c; the sum runs over all steps in order.
template <class T, int ROWS>
void micro_tile(const Gemm<T>& g, int64_t m, int64_t n, int64_t first, int64_t last) {
    using V = typename Vector<T>::type;
    constexpr int64_t lanes = Vector<T>::lanes;
    V sum[ROWS][2] = {};
    const T* a = g.a + m * g.a_row;
    for (int64_t s = first; s < last; ++s) {
        const V* b = reinterpret_cast<const V*>(g.b + s * g.ldb + n);
        const V b0 = b[0], b1 = b[1];
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; ++i) {
            const T value = a[i * g.a_row + s * g.a_step];
            sum[i][0] += value * b0;
            sum[i][1] += value * b1;
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i) {
        V* c = reinterpret_cast<V*>(g.c + (m + i) * g.ldc + n);
        c[0] += g.alpha * sum[i][0];
        c[1] += g.alpha * sum[i][1];
    }
    static_assert(TILE_N % (2 * lanes) == 0 && TILE_M % ROWS == 0, "padding covers whole tiles");
}

template <class T>
void gemm(const Gemm<T>& g) {
    // Sixteen vector registers hold 4 rows of sums and the operands, thirty-two hold 8.
    constexpr int rows = VECTOR_BYTES == 64 ? 8 : 4;
    for (int64_t first = 0; first < g.steps; first += STEP_BLOCK) {
        const int64_t last = std::min(first + STEP_BLOCK, g.steps);
        for (int64_t n = 0; n < g.n; n += 2 * Vector<T>::lanes) {
            for (int64_t m = 0; m < g.m; m += rows) micro_tile<T, rows>(g, m, n, first, last);
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
        case DType::f32: return body(static_cast<const float*>(w.data));
        case DType::f64: return body(static_cast<const double*>(w.data));
        case DType::bf16: return body(static_cast<const bf16*>(w.data));
        case DType::f16: return body(static_cast<const _Float16*>(w.data));
    }
}

// Rows x columns of w, converted, to out[rows, ld]; columns past `columns` are set to 0.
template <class T, class S>
void convert_block(const MatrixView& w, const S* data, int64_t row, int64_t rows, int64_t first,
                   int64_t columns, T* out, int64_t ld) {
    const S* from = data + row * w.row_stride + first * w.column_stride;
    if (w.column_stride == 1) {
        for (int64_t i = 0; i < rows; ++i) {
            const S* line = from + i * w.row_stride;
            for (int64_t j = 0; j < columns; ++j) out[i * ld + j] = convert<T>(line[j]);
        }
    } else {
        // Eight rows at a time keep the reads of a transposed matrix contiguous and the writes near.
        for (int64_t i0 = 0; i0 < rows; i0 += 8) {
            const int64_t i1 = std::min(i0 + 8, rows);
            for (int64_t j = 0; j < columns; ++j) {
                const S* line = from + j * w.column_stride;
                for (int64_t i = i0; i < i1; ++i) {
                    out[i * ld + j] = convert<T>(line[i * w.row_stride]);
                }
            }
        }
    }
    for (int64_t i = 0; i < rows; ++i) std::fill(out + i * ld + columns, out + (i + 1) * ld, T(0));
}

template <class T>
void project(const MatrixView& w, const T* q, int64_t m, int64_t first, int64_t last, T* acc,
             int64_t ld) {
    std::fill(acc, acc + m * ld, T(0));
    const int64_t columns = last - first;
    with_type(w, [&](auto* data) {
        using S = std::remove_const_t<std::remove_pointer_t<decltype(data)>>;
        constexpr bool same = std::is_same_v<S, T>;
        Gemm<T> g{m, ld, 0, nullptr, 1, m, nullptr, ld, acc, ld, T(1)};
        if constexpr (same) {
            if (w.column_stride == 1 && columns == ld) {
                g.steps = w.rows;
                g.a = q;
                g.b = data + first;
                g.ldb = w.row_stride;
                return gemm(g);
            }
        }
        thread_local AlignedBuffer<T> block;
        T* converted = block.reserve(CONVERT_ROWS * ld);
        for (int64_t row = 0; row < w.rows; row += CONVERT_ROWS) {
            g.steps = std::min(CONVERT_ROWS, w.rows - row);
            convert_block(w, data, row, g.steps, first, columns, converted, ld);
            g.a = q + row * m;
            g.b = converted;
            gemm(g);
        }
    });
}

void column_norms2(const MatrixView& w, int64_t first, int64_t last, double* out) {
    const int64_t columns = last - first, ld = round_up(columns, TILE_N);
    thread_local AlignedBuffer<double> buffer;
    double* block = buffer.reserve((CONVERT_ROWS + 1) * ld);
    double* part = block + CONVERT_ROWS * ld;
    std::fill(out, out + columns, 0.0);
    with_type(w, [&](auto* data) {
        for (int64_t row = 0; row < w.rows; row += CONVERT_ROWS) {
            const int64_t rows = std::min(CONVERT_ROWS, w.rows - row);
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
    static const DenseKernels kernels{gemm<float>, gemm<double>,   column_norms2,
                                      gather,      project<float>, project<double>};
    return kernels;
}

}  // namespace qrlora::QRLORA_ISA
