// The widest vector of the instruction set this translation unit is compiled for.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

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

// a0 b0 a1 b1 ... of the lower halves of two vectors, or from element FIRST on.
template <int FIRST, typename Vector, int... I>
inline Vector zipped(Vector a, Vector b, std::integer_sequence<int, I...>) {
    constexpr int L = sizeof...(I);
#if defined(__has_builtin) && __has_builtin(__builtin_shufflevector)
    return __builtin_shufflevector(a, b, (FIRST + I / 2 + (I % 2) * L)...);
#else
    return Vector{(I % 2 ? b : a)[FIRST + I / 2]...};
#endif
}

// r[i] holds row i of a square; on return it holds column i.
template <typename T>
inline void transpose(typename Vec<T>::type (&r)[Vec<T>::lanes]) {
    constexpr int lanes = Vec<T>::lanes;
    constexpr std::make_integer_sequence<int, lanes> indices;
    for (int64_t distance = 1; distance < lanes; distance *= 2) {
        typename Vec<T>::type t[lanes];
#pragma GCC unroll 16
        for (int64_t i = 0; i < lanes / 2; ++i) {
            t[2 * i] = zipped<0>(r[i], r[i + lanes / 2], indices);
            t[2 * i + 1] = zipped<lanes / 2>(r[i], r[i + lanes / 2], indices);
        }
#pragma GCC unroll 16
        for (int64_t i = 0; i < lanes; ++i) r[i] = t[i];
    }
}

// Columns of a scratch matrix are padded to whole vectors; the padding holds zeros or is not read.
template <typename T>
constexpr int64_t padded(int64_t columns) {
    return (columns + Vec<T>::lanes - 1) / Vec<T>::lanes * Vec<T>::lanes;
}

}  // namespace qrlora::QRLORA_ISA
