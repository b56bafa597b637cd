// Arrays laid out one behind the other in memory that somebody else owns.
#pragma once

#include <cstdint>

#include "qrlora/cpu/buffer.h"

namespace qrlora {

// Without memory it gives null pointers and counts.
class Arena {
  public:
    Arena() = default;
    explicit Arena(unsigned char* memory) : memory_(memory) {}

    // `count` elements, uninitialised and aligned to a cache line.
    template <class T>
    T* take(int64_t count) {
        const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
        unsigned char* from = memory_ ? memory_ + taken_ : nullptr;
        taken_ += (bytes + LINE - 1) / LINE * LINE + GAP;
        if (from) close_off(from + bytes, memory_ + taken_ - from - bytes);
        return reinterpret_cast<T*>(from);
    }
    int64_t taken() const { return taken_; }  // bytes

  private:
    static constexpr int64_t LINE = 64;
#ifdef QRLORA_SANITIZE
    static constexpr int64_t GAP = LINE;
#else
    static constexpr int64_t GAP = 0;
#endif
    unsigned char* memory_ = nullptr;
    int64_t taken_ = 0;
};

// Bytes that Set(arguments..., arena) takes: arrays whose constructor takes them and does no more.
template <class Set, class... Arguments>
int64_t arena_bytes(const Arguments&... arguments) {
    Arena counting;
    [[maybe_unused]] const Set set(arguments..., counting);
    return counting.taken();
}

}  // namespace qrlora
