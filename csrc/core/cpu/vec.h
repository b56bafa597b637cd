// The widest vector of the instruction set this translation unit is compiled for.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#define QRLORA_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define QRLORA_VECTOR_BYTES 32
#else
#define QRLORA_VECTOR_BYTES 16
#endif

namespace qrlora::QRLORA_ISA {

template <typename T>
struct Vec {
    typedef T type __attribute__((vector_size(QRLORA_VECTOR_BYTES)));
    static constexpr int64_t lanes = QRLORA_VECTOR_BYTES / sizeof(T);
};

template <typename T>
inline typename Vec<T>::type load(const T* p) {
    typename Vec<T>::type v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

template <typename T>
inline void store(T* p, typename Vec<T>::type v) {
    std::memcpy(p, &v, sizeof v);
}

// Columns of a scratch matrix are padded to whole vectors; the padding holds zeros or is not read.
template <typename T>
constexpr int64_t padded(int64_t columns) {
    return (columns + Vec<T>::lanes - 1) / Vec<T>::lanes * Vec<T>::lanes;
}

}  // namespace qrlora::QRLORA_ISA
