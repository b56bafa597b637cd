// Runs device code on the CPU, to test it where there is no GPU: the sources of csrc/cuda include
// this in place of CUDA's own header and compile as plain C++.
//
// Every thread of a block is a fiber. Fibers run one at a time, in an order that set_schedule
// chooses, each until it reaches a barrier or its end; the next barrier interval begins when all
// have got there. Code whose result depends on that order has a race. A barrier that only some
// threads reach, or a launch beyond the grid limits of a GPU, is an error. It knows nothing of
// warps, memory spaces, alignment or speed.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__ static
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)
#define __syncthreads() emulation::barrier(__FILE__, __LINE__)

using std::isfinite;
using std::min;

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim;

namespace emulation {

constexpr size_t kStack = 128 << 10;

struct Fiber {
    jmp_buf here;
    std::unique_ptr<char[]> stack;
    bool started = false, done = true;
    const char* file = "";  // and line of the barrier at which it waits
    int line = 0;
};

struct Machine {
    std::vector<Fiber> fibers;
    jmp_buf scheduler;
    unsigned current = 0;
    int schedule = 0;
    std::function<void()> body;
};
inline Machine machine;

// 0: ascending, 1: descending, other: shuffled with that seed.
inline void set_schedule(int schedule) { machine.schedule = schedule; }

inline std::vector<unsigned> order_of(size_t count) {
    std::vector<unsigned> order(count);
    std::iota(order.begin(), order.end(), 0u);
    if (machine.schedule == 1) std::reverse(order.begin(), order.end());
    if (machine.schedule > 1)
        std::shuffle(order.begin(), order.end(), std::mt19937(machine.schedule));
    return order;
}

// Back to the scheduler, until it resumes this fiber.
inline void leave(Fiber& fiber) {
    if (_setjmp(fiber.here) == 0) _longjmp(machine.scheduler, 1);
    threadIdx = {machine.current, 0, 0};
}

inline void barrier(const char* file, int line) {
    Fiber& fiber = machine.fibers[machine.current];
    fiber.file = file;
    fiber.line = line;
    leave(fiber);
}

// A fiber lives on: each resumption after its end runs the body of another block.
inline void live() {
    for (;;) {
        Fiber& fiber = machine.fibers[machine.current];
        machine.body();
        fiber.done = true;
        leave(fiber);
    }
}

inline void add_fiber() {
    Fiber& fiber = machine.fibers.emplace_back();
    fiber.stack = std::make_unique<char[]>(kStack);
}

inline void resume(unsigned index) {
    Fiber& fiber = machine.fibers[index];
    machine.current = index;
    threadIdx = {index, 0, 0};
    if (_setjmp(machine.scheduler) != 0) return;
    if (fiber.started) _longjmp(fiber.here, 1);
    fiber.started = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = fiber.stack.get();
    context.uc_stack.ss_size = kStack;
    context.uc_link = nullptr;  // a fiber never returns
    makecontext(&context, live, 0);
    setcontext(&context);
}

inline void run_block(unsigned threads) {
    const std::vector<unsigned> order = order_of(threads);
    for (unsigned i = 0; i < threads; ++i) machine.fibers[i].done = false;
    for (bool running = true; running;) {
        for (unsigned i : order) resume(i);
        const Fiber& one = machine.fibers[0];
        running = !one.done;
        for (unsigned i = 1; i < threads; ++i) {
            const Fiber& other = machine.fibers[i];
            if (other.done == one.done && (one.done || other.line == one.line)) continue;
            const std::string where = one.done ? other.file : one.file;
            const int line = one.done ? other.line : one.line;
            machine.fibers.clear();
            throw std::runtime_error("threads part at the barrier of " + where + ":" +
                                     std::to_string(line));
        }
    }
}

inline bool fits(const dim3& grid, const dim3& block) {
    const auto within = [](unsigned size, unsigned most) { return 0 < size && size <= most; };
    return within(grid.x, 0x7fffffff) && within(grid.y, 65535) && within(grid.z, 65535) &&
           within(block.x, 1024) && block.y == 1 && block.z == 1;
}

inline void run_grid(const dim3& grid, const dim3& block, const std::function<void()>& body) {
    machine.body = body;
    machine.fibers.reserve(1024);  // fibers hold references to themselves
    while (machine.fibers.size() < block.x) add_fiber();
    blockDim = block;
    for (unsigned i : order_of(size_t(grid.x) * grid.y * grid.z)) {
        blockIdx = {i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y};
        run_block(block.x);
    }
}

}  // namespace emulation

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
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "invalid configuration argument"; }
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                                   cudaStream_t) {
    return std::memcpy(to, from, bytes), cudaSuccess;
}

namespace emulation {

inline cudaError_t launch(const cudaLaunchConfig_t& config, const std::function<void()>& body) {
    if (!fits(config.gridDim, config.blockDim)) return cudaErrorInvalidConfiguration;
    return run_grid(config.gridDim, config.blockDim, body), cudaSuccess;
}

}  // namespace emulation

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
    return emulation::launch(*config, [&] { kernel(arguments...); });
}
