#include "qrlora/cpu/basis.h"

#include <algorithm>
#include <cmath>

#include "qrlora/cpu/pivoted_qr.h"

namespace qrlora {

const DenseKernels& dense_kernels() { return QRLORA_DISPATCH(dense_kernels); }

void Panel::shape(int64_t new_rows, int64_t new_columns) {
    rows = new_rows;
    columns = new_columns;
    // An odd number of cache lines, so that the rows of a column fall into different cache sets.
    ld = round_up(columns, TILE_N) + 8;
    buffer_.reserve(round_up(rows, TILE_M) * ld);
}

void Panel::clear_padding() {
    for (int64_t i = 0; i < rows; ++i) std::fill(row(i) + columns, row(i + 1), 0.0);
    std::fill(row(rows), row(round_up(rows, TILE_M)), 0.0);
}

void Panel::reset(int64_t new_rows, int64_t new_columns) {
    shape(new_rows, new_columns);
    std::fill(row(0), row(round_up(rows, TILE_M)), 0.0);
}

void Panel::gather(const MatrixView& w, const int64_t* chosen, int64_t count, int threads) {
    shape(w.rows, count);
    clear_padding();
    constexpr int64_t chunk = 256;
    parallel_for(threads, (w.rows + chunk - 1) / chunk, [&](int64_t i) {
        const int64_t first = i * chunk;
        dense_kernels().gather(w, first, std::min(chunk, w.rows - first), chosen, count, row(first),
                               ld);
    });
}

void multiply_tn(const Panel& a, int64_t a_columns, const Panel& b, Panel& out, int threads,
                 bool upper) {
    out.reset(a_columns, b.columns);
    const int64_t m = round_up(a_columns, TILE_M);
    const int64_t across = round_up(b.columns, TILE_N) / TILE_N;
    // Split the rows of the result too when its columns alone do not occupy every thread.
    const int64_t parts = std::clamp<int64_t>(2 * threads / across, 1, m / TILE_M);
    const int64_t height = round_up((m + parts - 1) / parts, TILE_M);
    parallel_for(threads, across * parts, [&](int64_t i) {
        const int64_t n = i % across * TILE_N, first = i / across * height;
        int64_t last = std::min(first + height, m);
        if (upper) last = std::min(last, n + TILE_N);
        if (last <= first) return;
        dense_kernels().gemm_tn({last - first, TILE_N, a.rows, a.row(0) + first, a.ld, b.row(0) + n,
                                 b.ld, out.row(first) + n, out.ld, 1.0});
    });
}

void multiply_nn(const Panel& a, int64_t steps, const Panel& b, Panel& c, double alpha,
                 int threads) {
    constexpr int64_t height = 128;
    const int64_t rows = round_up(c.rows, TILE_M);
    parallel_for(threads, (rows + height - 1) / height, [&](int64_t i) {
        const int64_t first = i * height;
        dense_kernels().gemm_nn({std::min(height, rows - first), round_up(c.columns, TILE_N), steps,
                                 a.row(first), a.ld, b.row(0), b.ld, c.row(first), c.ld, alpha});
    });
}

void cholesky(std::vector<double>& gram, int64_t count) {
    for (int64_t j = 0; j < count; ++j) {
        for (int64_t i = j; i < count; ++i) {
            double sum = gram[j * count + i];
            for (int64_t s = 0; s < j; ++s) sum -= gram[i * count + s] * gram[j * count + s];
            gram[i * count + j] = i == j ? std::sqrt(sum) : sum / gram[j * count + j];
        }
    }
}

namespace {

// inverse(L)ᵀ [count, count] of a lower triangle, as the right operand of multiply_nn.
void invert_transposed(const std::vector<double>& lower, int64_t count, Panel& out) {
    out.reset(count, count);
    for (int64_t j = 0; j < count; ++j) {
        // Column j of inverse(L) is row j of the result.
        out.row(j)[j] = 1.0 / lower[j * count + j];
        for (int64_t i = j + 1; i < count; ++i) {
            double sum = 0.0;
            for (int64_t s = j; s < i; ++s) sum += lower[i * count + s] * out.row(j)[s];
            out.row(j)[i] = -sum / lower[i * count + i];
        }
    }
}

// One pass of Cholesky QR leaves ‖QᵀQ - I‖ at about the squared condition number times the unit
// roundoff: here below 1e-12.
constexpr double ONCE_CONDITION2 = 4000.0;

// An upper bound of the squared condition number of the panel whose Gram is L Lᵀ.
double condition2(const std::vector<double>& lower, const Panel& inverse) {
    const int64_t count = inverse.columns;
    double whole2 = 0.0, inverse2 = 0.0;
    for (int64_t i = 0; i < count; ++i) {
        for (int64_t j = 0; j <= i; ++j) {
            whole2 += lower[i * count + j] * lower[i * count + j];
            inverse2 += inverse.row(j)[i] * inverse.row(j)[i];
        }
    }
    return whole2 * inverse2;
}

}  // namespace

Basis::Basis(int64_t rows, int64_t capacity, int threads) : threads_(threads) {
    q_.reset(rows, capacity);
}

void Basis::project_out(Panel& panel) {
    if (size_ == 0) return;
    multiply_tn(q_, size_, panel, coefficients_, threads_);
    multiply_nn(q_, size_, coefficients_, panel, -1.0, threads_);
}

void Basis::append(Panel& panel, std::vector<double> lower, bool project) {
    const int64_t count = panel.columns;
    invert_transposed(lower, count, inverse_);
    scaled_.reset(panel.rows, count);
    multiply_nn(panel, count, inverse_, scaled_, 1.0, threads_);
    if (!project && condition2(lower, inverse_) < ONCE_CONDITION2) {
        std::swap(panel, scaled_);
        return append_orthonormal(panel);
    }

    if (project) project_out(scaled_);
    multiply_tn(scaled_, count, scaled_, gram_, threads_, true);
    for (int64_t i = 0; i < count; ++i) {
        std::copy(gram_.row(i), gram_.row(i) + count, lower.begin() + i * count);
    }
    cholesky(lower, count);
    invert_transposed(lower, count, inverse_);
    panel.reset(panel.rows, count);
    multiply_nn(scaled_, count, inverse_, panel, 1.0, threads_);
    append_orthonormal(panel);
}

void Basis::append_orthonormal(const Panel& panel) {
    for (int64_t i = 0; i < panel.rows; ++i) {
        std::copy(panel.row(i), panel.row(i) + panel.columns, q_.row(i) + size_);
    }
    size_ += panel.columns;
}

}  // namespace qrlora
