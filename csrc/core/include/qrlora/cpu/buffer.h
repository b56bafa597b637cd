// Uninitialised, cache-line aligned memory that grows and is reused.
#pragma once

#include <sys/mman.h>

#ifdef QRLORA_SANITIZE
#include <sanitizer/asan_interface.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <utility>

namespace qrlora {

// Memory that is allocated and belongs to nobody: under AddressSanitizer, touching it is an error.
inline void close_off([[maybe_unused]] const void* from, [[maybe_unused]] int64_t bytes) {
#ifdef QRLORA_SANITIZE
    ASAN_POISON_MEMORY_REGION(from, static_cast<size_t>(bytes));
#endif
}
inline void open_up([[maybe_unused]] const void* from, [[maybe_unused]] int64_t bytes) {
#ifdef QRLORA_SANITIZE
    ASAN_UNPOISON_MEMORY_REGION(from, static_cast<size_t>(bytes));
#endif
}

// Uninitialised memory for free(). Large pages are asked for where it is much: a column of a matrix
// kept by rows is otherwise a page of its own for every element.
inline void* allocate(size_t size) {
    constexpr size_t line = 64, large_page = size_t(1) << 21, much = 4 * large_page;
    const size_t unit = size >= much ? large_page : line;
    const size_t bytes = (size + unit - 1) / unit * unit;
    void* data = std::aligned_alloc(unit, bytes);
    if (!data) throw std::bad_alloc();
    close_off(static_cast<char*>(data) + size, static_cast<int64_t>(bytes - size));
#ifdef MADV_HUGEPAGE
    if (unit == large_page) madvise(data, bytes, MADV_HUGEPAGE);
#endif
    return data;
}

template <class T>
class AlignedBuffer {
  public:
    AlignedBuffer() = default;
    AlignedBuffer(const AlignedBuffer&) = delete;
    AlignedBuffer& operator=(const AlignedBuffer&) = delete;
    AlignedBuffer(AlignedBuffer&& other) noexcept { swap(other); }
    AlignedBuffer& operator=(AlignedBuffer&& other) noexcept {
        swap(other);
        return *this;
    }
    ~AlignedBuffer() { std::free(data_); }

    // At least `count` elements; what was there before is lost if it has to grow.
    T* reserve(int64_t count) {
        if (count > count_) {
            std::free(data_);
            data_ = nullptr;
            count_ = 0;
            data_ = static_cast<T*>(allocate(static_cast<size_t>(count) * sizeof(T)));
            count_ = count;
        }
        restrict_to(count);
        return data_;
    }
    // At least `count` elements, of which the first `kept` stay what they are.
    T* grow(int64_t count, int64_t kept) {
        if (count > count_) move_to(std::max(count, 2 * count_), kept);
        restrict_to(count);
        return data_;
    }
    // Just `count` elements, all of them kept.
    void fit(int64_t count) {
        if (count < count_) move_to(count, count);
    }
    void swap(AlignedBuffer& other) noexcept {
        std::swap(data_, other.data_);
        std::swap(count_, other.count_);
    }
    T* data() { return data_; }
    const T* data() const { return data_; }

  private:
    // What is left of a larger request before is not this one's.
    void restrict_to(int64_t count) {
        constexpr auto size = static_cast<int64_t>(sizeof(T));
        open_up(data_, count * size);
        close_off(data_ + count, (count_ - count) * size);
    }
    void move_to(int64_t count, int64_t kept) {
        AlignedBuffer other;
        other.reserve(count);
        std::copy(data_, data_ + kept, other.data_);
        swap(other);
    }

    T* data_ = nullptr;
    int64_t count_ = 0;
};

// The calling thread's own scratch, kept for its next call, or `large` where it would be large.
template <class Scratch>
Scratch& scratch(Scratch& large, int64_t elements) {
    constexpr int64_t kept_elements = 1 << 20;
    thread_local Scratch kept;
    return elements <= kept_elements ? kept : large;
}

}  // namespace qrlora
