#include "qrlora/cpu/parallel.h"

namespace qrlora {

namespace {

// Parts begin in pages of their own, which the thread that uses them is the first to touch.
constexpr int64_t PAGE = 4096;
// Bytes per thread that are kept: what the largest products of the tile unit need.
constexpr int64_t KEPT = int64_t(1) << 23;

AlignedBuffer<unsigned char>& kept() {
    thread_local AlignedBuffer<unsigned char> buffer;
    return buffer;
}

}  // namespace

void FirstError::keep() noexcept {
    if (!failed_.exchange(true)) error_ = std::current_exception();
}

// It is taken out of where it is kept as long as it is used: a task may open a team of its own.
TeamScratch::TeamScratch(int threads, int64_t bytes_each)
    : stride_((bytes_each + PAGE - 1) / PAGE * PAGE), kept_(bytes_each <= KEPT) {
    if (bytes_each == 0) return;
    if (kept_) memory_.swap(kept());
    memory_.reserve(threads * stride_);
    for (int thread = 0; thread < threads; ++thread) {
        close_off(of(thread) + bytes_each, stride_ - bytes_each);
    }
}

TeamScratch::~TeamScratch() {
    if (kept_ && memory_.data()) memory_.swap(kept());
}

}  // namespace qrlora
