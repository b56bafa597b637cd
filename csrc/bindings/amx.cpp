// AMX products on the module: pointers come as integers, sizes and strides as int64, in elements.
#include "qrlora/cpu/amx.h"

#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <tuple>

#include "qrlora/bindings.h"

namespace py = pybind11;

namespace qrlora {

#ifdef QRLORA_WITH_AMX

namespace {

template <typename T>
T* pointer(int64_t address) {
    return reinterpret_cast<T*>(static_cast<intptr_t>(address));
}

// (address, row stride, column stride)
using PyMatrix = std::tuple<int64_t, int64_t, int64_t>;
using PyProduct = std::tuple<PyMatrix, PyMatrix, int64_t>;

amx::Product product(const PyProduct& p) {
    const auto& [a, b, depth] = p;
    return {{pointer<bf16>(std::get<0>(a)), std::get<1>(a), std::get<2>(a)},
            {pointer<bf16>(std::get<0>(b)), std::get<1>(b), std::get<2>(b)},
            depth};
}

void amx_gemm(int64_t m, int64_t n, const PyProduct& first, const std::optional<PyProduct>& second,
              int64_t bias, int64_t addend, int64_t column_scale, int64_t scaled, int64_t c,
              int64_t ldc, bool fp32_out, int threads) {
    if (!amx::available()) throw std::runtime_error("AMX is not available on this machine");
    const amx::Gemm g{m,
                      n,
                      {product(first), second ? product(*second) : amx::Product{}},
                      second ? 2 : 1,
                      pointer<bf16>(bias),
                      pointer<bf16>(addend),
                      pointer<float>(column_scale),
                      pointer<bf16>(scaled),
                      pointer<void>(c),
                      ldc,
                      fp32_out,
                      threads};
    py::gil_scoped_release release;
    amx::gemm(g);
}

void amx_column_dots(int64_t m, int64_t n, int64_t u, int64_t u_row, int64_t v, int64_t v_row,
                     float scale, int64_t out) {
    if (!amx::available()) throw std::runtime_error("AMX is not available on this machine");
    py::gil_scoped_release release;
    amx::column_dots(m, n, pointer<bf16>(u), u_row, pointer<bf16>(v), v_row, scale,
                     pointer<float>(out));
}

}  // namespace

#endif

void bind_amx(py::module_& m) {
    m.def("amx_available", &amx::available, "Whether bf16 products run on the AMX tile unit");
#ifdef QRLORA_WITH_AMX
    m.def("amx_gemm", &amx_gemm, "C = A0 B0 + A1 B1 + bias + addend; see qrlora/cpu/amx.h");
    m.def("amx_column_dots", &amx_column_dots, "scale sum_i (u * v)[i, :] in fp32");
#endif
}

}  // namespace qrlora
