// The base product on the module: a matrix comes as (address, row stride, column stride).
#include "qrlora/cpu/linear_add.h"

#include <pybind11/stl.h>

#include <tuple>

#include "bindings.h"
#include "codes.h"

namespace py = pybind11;

namespace qrlora {

namespace {

using LinearAddShape = std::tuple<int64_t, int64_t, int64_t, int64_t, int>;  // m n k dtype threads

void linear_add(int64_t code, const LinearAddShape& shape, const Numbers& x, const Numbers& weight,
                int64_t bias, int64_t addend, int64_t y) {
    const auto [m, n, k, number, threads] = shape;
    const DType dtype = checked_dtype(number);
    const Column& column = column_of(code, {Operation::linear_add, dtype});
    const LinearAdd d{
        m,          n,      k, dtype, matrix(x), matrix(weight), pointer(bias), pointer(addend),
        pointer(y), threads};
    py::gil_scoped_release release;
    column.linear_add(d);
}

}  // namespace

void bind_linear_add(py::module_& m) {
    m.def("linear_add", &linear_add, "y = x Wᵀ + b + addend; see qrlora/cpu/linear_add.h");
}

}  // namespace qrlora
