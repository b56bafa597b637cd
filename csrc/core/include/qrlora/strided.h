// A matrix of a known element type where it lies, not owned.
#pragma once

#include <cstdint>

namespace qrlora {

// Element (i, j) lies at data[i * row + j * col]; of row and col at least one is 1.
struct Strided2d {
    const void* data;
    int64_t row, col;
};

inline Strided2d transposed(const Strided2d& m) { return {m.data, m.col, m.row}; }

}  // namespace qrlora
