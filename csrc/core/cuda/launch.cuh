// Launching kernels on a given device and stream, and remembering what failed.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace qrlora::cuda {

// Makes `device` current while it lives.
class DeviceGuard {
  public:
    explicit DeviceGuard(int device) : status(cudaGetDevice(&before_)) {
        if (status == cudaSuccess && before_ != device) status = cudaSetDevice(device);
    }
    ~DeviceGuard() {
        if (status == cudaSuccess) cudaSetDevice(before_);
    }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;
    cudaError_t status;

  private:
    int before_ = 0;
};

// `overlap`: may start before the kernel ahead of it in the stream has ended.
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, int threads, cudaStream_t stream,
                   bool overlap, const Arguments&... arguments) {
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.stream = stream;
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &attribute;
    config.numAttrs = overlap ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// A row of launches on one stream; after the first failure nothing more is launched.
class Launches {
  public:
    Launches(int device, void* on) : stream(static_cast<cudaStream_t>(on)), guard_(device) {
        status = guard_.status;
    }

    template <typename... Parameters, typename... Arguments>
    void operator()(void (*kernel)(Parameters...), dim3 grid, int threads,
                    const Arguments&... arguments) {
        if (status == cudaSuccess)
            status = launch(kernel, grid, threads, stream, false, arguments...);
    }

    // Null, or what failed.
    const char* failure() {
        if (status == cudaSuccess) status = cudaGetLastError();
        return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
    }

    const cudaStream_t stream;
    cudaError_t status;

  private:
    const DeviceGuard guard_;
};

inline unsigned blocks_for(int64_t work, int64_t per_block) {
    return static_cast<unsigned>((work + per_block - 1) / per_block);
}

}  // namespace qrlora::cuda
