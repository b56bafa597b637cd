// Inside a round: pivots among the candidates by a pivoted Cholesky of their Gram matrix, one block
// of threads a matrix, one thread a candidate.
#include "pivot_batch.cuh"

namespace qrlora::cuda {
namespace {

constexpr int kThreads = kCandidates;

// Column `step` of the factor is kept as row `step`: threads read and write it side by side.
//   factor[step][i] = (gram[i][at] - sum over s < step of factor[s][at] factor[s][i]) / pivot
__device__ double factor_column(const double* gram, double* factor, int step, int at, int i,
                                double pivot) {
    double value = i < at ? gram[i * kCandidates + at] : gram[at * kCandidates + i];
#pragma unroll 4
    for (int s = 0; s < step; ++s)
        value -= factor[s * kCandidates + at] * factor[s * kCandidates + i];
    value /= pivot;
    factor[step * kCandidates + i] = value;
    return value;
}

// inverse(L)ᵀ of L[i][s] = factor[s][order[i]], thread j its column j, from the diagonal up. Null
// for the natural order.
__device__ void invert(const double* factor, const int* order, int count, double* inverse) {
    const int j = threadIdx.x;
    if (j >= count) return;
    const auto entry = [&](int s, int i) {
        return factor[s * kCandidates + (order ? order[i] : i)];
    };
    for (int i = count - 1; i >= 0; --i) {
        double value = i == j ? 1.0 : 0.0;
#pragma unroll 4
        for (int s = i + 1; s <= j; ++s) value -= entry(i, s) * inverse[s * kCandidates + j];
        inverse[i * kCandidates + j] = i > j ? 0.0 : value / entry(i, i);
    }
}

// What the step looks at; the same for all threads.
struct Pick {
    int at;
    int64_t column;
    double norm2, start2;  // now, and when the round began
};

enum class Verdict { take, stop, refresh, below_tau };

// No column outside the candidates can be ahead of this one.
__device__ bool certified(const PivotState& s, const Pick& pick) {
    if (pick.norm2 >= s.outside * (1 + kTie)) return true;
    return pick.norm2 >= s.outside * (1 - kTie) && pick.column < s.outside_column;
}

__device__ Verdict judge(const PivotState& s, const Pick& pick, int step, double tau,
                         double& floor2) {
    if ((step > 0 || s.phase != Phase::fresh) && !certified(s, pick))
        return step == 0 ? Verdict::refresh : Verdict::stop;
    if (pick.norm2 == kNone || pick.norm2 < kBlockDrop * pick.start2) return Verdict::stop;
    if (tau > 0) {
        if (s.found == 0 && step == 0) floor2 = tau * tau * pick.norm2;
        if (pick.norm2 <= floor2) return Verdict::below_tau;
    }
    return Verdict::take;
}

// Given pivots keep their order; a block ends where cancellation begins to matter.
__device__ Verdict judge_given(const Pick& pick, int step) {
    const bool kept = step == 0 ? pick.norm2 > 0 : pick.norm2 >= kBlockDrop * pick.start2;
    return kept ? Verdict::take : Verdict::stop;
}

// One candidate as thread i sees it.
struct Candidate {
    int64_t column;
    double start2, left2;
};

__device__ Candidate candidate_of(const Batch& b, int64_t matrix, int64_t count, bool given) {
    const int i = threadIdx.x;
    if (i >= count) return {b.p.columns, kNone, kNone};
    const int64_t column = b.candidates.of(matrix)[i];
    const double norm2 = b.gram.of(matrix)[i * kCandidates + i];
    const bool kept = given || independent(b, matrix, column, norm2);
    return {column, norm2, kept ? norm2 : kNone};
}

// The candidate with the largest norm², the lowest column in a tie; or the next that is given.
__device__ Pick pick_next(const Candidate& own, int step, bool given) {
    __shared__ double values[kThreads];
    __shared__ int places[kThreads];
    __shared__ Pick pick;
    const int i = threadIdx.x;
    int at = step;
    if (!given) {
        const double best = reduce<kThreads>(own.left2, values, Larger());
        // Rounding may leave less than nothing of every candidate.
        const double tied = best > 0 ? best * (1 - kTie) : best;
        at = reduce<kThreads>(own.left2 >= tied ? i : kThreads, places, Smaller());
    }
    if (i == at) pick = {at, own.column, own.left2, own.start2};
    __syncthreads();
    const Pick result = pick;
    __syncthreads();
    return result;
}

// Enters what the round found in the state; thread 0.
__device__ void conclude(PivotState& s, int taken, Verdict verdict, double floor2, double largest2,
                         bool given) {
    s.floor2 = floor2;
    if (given) {
        s.accepted = taken;
        if (taken == 0 || s.filled + taken == s.limit) s.phase = Phase::done;
        return;
    }
    s.found += taken;
    const bool last = verdict == Verdict::below_tau || s.found == s.limit;
    s.accepted = last ? 0 : taken;  // bounds that nothing reads any more stay as they are
    s.phase = last ? Phase::done : Phase::search;
    if (verdict == Verdict::refresh) {
        s.phase = Phase::refresh;
        s.cursor = 0;
        s.known2 = Larger()(largest2, 0.0);
        s.wide = 1;
    }
}

// Refresh: the norms that the candidates were recomputed for.
__device__ void enter_norms(const Batch& b, int64_t matrix, const PivotState& s,
                            const Candidate& own) {
    if (threadIdx.x < s.candidates) {
        set_exact(b, matrix, own.column, own.start2);
        b.alive.of(matrix)[own.column] = own.left2 != kNone;
    }
    if (threadIdx.x == 0 && s.cursor == b.p.columns) b.p.states[matrix].phase = Phase::fresh;
}

// Takes a pivot: its column of the factor, and what it leaves of this thread's candidate.
__device__ void take_pivot(const Batch& b, int64_t matrix, const PivotState& s, const Pick& pick,
                           int step, bool given, Candidate& own) {
    const int i = threadIdx.x;
    if (i < s.candidates) {
        const double value = factor_column(b.gram.of(matrix), b.factor.of(matrix), step, pick.at, i,
                                           sqrt(pick.norm2));
        own.left2 = i == pick.at ? kNone : own.left2 - value * value;
    }
    if (i == 0) {
        b.accepted.of(matrix)[step] = pick.at;
        if (!given) {
            const int64_t place = matrix * b.p.capacity + s.found + step;
            b.p.pivots[place] = pick.column;
            b.p.norms[place] = sqrt(pick.norm2);
        }
    }
    __syncthreads();
}

template <bool kGiven>
__global__ void __launch_bounds__(kThreads) choose_pivots_kernel(const Batch b) {
    __shared__ double values[kThreads];
    const int64_t matrix = blockIdx.x;
    const PivotState s = b.p.states[matrix];
    __syncthreads();  // every thread has read it before thread 0 writes
    if (s.candidates == 0) return;
    Candidate own = candidate_of(b, matrix, s.candidates, kGiven);
    if (!kGiven && s.phase == Phase::refresh) return enter_norms(b, matrix, s, own);
    const int64_t room = kGiven ? s.candidates : s.limit - s.found;
    const int most = Smaller()(room, s.candidates);
    double floor2 = s.floor2;
    Verdict verdict = Verdict::stop;
    int step = 0;
    for (; step < most; ++step) {
        const Pick pick = pick_next(own, step, kGiven);
        verdict = kGiven ? judge_given(pick, step) : judge(s, pick, step, b.p.tau, floor2);
        if (verdict != Verdict::take) break;
        take_pivot(b, matrix, s, pick, step, kGiven, own);
    }
    const double largest2 = reduce<kThreads>(own.left2, values, Larger());
    if (threadIdx.x < s.candidates) {
        b.left2.of(matrix)[threadIdx.x] = own.left2;
        b.known2.of(matrix)[threadIdx.x] = own.start2;
        // Candidates none of which is independent will never be.
        if (!kGiven && step == 0 && verdict == Verdict::stop) b.alive.of(matrix)[own.column] = 0;
    }
    if (threadIdx.x == 0) conclude(b.p.states[matrix], step, verdict, floor2, largest2, kGiven);
    invert(b.factor.of(matrix), b.accepted.of(matrix), step, b.inverse.of(matrix));
}

// The orthonormal columns to come are scaled · inverse(L)ᵀ with L Lᵀ the Gram of scaled.
__global__ void __launch_bounds__(kThreads) factorise_again_kernel(const Batch b) {
    __shared__ double diagonal;
    const int64_t matrix = blockIdx.x;
    const int count = b.p.states[matrix].accepted, i = threadIdx.x;
    double *gram = b.gram.of(matrix), *factor = b.again.of(matrix);
    for (int step = 0; step < count; ++step) {
        double value = 0.0;
        if (i >= step && i < count) value = factor_column(gram, factor, step, step, i, 1.0);
        if (i == step) diagonal = sqrt(value);
        __syncthreads();
        if (i >= step && i < count) factor[step * kCandidates + i] = value / diagonal;
        __syncthreads();
    }
    invert(factor, nullptr, count, b.inverse.of(matrix));
}

}  // namespace

void choose_pivots(const Batch& b, Launches& run) {
    const dim3 grid(static_cast<unsigned>(b.p.count));
    run(b.p.factors ? choose_pivots_kernel<true> : choose_pivots_kernel<false>, grid, kThreads, b);
}

void factorise_again(const Batch& b, Launches& run) {
    run(factorise_again_kernel, dim3(static_cast<unsigned>(b.p.count)), kThreads, b);
}

}  // namespace qrlora::cuda
