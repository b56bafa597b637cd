// AMX products on the module: pointers come as integers, sizes and strides as int64, in elements.
#include "qrlora/cpu/amx.h"

#include <pybind11/stl.h>

#include <stdexcept>
#include <tuple>

#include "qrlora/bindings.h"

namespace py = pybind11;

namespace qrlora {

#ifdef QRLORA_WITH_AMX

namespace {

// (address, row stride, column stride)
using PyMatrix = std::tuple<int64_t, int64_t, int64_t>;

amx::Matrix matrix(const PyMatrix& m) {
    return {pointer<bf16>(std::get<0>(m)), std::get<1>(m), std::get<2>(m)};
}

void amx_gemm(int64_t m, int64_t n, int64_t depth, const PyMatrix& a, const PyMatrix& b,
              int64_t bias, int64_t addend, int64_t c, int threads) {
    if (!amx::available()) throw std::runtime_error("AMX is not available on this machine");
    amx::Gemm g{};
    g.m = m;
    g.n = n;
    g.products[0] = {matrix(a), matrix(b), depth};
    g.count = 1;
    g.bias = pointer<bf16>(bias);
    g.addend = pointer<bf16>(addend);
    g.c = pointer(c);
    g.ldc = n;
    g.threads = threads;
    py::gil_scoped_release release;
    amx::gemm(g);
}

}  // namespace

#endif

void bind_amx(py::module_& m) {
    m.def("amx_available", &amx::available, "Whether bf16 products run on the AMX tile unit");
#ifdef QRLORA_WITH_AMX
    m.def("amx_gemm", &amx_gemm, "C = A B + bias + addend; see qrlora/cpu/amx.h");
#endif
}

}  // namespace qrlora
