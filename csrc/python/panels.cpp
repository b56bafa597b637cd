// Products by a matrix in panels on the module: a matrix comes as (address, row stride, column
// stride), panels as an address, both of the instruction set in use.
#include "qrlora/cpu/panels.h"

#include <pybind11/stl.h>

#include <tuple>

#include "bindings.h"
#include "codes.h"
#include "qrlora/cpu/table.h"

namespace py = pybind11;

namespace qrlora {

namespace {

using Shape = std::tuple<int64_t, int64_t, int64_t, int64_t, int>;  // m n k dtype threads

int64_t panel_elements(int64_t number, int64_t depth, int64_t columns) {
    const DType dtype = checked_dtype(number);
    return panel_kernels(dtype).elements(dtype, depth, columns);
}

void pack_panels(const Shape& shape, const Numbers& b, int64_t panels) {
    const auto [none, columns, depth, number, threads] = shape;
    const PackPanels d{depth, columns, checked_dtype(number), matrix(b), pointer(panels), threads};
    py::gil_scoped_release release;
    panel_kernels(d.dtype).pack(d);
}

void times_panels(const Shape& shape, const Numbers& x, int64_t panels, int64_t bias,
                  int64_t addend, int64_t y) {
    const auto [m, n, k, number, threads] = shape;
    const TimesPanels d{m,
                        n,
                        k,
                        checked_dtype(number),
                        matrix(x),
                        pointer(panels),
                        pointer(bias),
                        pointer(addend),
                        pointer(y),
                        threads};
    py::gil_scoped_release release;
    panel_kernels(d.dtype).times(d);
}

}  // namespace

void bind_panels(py::module_& m) {
    m.def("panel_elements", &panel_elements, "(dtype, depth, columns) -> elements of the panels");
    m.def("pack_panels", &pack_panels, "B [depth, columns] into panels; see qrlora/cpu/panels.h");
    m.def("times_panels", &times_panels, "y = x B + b + addend by panels of B");
}

}  // namespace qrlora
