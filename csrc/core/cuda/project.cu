// One pass over the matrix: R = Qᵀ W for some columns of Q, in fp32 or fp64 FMAs.
//
// W is read in its own dtype and converted in registers, which is exact, so no product is rounded
// to TF32 or bf16. In fp32 every kFlush steps the sums move to a second set: a column that a pivot
// nearly repeats sums thousands of terms of one sign, and one long fp32 sum would lose digits that
// the bounds (see lower_bounds) rely on.
#include "pivot_batch.cuh"

namespace qrlora::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kDepth = 8;   // rows of W in a step
constexpr int kFlush = 32;  // steps
constexpr int kVector = 4;  // columns of W fetched at once

// T: type of the products. A thread has kBasis columns of Q by kColumns columns of W, a warp 32
// times the columns; the block's warps share the columns of W.
template <typename T>
struct Shape {
    static constexpr int kLanes = 16 / sizeof(T);  // of a 16-byte word
    static constexpr int kBasis = 2 * kLanes, kColumns = 2 * kLanes;
    static constexpr int kTileBasis = kWarps * kBasis, kTileColumns = 32 * kColumns;
    static constexpr int kFetches = kDepth * kTileColumns / kVector / kThreads;
    // Column j of lane l in the tile, so that a warp reads whole lines of shared memory.
    __device__ static int column(int j) {
        return j / kLanes * (kTileColumns / 2) + threadIdx.x % 32 * kLanes + j % kLanes;
    }
};
static_assert(Shape<double>::kTileBasis * kBasisTiles == kCandidates);

template <typename T>
struct Tiles {
    using S = Shape<T>;
    __align__(16) T basis[2][kDepth][S::kTileBasis];
    __align__(16) T weight[2][kDepth][S::kTileColumns];
};

template <typename W>
struct alignas(kVector * sizeof(W)) Vector {
    W values[kVector];
};

// A strip of columns of one matrix. `fast`: whole vectors may be read.
template <typename W>
struct Strip {
    const W* data;
    int64_t rows, columns, row_stride, column_stride;
    bool fast;

    __device__ Strip(const PivotBatch& p, int64_t matrix, int64_t first)
        : rows(p.rows),
          columns(p.columns - first),
          row_stride(p.row_stride),
          column_stride(p.column_stride) {
        data = static_cast<const W*>(p.matrices[matrix]) + first * column_stride;
        fast = column_stride == 1 && row_stride % kVector == 0 &&
               reinterpret_cast<uintptr_t>(data) % sizeof(Vector<W>) == 0;
    }

    __device__ __forceinline__ Vector<W> fetch(int64_t row, int column) const {
        const W* from = data + row * row_stride + column * column_stride;
        if (fast && row < rows && column + kVector <= columns)
            return *reinterpret_cast<const Vector<W>*>(from);
        Vector<W> out;
#pragma unroll
        for (int i = 0; i < kVector; ++i)
            out.values[i] = row < rows && column + i < columns ? from[i * column_stride] : W(0.0f);
        return out;
    }
};

// Columns of Q, `count` of them from the first of the tile.
struct BasisPart {
    const double* data;
    int64_t ld, rows, count;
    __device__ double at(int64_t row, int j) const {
        return row < rows && j < count ? data[row * ld + j] : 0.0;
    }
};

// A step on its way from memory to the tiles.
template <typename T, typename W>
struct Step {
    using S = Shape<T>;
    static constexpr int kBasisFetches = kDepth * S::kTileBasis / kThreads;
    static constexpr int kAcross = S::kTileColumns / kVector;
    Vector<W> weight[S::kFetches];
    T basis[kBasisFetches];

    __device__ __forceinline__ void fetch(const Strip<W>& w, const BasisPart& q, int64_t row) {
        const int t = threadIdx.x;
#pragma unroll
        for (int n = 0; n < S::kFetches; ++n)
            weight[n] = w.fetch(row + (t + n * kThreads) / kAcross, t % kAcross * kVector);
#pragma unroll
        for (int n = 0; n < kBasisFetches; ++n)
            basis[n] =
                static_cast<T>(q.at(row + (t + n * kThreads) / S::kTileBasis, t % S::kTileBasis));
    }

    __device__ __forceinline__ void put(Tiles<T>& tiles, int stage) const {
        const int t = threadIdx.x;
#pragma unroll
        for (int n = 0; n < S::kFetches; ++n)
#pragma unroll
            for (int i = 0; i < kVector; ++i)
                tiles.weight[stage][(t + n * kThreads) / kAcross][t % kAcross * kVector + i] =
                    convert<T>(weight[n].values[i]);
#pragma unroll
        for (int n = 0; n < kBasisFetches; ++n)
            tiles.basis[stage][(t + n * kThreads) / S::kTileBasis][t % S::kTileBasis] = basis[n];
    }
};

template <typename T>
struct Sums {
    using S = Shape<T>;
    T values[S::kBasis][S::kColumns] = {};

    __device__ __forceinline__ void add(const Tiles<T>& tiles, int stage, int group) {
#pragma unroll
        for (int k = 0; k < kDepth; ++k) {
            T q[S::kBasis], w[S::kColumns];
#pragma unroll
            for (int i = 0; i < S::kBasis; ++i) q[i] = tiles.basis[stage][k][group * S::kBasis + i];
#pragma unroll
            for (int j = 0; j < S::kColumns; ++j) w[j] = tiles.weight[stage][k][S::column(j)];
#pragma unroll
            for (int i = 0; i < S::kBasis; ++i)
#pragma unroll
                for (int j = 0; j < S::kColumns; ++j) values[i][j] += q[i] * w[j];
        }
    }

    __device__ __forceinline__ void take(Sums& other) {
#pragma unroll
        for (int i = 0; i < S::kBasis; ++i)
#pragma unroll
            for (int j = 0; j < S::kColumns; ++j) {
                values[i][j] += other.values[i][j];
                other.values[i][j] = T(0);
            }
    }
};

// The thread's part of R, of the warps' group `group` of columns of Q.
template <typename T, typename W>
__device__ Sums<T> project(const Strip<W>& w, const BasisPart& q, int group) {
    using S = Shape<T>;
    __shared__ Tiles<T> tiles;
    const bool works = group * S::kBasis < q.count;  // else it only fetches
    Sums<T> sums, total;
    Step<T, W> next;
    const int64_t steps = (w.rows + kDepth - 1) / kDepth;
    next.fetch(w, q, 0);
    next.put(tiles, 0);
    __syncthreads();
    for (int64_t step = 0; step < steps; ++step) {
        const int stage = step % 2;
        if (step + 1 < steps) next.fetch(w, q, (step + 1) * kDepth);
        if (works) {
            if constexpr (sizeof(T) == 4) {
                sums.add(tiles, stage, group);
                if (step % kFlush == kFlush - 1) total.take(sums);
            } else {
                total.add(tiles, stage, group);
            }
        }
        if (step + 1 < steps) next.put(tiles, stage ^ 1);
        __syncthreads();
    }
    if constexpr (sizeof(T) == 4) total.take(sums);
    return total;
}

// Sum over the warps of a value per column of the tile, in order; in the threads of the first warp.
template <typename T>
__device__ void add_warps(const double (&own)[Shape<T>::kColumns], int group, int64_t columns,
                          double* out) {
    using S = Shape<T>;
    __shared__ double parts[kWarps][S::kTileColumns];
#pragma unroll
    for (int j = 0; j < S::kColumns; ++j) parts[group][S::column(j)] = own[j];
    __syncthreads();
    for (int j = threadIdx.x; j < S::kTileColumns && j < columns; j += kThreads) {
        double sum = 0.0;
        for (int g = 0; g < kWarps; ++g) sum += parts[g][j];
        out[j] = sum;
    }
    __syncthreads();
}

// What the accepted columns of Q take from each column's norm², and add to its noise. Block x is a
// tile of the basis, so that neighbours read the same part of W.
template <typename T, typename W>
__global__ void __launch_bounds__(kThreads, 2) lower_kernel(const Batch b) {
    using S = Shape<T>;
    const int64_t matrix = blockIdx.z;
    const PivotState& s = b.p.states[matrix];
    const int64_t tile = blockIdx.x, column0 = int64_t(blockIdx.y) * S::kTileColumns;
    const int64_t first = tile * S::kTileBasis;
    if (first >= s.accepted || (s.wide != 0) != (sizeof(T) == 8)) return;
    const Strip<W> w(b.p, matrix, column0);
    const BasisPart q{b.basis.of(matrix) + s.filled + first, b.basis.ld, b.p.rows,
                      s.accepted - first};
    // Groups of columns that do not exist fall to another warp in every tile.
    const int group = (threadIdx.x / 32 + blockIdx.y) % kWarps;
    const Sums<T> sums = project<T>(w, q, group);
    double lowered[S::kColumns] = {}, noise[S::kColumns] = {};
    const int64_t pivot0 = matrix * b.p.capacity + s.found - s.accepted + first;
#pragma unroll
    for (int i = 0; i < S::kBasis; ++i) {
        const int place = group * S::kBasis + i;
        if (place >= q.count) break;
        const double norm = b.p.norms[pivot0 + place];
        const double growth = b.start2.of(matrix)[b.p.pivots[pivot0 + place]] / (norm * norm);
#pragma unroll
        for (int j = 0; j < S::kColumns; ++j) {
            const double square = static_cast<double>(sums.values[i][j]) * sums.values[i][j];
            lowered[j] += square;
            noise[j] += growth * square;
        }
    }
    const int64_t at = tile * b.p.columns + column0;
    add_warps<T>(lowered, group, w.columns, b.lowered.of(matrix) + at);
    add_warps<T>(noise, group, w.columns, b.noise.of(matrix) + at);
}

template <typename T, typename W>
__global__ void __launch_bounds__(kThreads, 2)
    project_kernel(const Batch b, const PivotFactors out) {
    using S = Shape<T>;
    const int64_t matrix = blockIdx.z;
    const PivotState& s = b.p.states[matrix];
    const int64_t column0 = int64_t(blockIdx.y) * S::kTileColumns;
    const int64_t first = int64_t(blockIdx.x) * S::kTileBasis;
    // Where every column is a pivot, the triangle is all of r.
    if (first >= s.filled || s.filled == b.p.columns) return;
    const Strip<W> w(b.p, matrix, column0);
    const BasisPart q{b.basis.of(matrix) + first, b.basis.ld, b.p.rows, s.filled - first};
    const int group = (threadIdx.x / 32 + blockIdx.y) % kWarps;
    const Sums<T> sums = project<T>(w, q, group);
    void* r = out.r[matrix];
#pragma unroll
    for (int i = 0; i < S::kBasis; ++i) {
        const int place = group * S::kBasis + i;
        if (place >= q.count) break;
        const int64_t at = (first + place) * b.p.columns + column0;
#pragma unroll
        for (int j = 0; j < S::kColumns; ++j)
            if (S::column(j) < w.columns) store(r, out.dtype, at + S::column(j), sums.values[i][j]);
    }
}

template <typename T>
dim3 tiles_of(const Batch& b, int64_t basis) {
    return dim3(blocks_for(basis, Shape<T>::kTileBasis),
                blocks_for(b.p.columns, Shape<T>::kTileColumns), static_cast<unsigned>(b.p.count));
}

}  // namespace

void project_accepted(const Batch& b, Launches& run) {
    with_type(b.p.dtype, [&](auto* type) {
        using W = std::remove_cv_t<std::remove_pointer_t<decltype(type)>>;
        if constexpr (!std::is_same_v<W, double>)
            run(lower_kernel<float, W>, tiles_of<float>(b, kCandidates), kThreads, b);
        run(lower_kernel<double, W>, tiles_of<double>(b, kCandidates), kThreads, b);
    });
}

void project_factors(const Batch& b, const PivotFactors& out, Launches& run) {
    with_type(b.p.dtype, [&](auto* type) {
        using W = std::remove_cv_t<std::remove_pointer_t<decltype(type)>>;
        using T = std::conditional_t<std::is_same_v<W, double>, double, float>;
        run(project_kernel<T, W>, tiles_of<T>(b, b.p.capacity), kThreads, b, out);
    });
}

}  // namespace qrlora::cuda
