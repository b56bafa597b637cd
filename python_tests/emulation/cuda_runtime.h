// Runs device code on the CPU, to test it where there is no GPU: the sources of csrc/core/cuda
// include this in place of CUDA's own header and compile as plain C++.
//
// Every thread of a block is a fiber. Fibers run one at a time, in an order that set_schedule
// chooses, each until it reaches a barrier, an instruction of the whole warp or its end; the next
// barrier interval begins when all have got there. Code whose result depends on that order has a
// race. A barrier that only some threads reach, or a launch beyond the grid limits of a GPU, is an
// error. Kernels that may overlap do: see run_last. It knows nothing of memory spaces or speed, and
// of alignment only that of 16-byte accesses.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "machine.h"

#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__ static
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)
#define __syncthreads() emulation::barrier(__FILE__, __LINE__)

using std::isfinite;
using std::min;

// 16 bytes, read and written at once.
struct uint4 {
    uint32_t x, y, z, w;
    uint4() = default;
    uint4(const uint4& other) { std::memcpy(this, emulation::aligned16(&other), 16); }
    uint4& operator=(const uint4& other) {
        std::memcpy(emulation::aligned16(this), emulation::aligned16(&other), 16);
        return *this;
    }
};

template <typename T>
T __ldg(const T* from) {
    return *from;
}

inline unsigned atomicAdd(unsigned* at, unsigned value) {
    const unsigned before = *at;
    *at += value;
    return before;
}

inline long long __double_as_longlong(double value) {
    long long bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return bits;
}

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor = 75 };
enum cudaMemcpyKind { cudaMemcpyDeviceToHost = 2 };
enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization = 6 };
using cudaStream_t = void*;

struct cudaLaunchAttribute {
    cudaLaunchAttributeID id;
    struct {
        int programmaticStreamSerializationAllowed;
    } val;
};
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes = 0;
    cudaStream_t stream = nullptr;
    cudaLaunchAttribute* attrs = nullptr;
    unsigned numAttrs = 0;
};

inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
    return *value = 9, cudaSuccess;
}
// The host asks for errors at the end of a row of launches: from there on their results are read.
inline cudaError_t cudaGetLastError() { return emulation::run_all(), cudaSuccess; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaGetLastError(); }
inline const char* cudaGetErrorString(cudaError_t) { return "invalid configuration argument"; }
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                                   cudaStream_t) {
    emulation::run_all();
    return std::memcpy(to, from, bytes), cudaSuccess;
}

namespace emulation {

inline cudaError_t launch(const cudaLaunchConfig_t& config, std::function<void()> body) {
    if (!fits(config.gridDim, config.blockDim)) return run_all(), cudaErrorInvalidConfiguration;
    if (config.numAttrs == 0 || schedule == 1) run_all();
    launched.push_back({config.gridDim, config.blockDim, std::move(body)});
    return cudaSuccess;
}

}  // namespace emulation

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
    return emulation::launch(*config, [=] { kernel(arguments...); });
}
