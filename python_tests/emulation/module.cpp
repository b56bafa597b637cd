// The CUDA kernels as a module that runs on the CPU; see cuda_runtime.h.
#include <pybind11/stl.h>

#include "bindings.h"
#include "cuda_runtime.h"
#include "qrlora/cuda/ptx.cuh"

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

__global__ void half_a_warp_kernel() {
    float c[4] = {};
    const uint32_t a[4] = {};
    if (threadIdx.x < 16) qrlora::cuda::ptx::mma(c, a, 0, 0, __half(0.0f));
}

// The third of three copies is read before or after the wait for it.
__global__ void copies_kernel(int* out, const int* from, bool wait) {
    namespace ptx = qrlora::cuda::ptx;
    __shared__ uint4 to[3];
    if (threadIdx.x != 0) return;
    for (int i = 0; i < 3; ++i) {
        std::memset(&to[i], 0, sizeof(to[i]));
        ptx::copy16_async(&to[i], from + 4 * i);
        ptx::commit_copies();
    }
    if (wait)
        ptx::wait_for_copies<0>();
    else
        ptx::wait_for_copies<1>();
    std::memcpy(out, &to[2], sizeof(to[2]));
}

__global__ void misaligned_kernel(const int* from) {
    __shared__ uint4 to;
    qrlora::cuda::ptx::copy16_async(&to, from + 1);
}

__global__ void first_kernel(int* value) { *value = 1; }

__global__ void second_kernel(int* out, const int* value, bool wait) {
    if (wait) qrlora::cuda::ptx::wait_for_previous_kernel();
    *out = *value;
}

cudaError_t launch_on(dim3 grid, const std::function<void()>& body, bool overlap = false) {
    cudaLaunchConfig_t config;
    config.gridDim = grid;
    config.blockDim = dim3(kThreads);
    config.numAttrs = overlap ? 1 : 0;
    return emulation::launch(config, body);
}

void run_on(dim3 grid, const std::function<void()>& body) {
    launch_on(grid, body);
    emulation::run_all();
}

std::vector<int> neighbours(bool wait) {
    std::vector<int> out(kThreads);
    run_on(dim3(1), [&] { neighbour_kernel(out.data(), wait); });
    return out;
}

alignas(16) const int kValues[12] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12};

int copies(bool wait) {
    int out[4];
    run_on(dim3(1), [&] { copies_kernel(out, kValues, wait); });
    return out[3];
}

int two_kernels(bool wait) {
    int value = 0, out = 0;
    launch_on(dim3(1), [&] { first_kernel(&value); });
    launch_on(dim3(1), [&] { second_kernel(&out, &value, wait); }, true);
    emulation::run_all();
    return out;
}

}  // namespace

PYBIND11_MODULE(emulated, m) {
    qrlora::bind_cuda(m);
    qrlora::bind_cuda_linalg(m);
    m.def("set_schedule", &emulation::set_schedule,
          "Order of threads and blocks: 0 ascending, 1 descending, else shuffled with that seed; "
          "asynchronous work is done as late as it may be, in 1 at once");
    // Faults on purpose, which the emulation must notice.
    m.def("neighbours", &neighbours);
    m.def("copies", &copies);
    m.def("two_kernels", &two_kernels);
    m.def("half_a_barrier", [] { run_on(dim3(1), half_a_barrier_kernel); });
    m.def("half_a_warp", [] { run_on(dim3(1), half_a_warp_kernel); });
    m.def("misaligned", [] { run_on(dim3(1), [] { misaligned_kernel(kValues); }); });
    m.def("tall_grid", [] { return launch_on(dim3(1, 65536), [] {}) == cudaSuccess; });
}
