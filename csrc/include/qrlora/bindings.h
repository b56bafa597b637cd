// Each family of kernels registers its own functions on the module; bindings.cpp calls them all.
#pragma once

#include <pybind11/pybind11.h>

namespace qrlora {

void bind_amx(pybind11::module_& m);
void bind_cuda(pybind11::module_& m);  // only where the CUDA part is built
void bind_kron(pybind11::module_& m);
void bind_linalg(pybind11::module_& m);

}  // namespace qrlora
