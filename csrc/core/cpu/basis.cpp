#include "basis.h"

#include <algorithm>
#include <cmath>

#include "qrlora/cpu/parallel.h"
#include "qrlora/cpu/pivoted_qr.h"

namespace qrlora {

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
    replace(0, w, chosen, count, threads);
}

void Panel::replace(int64_t first, const MatrixView& w, const int64_t* chosen, int64_t count,
                    int threads) {
    constexpr int64_t chunk = 256;
    parallel_for(threads, (w.rows + chunk - 1) / chunk, [&](int64_t i) {
        const int64_t top = i * chunk;
        dense_kernels().gather(w, top, std::min(chunk, w.rows - top), chosen, count,
                               row(top) + first, ld);
    });
}

namespace {

// The product in tiles of its result, height x TILE_N of them or height x all columns.
void multiply(void (*gemm)(const Gemm<double>&), bool transposed, const Gemm<double>& g,
              int64_t height, bool whole_rows, int threads, bool upper = false) {
    const int64_t width = whole_rows ? g.n : TILE_N;
    const int64_t across = (g.n + width - 1) / width, down = (g.m + height - 1) / height;
    parallel_for(threads, across * down, [&](int64_t i) {
        const int64_t n = i % across * width, first = i / across * height;
        int64_t last = std::min(first + height, g.m);
        if (upper) last = std::min(last, n + width);
        if (last <= first) return;
        gemm({last - first, std::min(width, g.n - n), g.steps,
              g.a + (transposed ? first : first * g.lda), g.lda, g.b + n, g.ldb,
              g.c + first * g.ldc + n, g.ldc, g.alpha, g.assign});
    });
}

// c (+)= alpha * a b, or aᵀ b, in whole tiles of a result of m rows.
Gemm<double> product(const Panel& a, int64_t m, int64_t steps, const Panel& b, Panel& c,
                     double alpha, bool assign) {
    return {round_up(m, TILE_M),
            round_up(b.columns, LANES),
            steps,
            a.row(0),
            a.ld,
            b.row(0),
            b.ld,
            c.row(0),
            c.ld,
            alpha,
            assign};
}

// Height of tiles of TILE_N columns: rows are split where columns alone do not occupy every thread.
int64_t height_of_tiles(const Gemm<double>& g, int threads) {
    const int64_t across = (g.n + TILE_N - 1) / TILE_N;
    const int64_t parts = std::clamp<int64_t>(2 * threads / across, 1, g.m / TILE_M);
    return round_up((g.m + parts - 1) / parts, TILE_M);
}

constexpr int64_t HEIGHT = 128;  // of tiles of all columns

}  // namespace

void multiply_tn(const Panel& a, int64_t a_columns, const Panel& b, Panel& out, int threads,
                 bool upper) {
    out.shape(a_columns, b.columns);
    const auto g = product(a, a_columns, a.rows, b, out, 1.0, true);
    multiply(dense_kernels().gemm_tn, true, g, height_of_tiles(g, threads), false, threads, upper);
}

void multiply_nn(const Panel& a, int64_t steps, const Panel& b, Panel& out, int threads) {
    out.shape(a.rows, b.columns);
    const auto g = product(a, out.rows, steps, b, out, 1.0, true);
    multiply(dense_kernels().gemm_nn, false, g, HEIGHT, true, threads);
}

void subtract_nn(const Panel& a, int64_t steps, const Panel& b, Panel& from, int threads) {
    const auto g = product(a, from.rows, steps, b, from, -1.0, false);
    multiply(dense_kernels().gemm_nn, false, g, HEIGHT, true, threads);
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
    // Products read whole tiles of Qᵀ from any of its rows on.
    transposed_.shape(capacity + TILE_M, rows);
    clear();
}

void Basis::project_out(Panel& panel, int64_t first, int64_t last, int64_t known) {
    const int64_t newest = size() - known, count = last - first;
    if (newest == 0 || count == 0) return;
    const Panel& qt = transposed_;
    coefficients_.shape(newest, count);
    double *corner = panel.row(0) + first, *c = coefficients_.row(0);
    const int64_t n = round_up(count, LANES);
    const Gemm<double> into{
        round_up(newest, TILE_M), n,   qt.columns, qt.row(known), qt.ld, corner, panel.ld, c,
        coefficients_.ld,         1.0, true};
    multiply(dense_kernels().gemm_nn, false, into, height_of_tiles(into, threads_), false,
             threads_);
    const Gemm<double> back{round_up(panel.rows, TILE_M),
                            n,
                            newest,
                            qt.row(known),
                            qt.ld,
                            c,
                            coefficients_.ld,
                            corner,
                            panel.ld,
                            -1.0};
    multiply(dense_kernels().gemm_tn, true, back, HEIGHT, true, threads_);
}

void Basis::append(Panel& panel, std::vector<double> lower, bool project) {
    const int64_t count = panel.columns;
    invert_transposed(lower, count, inverse_);
    multiply_nn(panel, count, inverse_, scaled_, threads_);
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
    multiply_nn(scaled_, count, inverse_, panel, threads_);
    append_orthonormal(panel);
}

void Basis::append_orthonormal(const Panel& panel) {
    Panel& qt = transposed_;
    const int64_t first = size();
    for (int64_t i = 0; i < panel.rows; ++i) {
        for (int64_t j = 0; j < panel.columns; ++j) qt.row(first + j)[i] = panel.row(i)[j];
    }
    for (int64_t j = 0; j < panel.columns; ++j) {
        std::fill(qt.row(first + j) + qt.columns, qt.row(first + j + 1), 0.0);
    }
    qt.rows += panel.columns;
    std::fill(qt.row(qt.rows), qt.row(qt.rows + TILE_M), 0.0);
}

}  // namespace qrlora
