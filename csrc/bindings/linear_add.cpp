// The base product on the module: a matrix comes as (address, row stride, column stride).
#include "qrlora/cpu/linear_add.h"

#include <pybind11/stl.h>

#include <stdexcept>
#include <tuple>

#include "qrlora/bindings.h"
#include "qrlora/cpu/amx.h"
#include "qrlora/isa.h"

namespace py = pybind11;

namespace qrlora {

namespace {

using Problem = std::tuple<int64_t, int64_t, int64_t, int64_t, int>;  // m n k dtype threads

void call(const Problem& problem, const Numbers& x, const Numbers& weight, int64_t bias,
          int64_t addend, int64_t y) {
    const auto [m, n, k, dtype, threads] = problem;
    const LinearAdd d{m,
                      n,
                      k,
                      checked_dtype(dtype),
                      matrix(x),
                      matrix(weight),
                      pointer(bias),
                      pointer(addend),
                      pointer(y),
                      threads};
    py::gil_scoped_release release;
    linear_add(d);
}

#ifdef QRLORA_WITH_AMX
void on_tiles(const LinearAdd& d) {
    amx::Gemm g{};
    g.m = d.m;
    g.n = d.n;
    g.products[0] = {amx::matrix(d.x), amx::matrix(transposed(d.weight)), d.k};
    g.count = 1;
    g.bias = static_cast<const bf16*>(d.bias);
    g.addend = static_cast<const bf16*>(d.addend);
    g.c = d.y;
    g.ldc = d.n;
    g.threads = d.threads;
    amx::gemm(g);
}
#endif

}  // namespace

DType checked_dtype(int64_t number) {
    const auto dtype = static_cast<DType>(number);
    if (dtype == DType::bf16 && !amx::available())
        throw std::runtime_error("bf16 on the AMX tile unit: " + amx::obstacle());
    return dtype;
}

void linear_add(const LinearAdd& d) {
#ifdef QRLORA_WITH_AMX
    if (d.dtype == DType::bf16) return on_tiles(d);
#endif
    QRLORA_DISPATCH(linear_add, d);
}

void bind_linear_add(py::module_& m) {
    m.def("linear_add", &call, "y = x Wᵀ + b + addend; see qrlora/cpu/linear_add.h");
}

}  // namespace qrlora
