// Rounds of the pivoted QR: bounds and triangle after each, workspace, and the entry points.
#include "pivot_batch.cuh"

namespace qrlora::cuda {
namespace {

constexpr int kThreads = 256;

// Lowers every bound by the accepted columns; also grows it by the rounding of the pass.
__global__ void __launch_bounds__(kThreads) lower_bounds_kernel(const Batch b) {
    const int64_t column = int64_t(blockIdx.x) * kThreads + threadIdx.x, matrix = blockIdx.y;
    const PivotState& s = b.p.states[matrix];
    if (column >= b.p.columns || s.accepted == 0) return;
    const int64_t per_tile = s.wide ? kCandidates / kBasisTiles : 2 * kCandidates / kBasisTiles;
    double lowered = 0.0, noise = 0.0;
    for (int64_t tile = 0; tile * per_tile < s.accepted; ++tile) {
        lowered += b.lowered.of(matrix)[tile * b.p.columns + column];
        noise += b.noise.of(matrix)[tile * b.p.columns + column];
    }
    const double unit = 8 * (s.wide ? kEps64 : kEps32) * sqrt(static_cast<double>(s.accepted));
    const double error = unit * sqrt(b.start2.of(matrix)[column]);
    const double norm2 = Larger()(b.norm2.of(matrix)[column] - lowered, 0.0);
    b.norm2.of(matrix)[column] = norm2;
    b.noise2.of(matrix)[column] += noise;
    // |r + e|² differs from |r|² by at most 2|r||e| + |e|².
    b.slack.of(matrix)[column] += 2 * sqrt(lowered) * error + error * error + 4 * kEps64 * norm2;
}

// The candidates' norms are known to the rounding of their Gram, and the basis has grown.
__global__ void __launch_bounds__(kCandidates) settle_kernel(const Batch b) {
    const int64_t matrix = blockIdx.x;
    PivotState& s = b.p.states[matrix];
    if (s.accepted == 0) return;
    if (!b.p.factors && threadIdx.x < s.candidates) {
        const int64_t column = b.candidates.of(matrix)[threadIdx.x];
        const double left2 = b.left2.of(matrix)[threadIdx.x];
        const double error2 = kGramError * b.known2.of(matrix)[threadIdx.x];
        set_exact(b, matrix, column, Larger()(left2, 0.0));
        b.slack.of(matrix)[column] += error2;
        // What rounding may have hidden is computed again before it counts as nothing.
        b.alive.of(matrix)[column] = independent(b, matrix, column, left2 + error2);
    }
    if (threadIdx.x == 0) s.filled += s.accepted;
}

// New columns of the triangle. A pivot column is Q (C1 + C2 Lᵀ) + Qnew L2ᵀ Lᵀ: C1 and C2 are the
// coefficients taken out before and after the product with inverse(L)ᵀ, L and L2 the two factors.
__global__ void __launch_bounds__(kCandidates) triangle_kernel(const Batch b) {
    const int64_t matrix = blockIdx.y, row = blockIdx.x, j = threadIdx.x;
    const PivotState& s = b.p.states[matrix];
    if (j >= s.accepted || row >= s.filled + s.accepted) return;
    const double* lower = b.factor.of(matrix) + j;  // L[j][t] at t * kCandidates
    double value = 0.0;
    if (row < s.filled) {
        const double* second = b.second.of(matrix) + row * kCandidates;
        for (int64_t t = 0; t <= j; ++t) value += second[t] * lower[t * kCandidates];
        value += b.first.of(matrix)[row * kCandidates + j];
    } else {
        const int64_t i = row - s.filled;
        const double* again = b.again.of(matrix) + i * kCandidates;  // L2[t][i] at t
        for (int64_t t = i; t <= j; ++t) value += again[t] * lower[t * kCandidates];
    }
    b.triangle.of(matrix)[row * b.triangle.ld + s.filled + j] = value;
    if (row == s.filled + j) b.p.norms[matrix * b.p.capacity + row] = value;
}

// q in its dtype, and r at the pivots from the triangle; block x is a row of both.
__global__ void __launch_bounds__(kThreads)
    store_factors_kernel(const Batch b, const PivotFactors out) {
    const int64_t matrix = blockIdx.y, row = blockIdx.x;
    const PivotState& s = b.p.states[matrix];
    for (int64_t j = threadIdx.x; j < s.filled; j += kThreads) {
        if (row < b.p.rows)
            store(out.q[matrix], out.dtype, row * s.limit + j,
                  b.basis.of(matrix)[row * b.basis.ld + j]);
        if (row < s.filled)
            store(out.r[matrix], out.dtype,
                  row * b.p.columns + b.p.pivots[matrix * b.p.capacity + j],
                  row <= j ? b.triangle.of(matrix)[row * b.triangle.ld + j] : 0.0);
    }
}

__global__ void __launch_bounds__(kThreads) store_bounds_kernel(const Batch b) {
    const int64_t column = int64_t(blockIdx.x) * kThreads + threadIdx.x, matrix = blockIdx.y;
    if (column < b.p.columns)
        b.p.bounds[matrix * b.p.columns + column] = Larger()(bound(b, matrix, column), 0.0);
}

__global__ void __launch_bounds__(kThreads) count_left_kernel(const Batch b) {
    __shared__ int64_t counts[kThreads];
    int64_t left = 0;
    for (int64_t i = threadIdx.x; i < b.p.count; i += kThreads)
        left += b.p.states[i].phase != Phase::done;
    left = reduce<kThreads>(left, counts, Sum());
    if (threadIdx.x == 0) *b.left = left;
}

// Hands out pieces of the workspace, each on 256 bytes.
class Carver {
  public:
    explicit Carver(void* base) : base_(static_cast<char*>(base)) {}

    template <typename T>
    T* take(int64_t elements) {
        T* piece = reinterpret_cast<T*>(base_ + used);
        used += (elements * static_cast<int64_t>(sizeof(T)) + 255) / 256 * 256;
        return piece;
    }
    template <typename T>
    PerMatrix<T> each(int64_t count, int64_t size) {
        return {take<T>(count * size), size};
    }
    Panel panel(int64_t count, int64_t rows, int64_t ld) {
        return {take<double>(count * rows * ld), rows * ld, ld};
    }
    int64_t used = 0;

  private:
    char* base_;
};

Batch carve(const PivotBatch& p, int64_t& bytes) {
    Batch b{};
    b.p = p;
    b.parts = (p.rows + kPartRows - 1) / kPartRows;
    b.part_rows = p.capacity > kCandidates ? p.capacity : kCandidates;
    Carver carver(p.workspace);
    const int64_t n = p.count, c = kCandidates;
    const int64_t product = b.part_rows * c;
    b.left = carver.take<int64_t>(1);
    b.candidates = carver.each<int64_t>(n, c);
    b.accepted = carver.each<int>(n, c);
    b.left2 = carver.each<double>(n, c);
    b.known2 = carver.each<double>(n, c);
    b.partial = carver.each<double>(n, b.parts * (product > p.columns ? product : p.columns));
    b.basis = carver.panel(n, p.rows, p.capacity);
    for (Panel* one : {&b.panel, &b.scaled}) *one = carver.panel(n, p.rows, c);
    for (Panel* one : {&b.first, &b.second}) *one = carver.panel(n, p.capacity, c);
    for (Panel* one : {&b.gram, &b.factor, &b.again, &b.inverse}) *one = carver.panel(n, c, c);
    if (p.factors) {
        b.triangle = carver.panel(n, p.capacity, p.capacity);
    } else {
        for (PerMatrix<double>* one : {&b.start2, &b.norm2, &b.slack, &b.noise2})
            *one = carver.each<double>(n, p.columns);
        b.alive = carver.each<uint8_t>(n, p.columns);
        for (PerMatrix<double>* one : {&b.lowered, &b.noise})
            *one = carver.each<double>(n, kBasisTiles * p.columns);
    }
    bytes = carver.used;
    return b;
}

Batch carve(const PivotBatch& p) {
    int64_t bytes;
    return carve(p, bytes);
}

unsigned count_of(const Batch& b) { return static_cast<unsigned>(b.p.count); }

// Pivots among the candidates, and orthonormal columns from the accepted ones, twice orthogonal to
// the basis.
void take_candidates(const Batch& b, Launches& run) {
    gather_candidates(b, run);
    project_out(b, b.panel, Count::candidates, b.first, run);
    multiply_self(b, b.panel, Count::candidates, run);
    choose_pivots(b, run);
    scale_accepted(b, run);
    project_out(b, b.scaled, Count::accepted, b.second, run);
    multiply_self(b, b.scaled, Count::accepted, run);
    factorise_again(b, run);
    extend_basis(b, run);
}

const char* wait(const Batch& b, Launches& run, int64_t& left) {
    run(count_left_kernel, dim3(1), kThreads, b);
    if (run.status == cudaSuccess)
        run.status =
            cudaMemcpyAsync(&left, b.left, sizeof(left), cudaMemcpyDeviceToHost, run.stream);
    if (run.status == cudaSuccess) run.status = cudaStreamSynchronize(run.stream);
    return run.failure();
}

}  // namespace

int64_t pivot_workspace_bytes(const PivotBatch& batch) {
    int64_t bytes;
    carve(batch, bytes);
    return bytes;
}

const char* launch_search_start(const PivotBatch& batch, int device, void* stream) {
    Launches run(device, stream);
    column_norms2(carve(batch), run);
    return run.failure();
}

const char* launch_search_round(const PivotBatch& batch, int device, void* stream, int64_t& left) {
    Launches run(device, stream);
    const Batch b = carve(batch);
    choose_candidates(b, run);
    take_candidates(b, run);
    project_accepted(b, run);
    run(lower_bounds_kernel, dim3(blocks_for(b.p.columns, kThreads), count_of(b)), kThreads, b);
    run(settle_kernel, dim3(count_of(b)), int(kCandidates), b);
    return wait(b, run, left);
}

const char* launch_search_finish(const PivotBatch& batch, int device, void* stream) {
    Launches run(device, stream);
    const Batch b = carve(batch);
    run(store_bounds_kernel, dim3(blocks_for(b.p.columns, kThreads), count_of(b)), kThreads, b);
    return run.failure();
}

const char* launch_factor_round(const PivotBatch& batch, int device, void* stream, int64_t& left) {
    Launches run(device, stream);
    const Batch b = carve(batch);
    take_given(b, run);
    take_candidates(b, run);
    run(triangle_kernel, dim3(static_cast<unsigned>(b.p.capacity), count_of(b)), int(kCandidates),
        b);
    run(settle_kernel, dim3(count_of(b)), int(kCandidates), b);
    return wait(b, run, left);
}

const char* launch_factor_finish(const PivotBatch& batch, const PivotFactors& out, int device,
                                 void* stream) {
    Launches run(device, stream);
    const Batch b = carve(batch);
    project_factors(b, out, run);
    const int64_t rows = b.p.rows > b.p.capacity ? b.p.rows : b.p.capacity;
    run(store_factors_kernel, dim3(static_cast<unsigned>(rows), count_of(b)), kThreads, b, out);
    return run.failure();
}

}  // namespace qrlora::cuda
