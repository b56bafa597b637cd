// The calls themselves; operands come in the order of the public functions.
#pragma once

#include <pybind11/pybind11.h>

namespace qrlora {

// (core, x, weight, bias, q | a, r | b, gate, scaling) -> y; (y, h) where autograd must record; for
// library products whether it must; None.
pybind11::object low_rank_forward_call(PyObject* const* args);
// (core, dy, weight, q | a, r | b, gate, h, scaling, need_dx, need_dgate) -> (dx | None,
// dgate | None); False for library products; None.
pybind11::object low_rank_backward_call(PyObject* const* args);

// (x, weight, bias, a, b, a0, b0, scaling) -> (y, whether the base product is in it, whether
// autograd must record); None.
pybind11::object kron_forward_call(PyObject* const* args);
// (dy, x, weight, a, b, a0, b0, scaling, need_dx, need_da, need_db) -> (dx | None, da | None,
// db | None, whether the base product is in dx); None.
pybind11::object kron_backward_call(PyObject* const* args);

// The GIL is given up where another thread could do something with the time.
template <typename Work>
void without_gil(int64_t multiplications, const Work& work) {
    constexpr int64_t long_enough = 1 << 18;  // some ten microseconds
    if (multiplications < long_enough) return work();
    pybind11::gil_scoped_release release;
    work();
}

}  // namespace qrlora
