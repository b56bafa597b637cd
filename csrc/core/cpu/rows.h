// Moving tokens between memory (fp32, fp64, bf16) and padded scratch in the accumulation type.
#pragma once

#include "qrlora/dtype.h"
#include "vec.h"

namespace qrlora::QRLORA_ISA {

inline float widen(float v) { return v; }
inline double widen(double v) { return v; }
inline float widen(bf16 v) { return to_float(v); }

inline void narrow(float v, float& out) { out = v; }
inline void narrow(double v, double& out) { out = v; }
inline void narrow(float v, bf16& out) { out = to_bf16(v); }

// A token's [rows, columns] into scratch with rows ld apart, the padding set to zero.
template <typename E, typename T>
inline void load_rows(const E* from, int64_t rows, int64_t columns, T* to, int64_t ld) {
    for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < columns; ++j) to[i * ld + j] = widen(from[i * columns + j]);
        for (int64_t j = columns; j < ld; ++j) to[i * ld + j] = 0;
    }
}

template <typename E, typename T>
inline void store_rows(const T* from, int64_t ld, int64_t rows, int64_t columns, E* to) {
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < columns; ++j) narrow(from[i * ld + j], to[i * columns + j]);
}

}  // namespace qrlora::QRLORA_ISA
