// A matrix as Python hands it over: any dtype, any strides, not owned.
#pragma once

#include <cstdint>

#include "qrlora/dtype.h"

namespace qrlora {

struct MatrixView {
    const void* data;
    DType dtype;
    int64_t rows, columns;
    int64_t row_stride, column_stride;  // in elements
};

}  // namespace qrlora
