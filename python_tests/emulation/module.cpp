// The CUDA pivoted QR as a module that runs on the CPU; see cuda_runtime.h.
#include <pybind11/stl.h>

#include "cuda_runtime.h"
#include "qrlora/bindings.h"

namespace {

constexpr unsigned kThreads = 64;

// Every thread reads its neighbour's value; without the barrier it may come before the neighbour.
__global__ void neighbour_kernel(int* out, bool wait) {
    __shared__ int values[kThreads];
    values[threadIdx.x] = 0;
    __syncthreads();
    values[threadIdx.x] = threadIdx.x + 1;
    if (wait) __syncthreads();
    out[threadIdx.x] = values[(threadIdx.x + 1) % kThreads];
}

__global__ void half_a_barrier_kernel() {
    if (threadIdx.x < kThreads / 2) __syncthreads();
}

cudaError_t launch_on(dim3 grid, const std::function<void()>& body) {
    cudaLaunchConfig_t config;
    config.gridDim = grid;
    config.blockDim = dim3(kThreads);
    return emulation::launch(config, body);
}

std::vector<int> neighbours(bool wait) {
    std::vector<int> out(kThreads);
    launch_on(dim3(1), [&] { neighbour_kernel(out.data(), wait); });
    return out;
}

}  // namespace

PYBIND11_MODULE(emulated, m) {
    qrlora::bind_cuda_linalg(m);
    m.def("set_schedule", &emulation::set_schedule,
          "Order of threads and blocks: 0 ascending, 1 descending, else shuffled with that seed");
    // Faults on purpose, which the emulation must notice.
    m.def("neighbours", &neighbours);
    m.def("half_a_barrier", [] { launch_on(dim3(1), half_a_barrier_kernel); });
    m.def("tall_grid", [] { return launch_on(dim3(1, 65536), [] {}) == cudaSuccess; });
}
