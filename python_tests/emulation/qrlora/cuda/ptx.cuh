// The PTX instructions of csrc/core/include/qrlora/cuda/ptx.cuh on the CPU; see cuda_runtime.h.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace qrlora::cuda::ptx {

// Every kernel is taken to let the next one start at once.
inline void let_next_kernel_start() {}

inline void wait_for_previous_kernel() { emulation::finish_previous(); }

// One lane's fragments of mma.m16n8k16. The PTX manual places, with group = lane / 4 and
// slice = lane % 4, two elements to a register, the lower half first:
//   a[i]: row group + 8 (i % 2), columns 2 slice + 8 (i / 2) and the next,
//   b[i]: rows 2 slice + 8 i and the next, column group,
//   c[i]: row group + 8 (i / 2), column 2 slice + i % 2.
struct Fragments {
    float (&c)[4];
    const uint32_t (&a)[4];
    const uint32_t b[2];
};

template <typename T>
float half_of(uint32_t pair, int i) {
    T values[2];
    std::memcpy(values, &pair, sizeof(pair));
    return float(values[i]);
}

// Products are exact in fp32, their sums are rounded one by one; a tensor core groups them.
template <typename T>
void multiply(Fragments* const (&lanes)[emulation::kLanes]) {
    float a[16][16], b[16][8];
    for (unsigned lane = 0; lane < emulation::kLanes; ++lane) {
        const unsigned group = lane / 4, slice = lane % 4;
        for (int half = 0; half < 2; ++half) {
            for (int i = 0; i < 4; ++i)
                a[group + 8 * (i % 2)][2 * slice + 8 * (i / 2) + half] =
                    half_of<T>(lanes[lane]->a[i], half);
            for (int i = 0; i < 2; ++i)
                b[2 * slice + 8 * i + half][group] = half_of<T>(lanes[lane]->b[i], half);
        }
    }
    for (unsigned lane = 0; lane < emulation::kLanes; ++lane)
        for (int i = 0; i < 4; ++i) {
            const unsigned row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
            for (int k = 0; k < 16; ++k) lanes[lane]->c[i] += a[row][k] * b[k][column];
        }
}

template <typename T>
void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, T) {
    Fragments mine{c, a, {b0, b1}};
    emulation::together(mine, __FILE__, __LINE__, multiply<T>);
}

inline void land(const emulation::Copy& copy) { std::memcpy(copy.to, copy.from, 16); }

// Lands at the wait for it or, in schedule 1, at once.
inline void copy16_async(void* shared, const void* global) {
    const emulation::Copy copy{emulation::aligned16(shared), emulation::aligned16(global)};
    if (emulation::schedule == 1) return land(copy);
    emulation::this_fiber().uncommitted.push_back(copy);
}

inline void commit_copies() {
    emulation::Fiber& fiber = emulation::this_fiber();
    fiber.copies.push_back(std::exchange(fiber.uncommitted, {}));
}

template <int kPending>
void wait_for_copies() {
    auto& groups = emulation::this_fiber().copies;
    for (; groups.size() > kPending; groups.pop_front())
        for (const emulation::Copy& copy : groups.front()) land(copy);
}

}  // namespace qrlora::cuda::ptx
