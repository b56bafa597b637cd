// Each family of kernels registers its own functions on the module; bindings.cpp calls them all.
#pragma once

#include <pybind11/pybind11.h>

namespace qrlora {}  // namespace qrlora
