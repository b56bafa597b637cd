// Threads of the native core; parallel regions are opened here and nowhere else. An exception that
// left a region would end the process, so memory is taken before one, and what a task throws is
// carried out of it.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "qrlora/cpu/buffer.h"

namespace qrlora {

// The first exception of a team.
class FirstError {
  public:
    // Runs work(), unless something failed already.
    template <class Work>
    void guard(const Work& work) noexcept {
        if (failed_.load(std::memory_order_relaxed)) return;
        try {
            work();
        } catch (...) {
            keep();
        }
    }
    // After the region, whose end has the others wait for who kept it.
    void rethrow() const {
        if (error_) std::rethrow_exception(error_);
    }

  private:
    void keep() noexcept;

    std::atomic<bool> failed_{false};
    std::exception_ptr error_;
};

// Uninitialised memory for each thread of a team. The calling thread keeps it for its next team,
// unless it is much.
class TeamScratch {
  public:
    TeamScratch(int threads, int64_t bytes_each);
    ~TeamScratch();
    TeamScratch(const TeamScratch&) = delete;
    TeamScratch& operator=(const TeamScratch&) = delete;
    unsigned char* of(int thread) { return memory_.data() + thread * stride_; }

  private:
    const int64_t stride_;
    const bool kept_;
    AlignedBuffer<unsigned char> memory_;
};

// A thread's view of the team that it works in.
class Team {
  public:
    Team(FirstError* error, unsigned char* scratch) : error_(error), scratch_(scratch) {}

    // Calls task(i) for 0 <= i < count, in equal stretches or first come, first served. Threads do
    // not wait for each other at its end.
    template <class Task>
    void for_static(int64_t count, const Task& task) const {
        if (!error_) return alone(count, task);
#pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < count; ++i) guarded(task, i);
    }
    template <class Task>
    void for_dynamic(int64_t count, const Task& task) const {
        if (!error_) return alone(count, task);
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t i = 0; i < count; ++i) guarded(task, i);
    }
    void barrier() const {
        if (!error_) return;
#pragma omp barrier
    }
    // This thread's scratch, aligned to a cache line.
    unsigned char* scratch() const { return scratch_; }

  private:
    // One copy of the task's code, whoever runs it.
    template <class Task>
    [[gnu::noinline]] static void run(const Task& task, int64_t i) {
        task(i);
    }
    template <class Task>
    static void alone(int64_t count, const Task& task) {
        for (int64_t i = 0; i < count; ++i) run(task, i);
    }
    template <class Task>
    void guarded(const Task& task, int64_t i) const noexcept {
        error_->guard([&] { run(task, i); });
    }

    FirstError* error_;  // null where the calling thread is alone, without a region
    unsigned char* scratch_;
};

// Calls body(team) on each thread of a team of up to `threads`, which have bytes_each of scratch.
// Throws before the team is woken, or after its end what one of its tasks threw. Outside of tasks
// the body must not throw: the others would wait for it at a barrier.
template <class Body>
void in_parallel(int threads, int64_t bytes_each, const Body& body) {
    TeamScratch scratch(threads, bytes_each);
    if (threads == 1) return body(Team(nullptr, scratch.of(0)));
    FirstError error;
#pragma omp parallel num_threads(threads)
    {
#ifdef _OPENMP
        const int thread = omp_get_thread_num();
#else
        const int thread = 0;
#endif
        body(Team(&error, scratch.of(thread)));
    }
    error.rethrow();
}

// Calls task(i) for 0 <= i < count on up to `threads` threads, first come, first served.
template <class Task>
void parallel_for(int threads, int64_t count, const Task& task) {
    in_parallel(count <= 1 ? 1 : threads, 0, [&](Team team) { team.for_dynamic(count, task); });
}

}  // namespace qrlora
