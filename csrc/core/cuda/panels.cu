// Products of fp64 panels: 64 x 64 tiles, 4 x 4 entries a thread, sums in a fixed order.
#include "pivot_batch.cuh"

namespace qrlora::cuda {
namespace {

constexpr int kTile = 64;
constexpr int kDepth = 16;
constexpr int kThreads = 256;
constexpr int kPadded = kTile + 2;  // spreads a column of the tile over the banks

// Entries of the tile that thread t holds: rows 4 (t / 16) + i; columns 2 (t % 16) + {0, 1} in
// both halves of the tile, so that a warp reads whole lines of shared memory.
__device__ inline int tile_row(int i) { return threadIdx.x / 16 * 4 + i; }
__device__ inline int tile_column(int j) {
    return j / 2 * (kTile / 2) + threadIdx.x % 16 * 2 + j % 2;
}

// Where thread t fetches its n-th entry of an operand: neighbours in a row of memory, which runs
// along the tile, or along the depth if kAlongDepth.
template <bool kAlongDepth>
struct Fetch {
    __device__ static int step(int n) {
        return kAlongDepth ? threadIdx.x % kDepth : threadIdx.x / kTile + n * (kThreads / kTile);
    }
    __device__ static int lane(int n) {
        return kAlongDepth ? threadIdx.x / kDepth + n * (kThreads / kDepth) : threadIdx.x % kTile;
    }
};

// sum[i][j] += sum over k < depth of a(k, row i) b(k, column j); a and b give zero out of range.
template <bool kAlongDepth, typename A, typename B>
__device__ void multiply_tile(int64_t depth, const A& a, const B& b, double (&sum)[4][4]) {
    constexpr int kEach = kDepth * kTile / kThreads;
    __shared__ __align__(16) double left[2][kDepth][kPadded], right[2][kDepth][kPadded];
    double next_left[kEach], next_right[kEach];
    for (int64_t begin = 0; begin < depth + kDepth; begin += kDepth) {
        const int stage = begin / kDepth % 2;
        if (begin < depth) {
#pragma unroll
            for (int n = 0; n < kEach; ++n) {
                next_left[n] = a(begin + Fetch<kAlongDepth>::step(n), Fetch<kAlongDepth>::lane(n));
                next_right[n] = b(begin + Fetch<false>::step(n), Fetch<false>::lane(n));
            }
        }
        if (begin > 0) {
#pragma unroll
            for (int k = 0; k < kDepth; ++k) {
                double x[4], y[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) x[i] = left[stage ^ 1][k][tile_row(i)];
#pragma unroll
                for (int j = 0; j < 4; ++j) y[j] = right[stage ^ 1][k][tile_column(j)];
#pragma unroll
                for (int i = 0; i < 4; ++i)
#pragma unroll
                    for (int j = 0; j < 4; ++j) sum[i][j] += x[i] * y[j];
            }
        }
        if (begin < depth) {
#pragma unroll
            for (int n = 0; n < kEach; ++n) {
                left[stage][Fetch<kAlongDepth>::step(n)][Fetch<kAlongDepth>::lane(n)] =
                    next_left[n];
                right[stage][Fetch<false>::step(n)][Fetch<false>::lane(n)] = next_right[n];
            }
        }
        __syncthreads();
    }
}

// partial[part] = aᵀ b over the rows of a part; block x is a tile, y a part, z a matrix.
__global__ void __launch_bounds__(kThreads)
    multiply_tn_kernel(const Batch b, Panel a, Count a_columns, Panel c, Count c_columns,
                       bool upper) {
    const int64_t matrix = blockIdx.z;
    const PivotState& s = b.p.states[matrix];
    const int64_t m = count_of(s, a_columns), n = count_of(s, c_columns);
    const int64_t i0 = blockIdx.x / 2 * kTile, j0 = blockIdx.x % 2 * kTile;
    if (i0 >= m || j0 >= n || (upper && i0 > j0)) return;
    const int64_t row0 = blockIdx.y * kPartRows;
    const int64_t rows = min(kPartRows, b.p.rows - row0);
    const double* left = a.of(matrix) + row0 * a.ld + i0;
    const double* right = c.of(matrix) + row0 * c.ld + j0;
    double sum[4][4] = {};
    multiply_tile<false>(
        rows, [&](int64_t k, int i) { return k < rows && i0 + i < m ? left[k * a.ld + i] : 0.0; },
        [&](int64_t k, int j) { return k < rows && j0 + j < n ? right[k * c.ld + j] : 0.0; }, sum);
    double* out = b.partial.of(matrix) + blockIdx.y * b.part_rows * kCandidates;
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int64_t row = i0 + tile_row(i), column = j0 + tile_column(j);
            if (row < m && column < n) out[row * kCandidates + column] = sum[i][j];
        }
}

// out = the sum of the parts, in order; block x holds two rows of kCandidates.
__global__ void __launch_bounds__(2 * kCandidates)
    add_parts_kernel(const Batch b, Panel out, Count rows, Count columns, bool upper) {
    const int64_t matrix = blockIdx.y;
    const PivotState& s = b.p.states[matrix];
    const int64_t i = blockIdx.x * 2 + threadIdx.x / kCandidates, j = threadIdx.x % kCandidates;
    if (i >= count_of(s, rows) || j >= count_of(s, columns)) return;
    if (upper && i / kTile > j / kTile) return;
    const double* from = b.partial.of(matrix) + i * kCandidates + j;
    double sum = 0.0;
    for (int64_t part = 0; part < b.parts; ++part) sum += from[part * b.part_rows * kCandidates];
    out.of(matrix)[i * out.ld + j] = sum;
}

void multiply_tn(const Batch& b, const Panel& a, Count a_columns, const Panel& c, Count c_columns,
                 const Panel& out, bool upper, Launches& run) {
    const int64_t most = a_columns == Count::filled ? b.p.capacity : kCandidates;
    const auto matrices = static_cast<unsigned>(b.p.count);
    run(multiply_tn_kernel,
        dim3(2 * blocks_for(most, kTile), static_cast<unsigned>(b.parts), matrices), kThreads, b, a,
        a_columns, c, c_columns, upper);
    run(add_parts_kernel, dim3(blocks_for(most, 2), matrices), int(2 * kCandidates), b, out,
        a_columns, c_columns, upper);
}

// c = a b, or c - a b if kSubtract. kAccepted: only the accepted columns of a, in their order.
// kNew: c begins behind the columns that the basis has. Block x is a strip of rows, y a half.
template <bool kSubtract, bool kAccepted, bool kNew>
__global__ void __launch_bounds__(kThreads)
    multiply_nn_kernel(const Batch b, Panel a, Count steps, Panel right, Panel c, Count columns) {
    const int64_t matrix = blockIdx.z;
    const PivotState& s = b.p.states[matrix];
    const int64_t depth = count_of(s, steps), n = count_of(s, columns);
    const int64_t i0 = int64_t(blockIdx.x) * kTile, j0 = int64_t(blockIdx.y) * kTile;
    if (depth == 0 || j0 >= n) return;
    const int64_t rows = b.p.rows - i0;
    const double* x = a.of(matrix) + i0 * a.ld;
    const double* y = right.of(matrix) + j0;
    const int* accepted = b.accepted.of(matrix);
    double sum[4][4] = {};
    multiply_tile<true>(
        depth,
        [&](int64_t k, int i) {
            if (k >= depth || i >= rows) return 0.0;
            return x[i * a.ld + (kAccepted ? accepted[k] : k)];
        },
        [&](int64_t k, int j) { return k < depth && j0 + j < n ? y[k * right.ld + j] : 0.0; }, sum);
    double* out = c.of(matrix) + i0 * c.ld + j0 + (kNew ? s.filled : 0);
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int64_t at = tile_row(i) * c.ld + tile_column(j);
            if (tile_row(i) < rows && j0 + tile_column(j) < n)
                out[at] = kSubtract ? out[at] - sum[i][j] : sum[i][j];
        }
}

dim3 strips(const Batch& b) {
    return dim3(blocks_for(b.p.rows, kTile), kCandidates / kTile, static_cast<unsigned>(b.p.count));
}

}  // namespace

void project_out(const Batch& b, const Panel& panel, Count columns, const Panel& coefficients,
                 Launches& run) {
    multiply_tn(b, b.basis, Count::filled, panel, columns, coefficients, false, run);
    run(multiply_nn_kernel<true, false, false>, strips(b), kThreads, b, b.basis, Count::filled,
        coefficients, panel, columns);
}

void multiply_self(const Batch& b, const Panel& panel, Count columns, Launches& run) {
    multiply_tn(b, panel, columns, panel, columns, b.gram, true, run);
}

void scale_accepted(const Batch& b, Launches& run) {
    run(multiply_nn_kernel<false, true, false>, strips(b), kThreads, b, b.panel, Count::accepted,
        b.inverse, b.scaled, Count::accepted);
}

void extend_basis(const Batch& b, Launches& run) {
    run(multiply_nn_kernel<false, false, true>, strips(b), kThreads, b, b.scaled, Count::accepted,
        b.inverse, b.basis, Count::accepted);
}

}  // namespace qrlora::cuda
