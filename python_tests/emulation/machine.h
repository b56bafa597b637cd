// The GPU that cuda_runtime.h runs device code on: fibers, blocks, kernels and their order.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

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
constexpr unsigned kLanes = 32;

enum class State { ready, at_barrier, at_warp, done };

// A copy to shared memory on its way.
struct Copy {
    void* to;
    const void* from;
};

struct Fiber {
    jmp_buf here;
    std::unique_ptr<char[]> stack;
    bool started = false;
    State state = State::done;
    const char* file = "";  // and line of the barrier at which it waits
    int line = 0;
    void* brought = nullptr;               // to the warp's instruction
    std::deque<std::vector<Copy>> copies;  // committed groups, the oldest first
    std::vector<Copy> uncommitted;
};

struct Machine {
    std::vector<Fiber> fibers;
    jmp_buf scheduler;
    unsigned current = 0;
    std::function<void()> body;
    std::exception_ptr failure;
};
inline Machine machine;
inline int schedule = 0;

inline Fiber& this_fiber() { return machine.fibers[machine.current]; }

// 0: ascending, 1: descending, other: shuffled with that seed. What may happen early or late
// (an asynchronous copy, a kernel that the next one overlaps) happens at once in 1, and otherwise
// as late as it may.
inline void set_schedule(int order) { schedule = order; }

inline std::vector<unsigned> order_of(size_t count) {
    std::vector<unsigned> order(count);
    std::iota(order.begin(), order.end(), 0u);
    if (schedule == 1) std::reverse(order.begin(), order.end());
    if (schedule > 1) std::shuffle(order.begin(), order.end(), std::mt19937(schedule));
    return order;
}

// Back to the scheduler, until it resumes this fiber.
inline void leave(Fiber& fiber) {
    if (_setjmp(fiber.here) == 0) _longjmp(machine.scheduler, 1);
    threadIdx = {machine.current, 0, 0};
}

inline void wait_at(State state, const char* file, int line) {
    Fiber& fiber = this_fiber();
    fiber.state = state;
    fiber.file = file;
    fiber.line = line;
    leave(fiber);
}

inline void barrier(const char* file, int line) { wait_at(State::at_barrier, file, line); }

// An instruction of the whole warp: the last lane to come does `work` with what the lanes brought.
template <typename Lane, typename Work>
inline void together(Lane& mine, const char* file, int line, const Work& work) {
    Fiber& fiber = this_fiber();
    const unsigned first = machine.current / kLanes * kLanes;
    fiber.brought = &mine;
    Lane* lanes[kLanes];
    for (unsigned i = 0; i < kLanes; ++i) {
        const unsigned thread = first + i;
        if (thread >= blockDim.x) throw std::runtime_error("a warp of less than 32 threads");
        const Fiber& lane = machine.fibers[thread];
        if (&lane != &fiber && lane.state != State::at_warp)
            return wait_at(State::at_warp, file, line);
        lanes[i] = static_cast<Lane*>(lane.brought);
    }
    work(lanes);
    for (unsigned i = 0; i < kLanes; ++i) machine.fibers[first + i].state = State::ready;
}

// As a GPU does where an access of 16 bytes is not aligned.
inline void* aligned16(const void* address) {
    if (reinterpret_cast<uintptr_t>(address) % 16) throw std::runtime_error("misaligned address");
    return const_cast<void*>(address);
}

// A fiber lives on: each resumption after its end runs the body of another block.
inline void live() {
    for (;;) {
        Fiber& fiber = this_fiber();
        try {
            machine.body();
        } catch (...) {
            machine.failure = std::current_exception();
        }
        fiber.state = State::done;
        leave(fiber);
    }
}

inline void add_fiber() {
    Fiber& fiber = machine.fibers.emplace_back();
    fiber.stack.reset(new char[kStack]);
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

[[noreturn]] inline void fail(std::exception_ptr failure) {
    machine = {};  // its fibers are in the middle of their work
    std::rethrow_exception(failure);
}

// Nobody can go on alone: all have to be at one barrier, or at their end.
inline void check_together(unsigned threads) {
    const Fiber& one = machine.fibers[0];
    for (unsigned i = 0; i < threads; ++i) {
        const Fiber& other = machine.fibers[i];
        const bool same = other.state == one.state && other.state != State::at_warp &&
                          (one.state == State::done || other.line == one.line);
        if (same) continue;
        const Fiber& waits =
            one.state == State::done || other.state == State::at_warp ? other : one;
        fail(std::make_exception_ptr(std::runtime_error("threads part at the barrier of " +
                                                        std::string(waits.file) + ":" +
                                                        std::to_string(waits.line))));
    }
}

inline void run_block(unsigned threads) {
    const std::vector<unsigned> order = order_of(threads);
    const auto release = [&] {
        for (unsigned i = 0; i < threads; ++i) machine.fibers[i].state = State::ready;
    };
    for (unsigned i = 0; i < threads; ++i) {
        machine.fibers[i].copies.clear();
        machine.fibers[i].uncommitted.clear();
    }
    for (release();;) {
        bool ran = false;
        for (unsigned i : order) {
            if (machine.fibers[i].state != State::ready) continue;
            ran = true;
            resume(i);
            if (machine.failure) fail(machine.failure);
        }
        if (ran) continue;
        check_together(threads);
        if (machine.fibers[0].state == State::done) return;
        release();
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

struct Launched {
    dim3 grid, block;
    std::function<void()> body;
};
inline std::vector<Launched> launched;  // and not yet run: each but the first may overlap

// The latest kernel runs first, up to where it waits for the one before it; see finish_previous.
inline void run_last() {
    const Launched last = std::move(launched.back());
    launched.pop_back();
    run_grid(last.grid, last.block, last.body);
}

inline void run_all() {
    try {
        while (!launched.empty()) run_last();
    } catch (...) {
        launched.clear();
        throw;
    }
}

// Within a kernel: the whole kernel before it.
inline void finish_previous() {
    if (launched.empty()) return;
    Machine waiting = std::move(machine);
    const auto [thread, block, size] = std::tuple(threadIdx, blockIdx, blockDim);
    machine = {};
    std::exception_ptr failure;
    try {
        run_last();
    } catch (...) {
        failure = std::current_exception();
    }
    machine = std::move(waiting);
    std::tie(threadIdx, blockIdx, blockDim) = std::tuple(thread, block, size);
    if (failure) std::rethrow_exception(failure);
}

}  // namespace emulation
