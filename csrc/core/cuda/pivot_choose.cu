// Column norms, and the columns with the largest bounds: the candidates of a round.
#include "pivot_batch.cuh"

namespace qrlora::cuda {
namespace {

constexpr int kColumns = 256;  // of a block that works on columns
constexpr int kThreads = 512;  // of the block that chooses a matrix's candidates

template <typename W>
__device__ double weight_at(const PivotBatch& p, const W* w, int64_t row, int64_t column) {
    return convert<double>(w[row * p.row_stride + column * p.column_stride]);
}

template <typename W>
__global__ void __launch_bounds__(kColumns) part_norms2_kernel(const Batch b) {
    const int64_t column = int64_t(blockIdx.x) * kColumns + threadIdx.x, matrix = blockIdx.z;
    if (column >= b.p.columns) return;
    const W* w = static_cast<const W*>(b.p.matrices[matrix]);
    const int64_t first = blockIdx.y * kPartRows, last = min(first + kPartRows, b.p.rows);
    double sum = 0.0;
#pragma unroll 8
    for (int64_t row = first; row < last; ++row) {
        const double value = weight_at(b.p, w, row, column);
        sum += value * value;
    }
    b.partial.of(matrix)[blockIdx.y * b.p.columns + column] = sum;
}

__global__ void __launch_bounds__(kColumns) start_kernel(const Batch b) {
    const int64_t column = int64_t(blockIdx.x) * kColumns + threadIdx.x, matrix = blockIdx.y;
    if (column >= b.p.columns) return;
    double norm2 = 0.0;
    for (int64_t part = 0; part < b.parts; ++part)
        norm2 += b.partial.of(matrix)[part * b.p.columns + column];
    b.start2.of(matrix)[column] = b.norm2.of(matrix)[column] = norm2;
    b.noise2.of(matrix)[column] = norm2;
    b.slack.of(matrix)[column] = 4 * kEps64 * norm2;
    b.alive.of(matrix)[column] = norm2 > 0;
    if (!isfinite(norm2)) b.p.states[matrix].infinite = 1;  // every writer writes the same
}

// fp64 matrices make all their passes in fp64; a matrix with NaN or Inf is not searched.
__global__ void start_states_kernel(const Batch b) {
    const int64_t matrix = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (matrix >= b.p.count) return;
    PivotState& s = b.p.states[matrix];
    s.wide = b.p.dtype == DType::f64;
    if (s.infinite) s.phase = Phase::done;
}

// Orders columns by bound: the bits of doubles that are not negative ascend with them.
__device__ uint64_t key_of(const Batch& b, int64_t matrix, int64_t column) {
    const double value = bound(b, matrix, column);
    return value == kNone ? 0 : static_cast<uint64_t>(__double_as_longlong(value)) + 1;
}

// The columns of thread t: a segment, so that positions ascend with the threads.
struct Segment {
    int64_t first, last;
    __device__ explicit Segment(int64_t columns) {
        const int64_t each = (columns + kThreads - 1) / kThreads;
        first = min(int64_t(threadIdx.x) * each, columns);
        last = min(first + each, columns);
    }
};

// Sum of the values of the threads before this one.
__device__ uint64_t sum_before(uint64_t value, uint64_t* shared) {
    shared[threadIdx.x] = value;
    __syncthreads();
    for (unsigned distance = 1; distance < kThreads; distance *= 2) {
        const uint64_t before = threadIdx.x >= distance ? shared[threadIdx.x - distance] : 0;
        __syncthreads();
        shared[threadIdx.x] += before;
        __syncthreads();
    }
    const uint64_t result = shared[threadIdx.x] - value;
    __syncthreads();
    return result;
}

// The `wanted`-th largest key, digit by digit; `ties`: how many columns with that key belong to the
// `wanted` largest.
__device__ uint64_t select_key(const Batch& b, int64_t matrix, int64_t wanted, int64_t& ties) {
    __shared__ unsigned histogram[256];
    __shared__ uint64_t chosen;
    __shared__ int64_t remaining;
    uint64_t prefix = 0, mask = 0;
    if (threadIdx.x == 0) remaining = wanted;
    for (int shift = 56; shift >= 0; shift -= 8) {
        if (threadIdx.x < 256) histogram[threadIdx.x] = 0;
        __syncthreads();
        for (int64_t j = threadIdx.x; j < b.p.columns; j += kThreads) {
            const uint64_t key = key_of(b, matrix, j);
            if ((key & mask) == prefix) atomicAdd(&histogram[key >> shift & 255], 1u);
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            int digit = 255;
            while (digit > 0 && histogram[digit] < remaining) remaining -= histogram[digit--];
            chosen = prefix | static_cast<uint64_t>(digit) << shift;
        }
        __syncthreads();
        prefix = chosen;
        mask |= uint64_t(255) << shift;
    }
    ties = remaining;
    __syncthreads();
    return prefix;
}

// The largest bound that is not chosen, and the lowest column that has it up to a tie.
__device__ void find_outside(const Batch& b, int64_t matrix, const Segment& own, uint64_t key,
                             uint64_t ties_before, int64_t ties) {
    __shared__ double values[kThreads];
    __shared__ int64_t columns[kThreads];
    double largest = kNone;
    int64_t lowest = b.p.columns;
    for (int pass = 0; pass < 2; ++pass) {
        int64_t before = ties_before;
        for (int64_t j = own.first; j < own.last; ++j) {
            const uint64_t k = key_of(b, matrix, j);
            if (k == 0 || k > key || (k == key && before++ < ties)) continue;
            const double value = bound(b, matrix, j);
            if (pass == 0)
                largest = Larger()(largest, value);
            else if (value >= largest * (1 - kTie))
                lowest = Smaller()(lowest, j);
        }
        if (pass == 0) largest = reduce<kThreads>(largest, values, Larger());
    }
    lowest = reduce<kThreads>(lowest, columns, Smaller());
    if (threadIdx.x == 0) {
        b.p.states[matrix].outside = largest;
        b.p.states[matrix].outside_column = lowest;
    }
}

// Search: the kCandidates largest bounds, lowest columns first in a tie.
__device__ void choose_largest(const Batch& b, int64_t matrix, const Segment& own) {
    __shared__ uint64_t shared[kThreads];
    uint64_t alive = 0;
    for (int64_t j = threadIdx.x; j < b.p.columns; j += kThreads) alive += b.alive.of(matrix)[j];
    alive = reduce<kThreads>(alive, shared, Sum());
    PivotState& s = b.p.states[matrix];
    if (alive == 0) {
        if (threadIdx.x == 0) {
            s.deficient = 1;
            s.phase = Phase::done;
        }
        return;
    }
    const int64_t count = Smaller()(static_cast<int64_t>(alive), kCandidates);
    int64_t ties;
    const uint64_t key = select_key(b, matrix, count, ties);
    // Above the key in the upper half of the word, at the key in the lower.
    uint64_t own_counts = 0;
    for (int64_t j = own.first; j < own.last; ++j) {
        const uint64_t k = key_of(b, matrix, j);
        own_counts += (k > key ? uint64_t(1) << 40 : 0) + (k == key);
    }
    const uint64_t before = sum_before(own_counts, shared);
    int64_t above = before >> 40, tied = before & ((uint64_t(1) << 40) - 1);
    find_outside(b, matrix, own, key, tied, ties);
    for (int64_t j = own.first; j < own.last; ++j) {
        const uint64_t k = key_of(b, matrix, j);
        if (k > key || (k == key && tied < ties))
            b.candidates.of(matrix)[above + Smaller()(tied, ties)] = j;
        above += k > key;
        tied += k == key;
    }
    if (threadIdx.x == 0) s.candidates = count;
}

// Refresh: the next columns whose bound reaches known2.
__device__ void choose_competing(const Batch& b, int64_t matrix, const Segment& own) {
    __shared__ uint64_t shared[kThreads];
    PivotState& s = b.p.states[matrix];
    const double floor = s.known2 * (1 - kTie);
    const int64_t cursor = s.cursor;
    const auto competes = [&](int64_t j) { return j >= cursor && bound(b, matrix, j) >= floor; };
    uint64_t competing = 0;
    for (int64_t j = own.first; j < own.last; ++j) competing += competes(j);
    int64_t place = sum_before(competing, shared);
    const int64_t all = reduce<kThreads>(competing, shared, Sum());
    for (int64_t j = own.first; j < own.last; ++j) {
        if (!competes(j)) continue;
        if (place < kCandidates) b.candidates.of(matrix)[place] = j;
        if (place == kCandidates - 1 && all > kCandidates) s.cursor = j + 1;
        ++place;
    }
    if (threadIdx.x == 0) {
        s.candidates = Smaller()(all, kCandidates);
        if (all <= kCandidates) s.cursor = b.p.columns;
        if (all == 0) s.phase = Phase::fresh;
    }
}

__global__ void __launch_bounds__(kThreads) choose_candidates_kernel(const Batch b) {
    const int64_t matrix = blockIdx.x;
    PivotState& s = b.p.states[matrix];
    const Phase phase = s.phase;
    __syncthreads();
    if (threadIdx.x == 0) s.candidates = s.accepted = 0;
    __syncthreads();
    if (phase == Phase::done) return;
    const Segment own(b.p.columns);
    if (phase == Phase::refresh)
        choose_competing(b, matrix, own);
    else
        choose_largest(b, matrix, own);
}

__global__ void __launch_bounds__(kCandidates) take_given_kernel(const Batch b) {
    const int64_t matrix = blockIdx.x;
    PivotState& s = b.p.states[matrix];
    const int64_t left = s.phase == Phase::done ? 0 : s.limit - s.filled;
    const int64_t count = Smaller()(left, kCandidates);
    if (threadIdx.x < count)
        b.candidates.of(matrix)[threadIdx.x] =
            b.p.pivots[matrix * b.p.capacity + s.filled + threadIdx.x];
    if (threadIdx.x == 0) {
        s.candidates = count;
        s.accepted = 0;
    }
}

// panel = the candidates in fp64; a block takes kGatherRows rows, a thread one column.
constexpr int kGatherRows = 32;

template <typename W>
__global__ void __launch_bounds__(kCandidates) gather_kernel(const Batch b) {
    const int64_t matrix = blockIdx.y;
    if (threadIdx.x >= b.p.states[matrix].candidates) return;
    const W* w = static_cast<const W*>(b.p.matrices[matrix]);
    const int64_t column = b.candidates.of(matrix)[threadIdx.x];
    const int64_t first = int64_t(blockIdx.x) * kGatherRows;
    double* out = b.panel.of(matrix) + first * kCandidates + threadIdx.x;
    const int64_t rows = min(int64_t(kGatherRows), b.p.rows - first);
#pragma unroll 8
    for (int64_t i = 0; i < rows; ++i) out[i * kCandidates] = weight_at(b.p, w, first + i, column);
}

}  // namespace

void column_norms2(const Batch& b, Launches& run) {
    const auto matrices = static_cast<unsigned>(b.p.count);
    const unsigned across = blocks_for(b.p.columns, kColumns);
    with_type(b.p.dtype, [&](auto* type) {
        using W = std::remove_cv_t<std::remove_pointer_t<decltype(type)>>;
        run(part_norms2_kernel<W>, dim3(across, static_cast<unsigned>(b.parts), matrices), kColumns,
            b);
    });
    run(start_kernel, dim3(across, matrices), kColumns, b);
    run(start_states_kernel, dim3(blocks_for(b.p.count, kColumns)), kColumns, b);
}

void choose_candidates(const Batch& b, Launches& run) {
    run(choose_candidates_kernel, dim3(static_cast<unsigned>(b.p.count)), kThreads, b);
}

void take_given(const Batch& b, Launches& run) {
    run(take_given_kernel, dim3(static_cast<unsigned>(b.p.count)), int(kCandidates), b);
}

void gather_candidates(const Batch& b, Launches& run) {
    const dim3 grid(blocks_for(b.p.rows, kGatherRows), static_cast<unsigned>(b.p.count));
    with_type(b.p.dtype, [&](auto* type) {
        using W = std::remove_cv_t<std::remove_pointer_t<decltype(type)>>;
        run(gather_kernel<W>, grid, int(kCandidates), b);
    });
}

}  // namespace qrlora::cuda
