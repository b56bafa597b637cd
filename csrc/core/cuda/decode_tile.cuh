// One warp's share of out [16, 8] = a [16, K] b [8, K]ᵀ, in fp32.
//
// A lane is (group = lane / 4, slice = lane % 4). It reads 8 consecutive k of row `group` of b and
// of rows `group` and `group + 8` of a: 16-byte loads. A sum does not care which k sits in which
// slot of the tensor core's operand, as long as a and b agree, so these 8 values feed two m16n8k16
// products as they are: slots (2c, 2c+1) and (2c+8, 2c+9) of lane slice c hold its values 0-3, then
// 4-7.
#pragma once

#include <cstdint>

#include "qrlora/cuda/ptx.cuh"

namespace qrlora::cuda {

constexpr int kRows = 16;                    // tokens of a tile
constexpr int kCols = 8;                     // rows of b of a tile
constexpr int kStep = 32;                    // k of one step of a warp
constexpr int kWarps = 8;                    // warps of a block, which share out the steps
constexpr int kStages = 8;                   // steps of b in flight
constexpr int kVector = 8;                   // k of one lane in a step
constexpr int64_t kStride = kWarps * kStep;  // from one step of a warp to its next

// A matrix with contiguous rows; `fast` if every row starts on 16 bytes.
template <typename T>
struct Rows {
    const T* data;
    int64_t rows, cols, stride;
    bool fast;
};

// A row beyond the last gives the last again: its results go to entries that nobody stores.
template <typename T>
__device__ __forceinline__ const T* row_of(const Rows<T>& source, int64_t row) {
    return source.data + (row < source.rows ? row : source.rows - 1) * source.stride;
}

// 8 values of a row from column k on. kWhole: they exist and start on 16 bytes; otherwise zero
// beyond the last column. kFrozen: nothing writes them while this kernel runs.
template <bool kWhole, bool kFrozen, typename T>
__device__ __forceinline__ void load8(const T* row, int64_t k, int64_t cols, T (&out)[kVector]) {
    if constexpr (kWhole) {
        const uint4* from = reinterpret_cast<const uint4*>(row + k);
        *reinterpret_cast<uint4*>(out) = kFrozen ? __ldg(from) : *from;
    } else {
#pragma unroll
        for (int i = 0; i < kVector; ++i) out[i] = k + i < cols ? row[k + i] : T(0.0f);
    }
}

template <typename T>
__device__ __forceinline__ uint32_t pair(const T (&values)[kVector], int i) {
    return reinterpret_cast<const uint32_t*>(values)[i];
}

// A warp's sums, and where they belong in the tile.
struct Sums {
    float c[4] = {0.0f, 0.0f, 0.0f, 0.0f};

    template <typename T>
    __device__ __forceinline__ void add(const T (&low)[kVector], const T (&high)[kVector],
                                        const T (&right)[kVector]) {
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
            const uint32_t a[4] = {pair(low, i), pair(high, i), pair(low, i + 1),
                                   pair(high, i + 1)};
            ptx::mma(c, a, pair(right, i), pair(right, i + 1), T(0.0f));
        }
    }

    __device__ __forceinline__ void store(float (&tile)[kRows][kCols], int group, int slice) const {
        tile[group][2 * slice] = c[0];
        tile[group][2 * slice + 1] = c[1];
        tile[group + 8][2 * slice] = c[2];
        tile[group + 8][2 * slice + 1] = c[3];
    }
};

// Vectors of b on their way: each lane fills and reads its own entries, so no barrier is needed.
struct Ring {
    uint4 entries[kStages][kWarps * 32];

    __device__ __forceinline__ void fetch(int stage, const void* from, bool exists) {
        if (exists) ptx::copy16_async(&entries[stage][threadIdx.x], from);
        ptx::commit_copies();
    }

    // Wait for the oldest of kStages fetches.
    __device__ __forceinline__ uint4 take(int stage) const {
        ptx::wait_for_copies<kStages - 1>();
        return entries[stage][threadIdx.x];
    }
};

// Add this warp's steps of a [16, K] b [8 rows from first, K]ᵀ.
template <bool kFrozen, typename T>
__device__ __forceinline__ void accumulate(Sums& sums, Ring& ring, const Rows<T>& a,
                                           const Rows<T>& b, int64_t first, int warp, int group,
                                           int slice) {
    const T *low = row_of(a, group), *high = row_of(a, group + 8),
            *right = row_of(b, first + group);
    const int64_t begin = int64_t(warp) * kStep;
    int64_t whole = 0;  // steps whose vectors all exist and start on 16 bytes
    if (a.fast && b.fast && a.cols >= begin + kStep) whole = (a.cols - begin - kStep) / kStride + 1;
    alignas(16) T l[kVector], h[kVector], r[kVector];

    const int64_t k0 = begin + slice * kVector;
#pragma unroll
    for (int s = 0; s < kStages; ++s) ring.fetch(s, right + k0 + s * kStride, s < whole);
    for (int64_t step = 0; step < whole; step += kStages) {
#pragma unroll
        for (int s = 0; s < kStages; ++s) {
            const int64_t k = k0 + (step + s) * kStride;
            if (step + s < whole) {
                *reinterpret_cast<uint4*>(r) = ring.take(s);
                load8<true, kFrozen>(low, k, a.cols, l);
                load8<true, kFrozen>(high, k, a.cols, h);
                sums.add(l, h, r);
            }
            // After the product, which has read the entry that this fills again.
            ring.fetch(s, right + k + kStages * kStride, step + s + kStages < whole);
        }
    }
    for (int64_t base = begin + whole * kStride; base < a.cols; base += kStride) {
        load8<false, true>(right, base + slice * kVector, a.cols, r);
        load8<false, kFrozen>(low, base + slice * kVector, a.cols, l);
        load8<false, kFrozen>(high, base + slice * kVector, a.cols, h);
        sums.add(l, h, r);
    }
}

}  // namespace qrlora::cuda
