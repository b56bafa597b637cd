// The calls on tensors; operands come in the order of the operations. Each answers None where
// somebody else has to take it, and NotImplemented where Python has not told who runs the problem.
#pragma once

#include <pybind11/pybind11.h>

namespace qrlora {

// (axes that a gate without index has, x, weight, bias, up, down, gate, index, scaling, None or the
// frozen operands in panels) -> y where there is nothing to record, else (y, h); for library
// products [choice, whether autograd must record].
pybind11::object low_rank_forward_call(PyObject* const* args);
// (dy, weight, up, down, gate, index, h, scaling, need_dx, need_dgate, None or those) -> (dx |
// None, dgate | None); for library products [choice].
pybind11::object low_rank_backward_call(PyObject* const* args);

// (x, weight, bias, a, b, a0, b0, scaling, None or W in panels, which the caller multiplies by) ->
// (y, the choice where the base product is still to be added to y, else None, whether autograd must
// record).
pybind11::object kron_forward_call(PyObject* const* args);
// (dy, x, weight, a, b, a0, b0, scaling, need_dx, need_da, need_db, None or that) -> (dx | None,
// da | None, db | None, the choice where the base product is still to be added to dx, else None).
pybind11::object kron_backward_call(PyObject* const* args);

inline pybind11::object not_told() {
    return pybind11::reinterpret_borrow<pybind11::object>(Py_NotImplemented);
}

// The GIL is given up where another thread could do something with the time.
template <typename Work>
void without_gil(int64_t multiplications, const Work& work) {
    constexpr int64_t long_enough = 1 << 18;  // some ten microseconds
    if (multiplications < long_enough) return work();
    pybind11::gil_scoped_release release;
    work();
}

}  // namespace qrlora
