// Each family of kernels registers its own functions on the module; bindings.cpp calls them all.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace qrlora {

// Pointers come from Python as integers.
template <typename T = void>
T* pointer(int64_t address) {
    return reinterpret_cast<T*>(static_cast<intptr_t>(address));
}

void bind_amx(pybind11::module_& m);
// The next two only where the CUDA part is built.
void bind_cuda(pybind11::module_& m);
void bind_cuda_linalg(pybind11::module_& m);
void bind_kron(pybind11::module_& m);
void bind_linalg(pybind11::module_& m);
void bind_low_rank(pybind11::module_& m);
void bind_low_rank_call(pybind11::module_& m);

}  // namespace qrlora
