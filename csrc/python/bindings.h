// Each family of kernels registers its own functions on the module; module.cpp calls them all.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>

#include "qrlora/strided.h"

namespace qrlora {

// Pointers come from Python as integers.
template <typename T = void>
T* pointer(int64_t address) {
    return reinterpret_cast<T*>(static_cast<intptr_t>(address));
}

using Numbers = std::array<int64_t, 3>;  // address, row stride, column stride
inline Strided2d matrix(const Numbers& m) { return {pointer(m[0]), m[1], m[2]}; }

void bind_calls(pybind11::module_& m);
// The next two only where the CUDA part is built.
void bind_cuda(pybind11::module_& m);
void bind_cuda_linalg(pybind11::module_& m);
void bind_kron(pybind11::module_& m);
void bind_linalg(pybind11::module_& m);
void bind_linear_add(pybind11::module_& m);
void bind_low_rank(pybind11::module_& m);
void bind_panels(pybind11::module_& m);

}  // namespace qrlora
