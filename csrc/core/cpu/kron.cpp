// The Kronecker update by the kernels of a column, which read the terms L_t and R_t in layouts and
// a type of their own.
#include "qrlora/cpu/kron.h"

#include <vector>

#include "qrlora/cpu/buffer.h"
#include "qrlora/cpu/table.h"

namespace qrlora {

namespace {

// What the kernels read instead of the factors:
//   forward   left [n, terms r] of the L_t, right [terms k, r] of the R_t
//   backward  left [terms r, n] of the L_t^T, right [terms r, k] of the R_t^T, right_0 [k, r] = R_0
struct Operands {
    AlignedBuffer<unsigned char> left, right, right_0;
};
enum class Step { forward, backward };

template <typename W>
std::vector<W> widened(const void* data, DType dtype, int64_t count) {
    std::vector<W> out(count);
    const auto copy = [&](const auto* from) {
        for (int64_t i = 0; i < count; ++i) out[i] = static_cast<W>(from[i]);
    };
    if (dtype == DType::f64) {
        copy(static_cast<const double*>(data));
    } else if (dtype == DType::f32) {
        copy(static_cast<const float*>(data));
    } else {
        const auto* from = static_cast<const bf16*>(data);
        for (int64_t i = 0; i < count; ++i) out[i] = static_cast<W>(to_float(from[i]));
    }
    return out;
}

// f = s (f - start), where there is a start
template <typename W>
void measure_from(const std::vector<W>& start, W scaling, std::vector<W>& f) {
    for (size_t i = 0; i < start.size(); ++i) f[i] -= start[i];
    for (W& value : f) value *= scaling;
}

template <typename W>
struct Terms {
    std::vector<W> left[2], right[2];  // [n, r] and [k, r]
};

template <typename W>
Terms<W> terms_of(const KronShape& d, const KronFactors& f) {
    const int64_t n = d.n * d.r, k = d.k * d.r;
    const W scaling = static_cast<W>(f.scaling);
    Terms<W> terms;
    terms.left[0] = widened<W>(f.a, f.dtype, n);
    terms.right[0] = widened<W>(f.b, f.dtype, k);
    if (d.terms == 2) {
        terms.left[1] = widened<W>(f.a0, f.dtype, n);
        terms.right[1] = terms.right[0];
        measure_from(widened<W>(f.b0, f.dtype, k), scaling, terms.right[1]);
    }
    measure_from(terms.left[1], scaling, terms.left[0]);
    return terms;
}

void put(double* out, int64_t at, double value) { out[at] = value; }
void put(float* out, int64_t at, float value) { out[at] = value; }
void put(bf16* out, int64_t at, float value) { out[at] = to_bf16(value); }

// from [rows, columns] to out with the given strides
template <typename W, typename D>
void lay(const std::vector<W>& from, int64_t rows, int64_t columns, D* out, int64_t row_stride,
         int64_t column_stride) {
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < columns; ++j)
            put(out, i * row_stride + j * column_stride, from[i * columns + j]);
}

template <typename W, typename D>
Operands laid_out(const KronShape& d, const KronFactors& f, Step step) {
    const Terms<W> terms = terms_of<W>(d, f);
    Operands made;
    const auto reserve = [](auto& buffer, int64_t count) {
        return reinterpret_cast<D*>(buffer.reserve(count * static_cast<int64_t>(sizeof(D))));
    };
    D* left = reserve(made.left, d.terms * d.n * d.r);
    D* right = reserve(made.right, d.terms * d.k * d.r);
    for (int64_t t = 0; t < d.terms; ++t) {
        if (step == Step::forward) {
            lay(terms.left[t], d.n, d.r, left + t * d.r, d.terms * d.r, 1);
            lay(terms.right[t], d.k, d.r, right + t * d.k * d.r, d.r, 1);
        } else {
            lay(terms.left[t], d.n, d.r, left + t * d.r * d.n, 1, d.n);
            lay(terms.right[t], d.k, d.r, right + t * d.r * d.k, 1, d.k);
        }
    }
    if (step == Step::backward)
        lay(terms.right[0], d.k, d.r, reserve(made.right_0, d.k * d.r), d.r, 1);
    return made;
}

Operands operands(const Column& column, const KronShape& d, DType dtype, const KronFactors& factors,
                  Step step) {
    if (column.rounded_factors) return laid_out<float, bf16>(d, factors, step);
    if (dtype == DType::f64) return laid_out<double, double>(d, factors, step);
    return laid_out<float, float>(d, factors, step);
}

}  // namespace

void kron_forward(const Column& column, const KronShape& d, DType dtype, const KronFactors& factors,
                  KronRows x, void* y) {
    const Operands o = operands(column, d, dtype, factors, Step::forward);
    column.kron_forward(d, dtype, {x, o.left.data(), o.right.data(), y});
}

void kron_backward(const Column& column, const KronShape& d, DType dtype,
                   const KronFactors& factors, KronBackward args) {
    const Operands o = operands(column, d, dtype, factors, Step::backward);
    args.left_t = o.left.data();
    args.right = o.right_0.data();
    args.right_t = o.right.data();
    args.scaling = factors.scaling;
    column.kron_backward(d, dtype, args);
}

}  // namespace qrlora
