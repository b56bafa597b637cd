// Element types as the Python side names them, and their conversions to float.
#pragma once

#include <cstdint>
#include <cstring>

namespace qrlora {

enum class DType : int64_t { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };

constexpr int64_t bytes_of(DType dtype) {
    return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
}

struct bf16 {
    uint16_t bits;
};

inline float to_float(bf16 v) {
    uint32_t u = static_cast<uint32_t>(v.bits) << 16;
    float f;
    std::memcpy(&f, &u, 4);
    return f;
}

// Round to nearest, ties to even; NaN stays NaN.
inline bf16 to_bf16(float f) {
    uint32_t u;
    std::memcpy(&u, &f, 4);
    if ((u & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((u >> 16) | 0x40)};
    return {static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1)) >> 16)};
}

}  // namespace qrlora
