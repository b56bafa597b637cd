// The pybind11 module qrlora_kernels._C. Kernels take raw pointers, int64 sizes and, on CUDA, a
// device and a stream; every check on shapes and dtypes is done in Python before the call.
#include "qrlora/bindings.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

namespace py = pybind11;

namespace {

// What this binary was built from and for; every value is a plain string.
std::map<std::string, std::string> build_config() {
    std::map<std::string, std::string> config{
        {"version", QRLORA_VERSION},
        {"cpu_kernels", QRLORA_ISAS},
        {"cuda", QRLORA_CUDA_NOTE},
#if defined(__clang__)
        {"compiler", "clang " __clang_version__},
#else
        {"compiler", "g++ " __VERSION__},
#endif
#ifdef _OPENMP
        {"openmp", std::to_string(_OPENMP)},
#else
        {"openmp", "none: one thread"},
#endif
    };
    return config;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Native kernels of qrlora_kernels (no torch dependency)";
    m.def("build_config", &build_config, "What this binary was built from and for");
    qrlora::bind_linalg(m);
    qrlora::bind_linear_add(m);
    qrlora::bind_kron(m);
    qrlora::bind_low_rank(m);
    qrlora::bind_direct(m);
#ifdef QRLORA_WITH_CUDA
    qrlora::bind_cuda(m);
    qrlora::bind_cuda_linalg(m);
#endif
}
