// Vectors of fp32 and of pairs of bf16: a word holds two neighbours of a sum, the even one low.
#pragma once

#include <cstdint>
#include <cstring>

#include "../vec.h"
#include "qrlora/dtype.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace qrlora::QRLORA_ISA::half {

constexpr int64_t lanes = Vec<float>::lanes;
using Floats = Vec<float>::type;
using Words = Vec<uint32_t>::type;
typedef uint16_t Halves __attribute__((vector_size(QRLORA_VECTOR_BYTES / 2)));

template <typename To, typename From>
inline To bits_of(From v) {
    static_assert(sizeof(To) == sizeof(From));
    To bits;
    std::memcpy(&bits, &v, sizeof bits);
    return bits;
}

inline Halves load_halves(const bf16* p) {
    Halves v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

inline Floats even(Words pairs) { return bits_of<Floats>(pairs << 16); }
inline Floats odd(Words pairs) { return bits_of<Floats>(pairs & 0xffff0000u); }
inline Floats widen(Halves v) { return even(__builtin_convertvector(v, Words)); }

// To the nearest, ties to even; NaN stays NaN.
inline Halves narrow(Floats v) {
#if defined(__AVX512BF16__)
    return bits_of<Halves>(_mm512_cvtneps_pbh(v));
#else
    const auto bits = bits_of<Words>(v);
    const Words rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    const Words quiet = bits >> 16 | 0x40u;
    const auto is_nan = bits_of<Words>((bits & 0x7fffffffu) > 0x7f800000u);
    return __builtin_convertvector((quiet & is_nan) | (rounded & ~is_nan), Halves);
#endif
}

// `count` elements, at most a vector. A size that is known when it is compiled is no call.
template <typename T>
inline void copy_some(const T* from, int64_t count, T* to) {
    for (int64_t size = lanes; size > 0; size /= 2) {
        if (count < size) continue;
        std::memcpy(to, from, static_cast<size_t>(size) * sizeof(T));
        from += size, to += size, count -= size;
    }
}

// The first `count` elements, zeros behind them.
inline Halves load_some(const bf16* p, int64_t count) {
    if (count == lanes) return load_halves(p);
    bf16 some[lanes] = {};
    copy_some(p, count, some);
    return load_halves(some);
}

inline void store_halves(bf16* p, Halves v) { std::memcpy(p, &v, sizeof v); }

inline void store_some(bf16* p, Halves v, int64_t count) {
    if (count == lanes) return store_halves(p, v);
    bf16 some[lanes];
    store_halves(some, v);
    copy_some(some, count, p);
}

}  // namespace qrlora::QRLORA_ISA::half
