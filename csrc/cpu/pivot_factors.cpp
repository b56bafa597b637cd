// q and r from given pivots: block Gram-Schmidt in fp64, twice where a column nearly vanishes, then
// one pass r = qᵀ w.
#include <algorithm>
#include <cmath>

#include "qrlora/cpu/basis.h"
#include "qrlora/cpu/pivoted_qr.h"

namespace qrlora {
namespace {

constexpr int64_t PANEL = TILE_N;
constexpr double KEPT2 = 0.01;         // share of a norm² below which it is orthogonalised again
constexpr int64_t PROJECT_ROWS = 256;  // rows of r in one pass over the matrix

// Modified Gram-Schmidt of the panel in place; returns R [count, count], diagonal positive.
std::vector<double> orthonormalise(Panel& x) {
    std::vector<double> r(x.columns * x.columns, 0.0);
    dense_kernels().orthonormalise(x.row(0), x.rows, x.columns, x.ld, r.data());
    return r;
}

// Columns [first, first + count) of the triangle R = H + H2 R1 over R2 R1, row-major [size, size].
void store_triangle(const Panel& h1, const Panel& h2, const std::vector<double>& r1,
                    const std::vector<double>& r2, int64_t first, int64_t count, int64_t size,
                    double* triangle) {
    for (int64_t j = 0; j < count; ++j) {
        for (int64_t i = 0; i < first; ++i) {
            double sum = h1.row(i)[j];
            for (int64_t s = 0; s <= j; ++s) sum += h2.row(i)[s] * r1[s * count + j];
            triangle[i * size + first + j] = sum;
        }
        for (int64_t i = 0; i <= j; ++i) {
            double sum = 0.0;
            for (int64_t s = i; s <= j; ++s) sum += r2[i * count + s] * r1[s * count + j];
            triangle[(first + i) * size + first + j] = sum;
        }
    }
}

void copy_panel(const Panel& from, Panel& to) {
    to.reset(from.rows, from.columns);
    std::copy(from.row(0), from.row(0) + from.rows * from.ld, to.row(0));
}

// What is left of some column is so short that its orthogonality lost more than a digit or two.
bool lost_digits(const Panel& h, const std::vector<double>& r, int64_t first, int64_t count) {
    for (int64_t j = 0; j < count; ++j) {
        double whole2 = 0.0;
        for (int64_t i = 0; i < first; ++i) whole2 += h.row(i)[j] * h.row(i)[j];
        for (int64_t i = 0; i <= j; ++i) whole2 += r[i * count + j] * r[i * count + j];
        const double left = r[j * count + j];
        if (!(left * left >= KEPT2 * whole2)) return true;
    }
    return false;
}

// Q grows in `basis`; the triangle [size, size] of R = Qᵀ W[:, pivots] is returned.
std::vector<double> factorise(const MatrixView& w, const std::vector<int64_t>& pivots, Basis& basis,
                              int threads, const Interrupted& interrupted) {
    const int64_t size = static_cast<int64_t>(pivots.size());
    std::vector<double> triangle(size * size, 0.0);
    Panel x, h1, h2;
    for (int64_t first = 0; first < size; first += PANEL) {
        if (interrupted()) return {};
        const int64_t count = std::min(PANEL, size - first);
        x.gather(w, pivots.data() + first, count, threads);
        basis.project_out(x);
        if (first > 0) copy_panel(basis.coefficients(), h1);
        const std::vector<double> r1 = orthonormalise(x);
        h2.reset(first, count);
        std::vector<double> r2(count * count, 0.0);
        for (int64_t j = 0; j < count; ++j) r2[j * count + j] = 1.0;
        if (lost_digits(h1, r1, first, count)) {
            basis.project_out(x);
            if (first > 0) copy_panel(basis.coefficients(), h2);
            r2 = orthonormalise(x);
        }
        store_triangle(h1, h2, r1, r2, first, count, size, triangle.data());
        basis.append_orthonormal(x);
    }
    return triangle;
}

// r[first:last] = q[:, first:last]ᵀ w in T, tile by tile.
template <class T>
void project_rows(const MatrixView& w, const Panel& q, int64_t first, int64_t last,
                  const FactorOutputs& out, int threads) {
    const int64_t count = last - first, height = round_up(count, TILE_M);
    AlignedBuffer<T> packed;
    T* part = packed.reserve(w.rows * height);
    std::fill(part, part + w.rows * height, T(0));
    for (int64_t i = 0; i < w.rows; ++i) {
        for (int64_t j = 0; j < count; ++j) {
            part[i * height + j] = static_cast<T>(q.row(i)[first + j]);
        }
    }
    const int64_t width = std::clamp<int64_t>(round_up(w.columns / (4 * threads), TILE_N), TILE_N,
                                              1024 / static_cast<int64_t>(sizeof(T)));
    parallel_for(threads, (w.columns + width - 1) / width, [&](int64_t tile) {
        const int64_t left = tile * width, right = std::min(left + width, w.columns);
        const int64_t ld = round_up(right - left, TILE_N);
        thread_local AlignedBuffer<T> buffer;
        T* rows = buffer.reserve(height * ld);
        if constexpr (sizeof(T) == 4) {
            dense_kernels().project_f32(w, part, height, left, right, rows, ld);
        } else {
            dense_kernels().project_f64(w, part, height, left, right, rows, ld);
        }
        for (int64_t i = 0; i < count; ++i) {
            for (int64_t j = left; j < right; ++j) {
                store(out.r, out.dtype, (first + i) * w.columns + j, rows[i * ld + j - left]);
            }
        }
    });
}

}  // namespace

bool factors_from_pivots(const MatrixView& w, const std::vector<int64_t>& pivots,
                         const FactorOutputs& out, int threads, const Interrupted& interrupted) {
    const int64_t size = static_cast<int64_t>(pivots.size());
    Basis basis(w.rows, size, threads);
    const std::vector<double> triangle = factorise(w, pivots, basis, threads, interrupted);
    if (triangle.empty()) return false;
    const Panel& q = basis.panel();
    for (int64_t i = 0; i < w.rows; ++i) {
        for (int64_t j = 0; j < size; ++j) store(out.q, out.dtype, i * size + j, q.row(i)[j]);
    }
    // Where every column is a pivot, the triangle below is all of r.
    for (int64_t first = 0; size < w.columns && first < size; first += PROJECT_ROWS) {
        if (interrupted()) return false;
        const int64_t last = std::min(first + PROJECT_ROWS, size);
        if (w.dtype == DType::f64) {
            project_rows<double>(w, q, first, last, out, threads);
        } else {
            project_rows<float>(w, q, first, last, out, threads);
        }
    }
    for (int64_t j = 0; j < size; ++j) {
        for (int64_t i = 0; i < size; ++i) {
            store(out.r, out.dtype, i * w.columns + pivots[j], triangle[i * size + j]);
        }
        out.diagonal[j] = triangle[j * size + j];
    }
    return true;
}

}  // namespace qrlora
