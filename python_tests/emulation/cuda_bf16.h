// CUDA's bf16 on the CPU; see cuda_runtime.h.
#pragma once

#include "qrlora/dtype.h"

struct __nv_bfloat16 {
    qrlora::bf16 value;
    __nv_bfloat16() = default;
    explicit __nv_bfloat16(float v) : value(qrlora::to_bf16(v)) {}
    operator float() const { return qrlora::to_float(value); }
};

inline __nv_bfloat16 __float2bfloat16(float value) { return __nv_bfloat16(value); }
