// CUDA's fp16 on the CPU; see cuda_runtime.h.
#pragma once

struct __half {
    _Float16 value;
    __half() = default;
    explicit __half(float v) : value(static_cast<_Float16>(v)) {}
    operator float() const { return static_cast<float>(value); }
};

inline __half __float2half(float value) { return __half(value); }
