// Few tokens: the time is that of reading the weight once, and of starting kernels.
//
// The product with W needs nothing from the adapter, so on Hopper and later it starts while h is
// still being made (programmatic dependent launch) and waits for it only before its second phase.
// Sums are taken in a fixed order: the same inputs give the same bits.
#include <type_traits>

#include "decode_tile.cuh"
#include "launch.cuh"
#include "qrlora/cuda/decode.h"
#include "qrlora/cuda/ptx.cuh"

namespace qrlora::cuda {
namespace {

template <typename T>
__device__ __forceinline__ float gate_at(const Decode& p, int64_t i) {
    return p.gate_is_float ? static_cast<const float*>(p.gate)[i]
                           : float(static_cast<const T*>(p.gate)[i]);
}

// The block's tile entry of this thread, summed over its warps; threads 0-127 have one each.
__device__ __forceinline__ float reduce(const Sums& sums, int warp, int group, int slice) {
    __shared__ float tiles[kWarps][kRows][kCols];
    sums.store(tiles[warp], group, slice);
    __syncthreads();
    float total = 0.0f;
    if (threadIdx.x < kRows * kCols)
        for (int w = 0; w < kWarps; ++w)
            total += tiles[w][threadIdx.x / kCols][threadIdx.x % kCols];
    return total;
}

template <typename T>
Rows<T> rows_of(const void* data, int64_t rows, int64_t cols, int64_t stride) {
    const bool fast = reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride * sizeof(T) % 16 == 0;
    return {static_cast<const T*>(data), rows, cols, stride, fast};
}

// h may leave the range of half where y does not.
template <typename T>
using Hidden = std::conditional_t<std::is_same_v<T, __half>, float, T>;

// h = x Rᵀ and, with λ, mid = s h∘λ; 8 columns of h a block.
template <typename T>
__global__ void __launch_bounds__(kWarps * 32, 4)
    decode_in_kernel(const Decode p, const Rows<T> x, const Rows<T> r_factor) {
    ptx::let_next_kernel_start();
    const int warp = threadIdx.x / 32, group = threadIdx.x % 32 / 4, slice = threadIdx.x % 4;
    const int64_t first = int64_t(blockIdx.x) * kCols;
    __shared__ Ring ring;
    Sums sums;
    accumulate<true>(sums, ring, x, r_factor, first, warp, group, slice);
    const float h = reduce(sums, warp, group, slice);
    const int64_t m = threadIdx.x / kCols, j = first + threadIdx.x % kCols;
    if (m >= p.m || j >= p.r) return;
    static_cast<Hidden<T>*>(p.h)[m * p.r + j] = Hidden<T>(h);
    if (p.core)
        p.wide[m * p.r + j] = h;
    else
        static_cast<T*>(p.mid)[m * p.ldm + j] = T(p.scaling * gate_at<T>(p, j) * h);
}

// mid = s h C, 32 columns a block.
template <typename T>
__global__ void __launch_bounds__(512) decode_core_kernel(const Decode p) {
    ptx::let_next_kernel_start();
    ptx::wait_for_previous_kernel();
    const int64_t m = threadIdx.x / 32, j = int64_t(blockIdx.x) * 32 + threadIdx.x % 32;
    if (m >= p.m || j >= p.r) return;
    float total = 0.0f;
#pragma unroll 4
    for (int64_t i = 0; i < p.r; ++i) total += p.wide[m * p.r + i] * gate_at<T>(p, i * p.r + j);
    static_cast<T*>(p.mid)[m * p.ldm + j] = T(p.scaling * total);
}

// y = x Wᵀ + mid Qᵀ + b, one accumulator, one rounding; 8 columns of y a block.
template <typename T>
__global__ void __launch_bounds__(kWarps * 32, 4)
    decode_out_kernel(const Decode p, const Rows<T> x, const Rows<T> weight, const Rows<T> mid,
                      const Rows<T> q) {
    const int warp = threadIdx.x / 32, group = threadIdx.x % 32 / 4, slice = threadIdx.x % 4;
    const int64_t first = int64_t(blockIdx.x) * kCols;
    __shared__ Ring ring;
    Sums sums;
    accumulate<true>(sums, ring, x, weight, first, warp, group, slice);
    ptx::wait_for_previous_kernel();
    accumulate<false>(sums, ring, mid, q, first, warp, group, slice);
    float y = reduce(sums, warp, group, slice);
    const int64_t m = threadIdx.x / kCols, n = first + threadIdx.x % kCols;
    if (m >= p.m || n >= p.n) return;
    if (p.bias) y += float(static_cast<const T*>(p.bias)[n]);
    static_cast<T*>(p.y)[m * p.n + n] = T(y);
}

template <typename T>
cudaError_t launch_typed(const Decode& p, cudaStream_t stream, bool overlap) {
    const auto x = rows_of<T>(p.x, p.m, p.k, p.ldx);
    const auto weight = rows_of<T>(p.weight, p.n, p.k, p.ldw);
    const auto q = rows_of<T>(p.q, p.n, p.r, p.ldq);
    const auto r_factor = rows_of<T>(p.r_factor, p.r, p.k, p.ldr);
    const auto mid = rows_of<T>(p.mid, p.m, p.r, p.ldm);
    const int threads = kWarps * 32;
    cudaError_t status =
        launch(decode_in_kernel<T>, blocks_for(p.r, kCols), threads, stream, false, p, x, r_factor);
    if (status == cudaSuccess && p.core)
        status = launch(decode_core_kernel<T>, blocks_for(p.r, 32), 32 * kRows, stream, overlap, p);
    if (status == cudaSuccess)
        status = launch(decode_out_kernel<T>, blocks_for(p.n, kCols), threads, stream, overlap, p,
                        x, weight, mid, q);
    return status;
}

}  // namespace

const char* launch_decode(const Decode& problem, int device, void* stream) {
    const DeviceGuard guard(device);
    cudaError_t status = guard.status;
    int major = 0;
    if (status == cudaSuccess)
        status = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (status == cudaSuccess) {
        const auto on = static_cast<cudaStream_t>(stream);
        status = problem.dtype == DType::bf16 ? launch_typed<__nv_bfloat16>(problem, on, major >= 9)
                                              : launch_typed<__half>(problem, on, major >= 9);
    }
    if (status == cudaSuccess) status = cudaGetLastError();
    return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

}  // namespace qrlora::cuda
