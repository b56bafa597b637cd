// QR-LoRA and LoRA-XS on the tensors themselves: (weight, q, r, lam) or (weight, a, b, core).
#include "qrlora/cpu/low_rank.h"

#include "calls.h"
#include "choices.h"
#include "operands.h"
#include "qrlora/cpu/buffer.h"

namespace py = pybind11;

namespace qrlora {

namespace {

// The frozen operands and the gate; m, dtype and threads are the caller's.
bool operands(bool core, PyObject* const* frozen, PyObject* gate, PyObject* scaling, LowRank& d) {
    const auto w = read(frozen[0]), g = read(gate);
    if (!w || w->ndim != 2 || !g || g->ndim != (core ? 2 : 1) || !trainable(*g, d.dtype))
        return false;
    d.n = w->shape[0], d.k = w->shape[1], d.r = g->shape[0];
    if (d.n < 1 || d.k < 1 || d.r < 1 || (core && g->shape[1] != d.r)) return false;
    d.gate = g->data, d.gate_dtype = *dtype_of(*g), d.core = core;
    // Public order: (q [n, r], r [r, k]) for QR-LoRA, (a [r, k], b [n, r]) for LoRA-XS.
    return number(scaling, d.scaling) && matrix(*w, d.dtype, d.weight) &&
           matrix(frozen[core ? 1 : 2], d.dtype, d.r, d.k, d.down) &&
           matrix(frozen[core ? 2 : 1], d.dtype, d.n, d.r, d.up);
}

Runs who_runs(PyObject* x, Step step, const LowRank& d) {
    const auto operation = d.core ? Operation::lora_xs_linear : Operation::qr_linear;
    return choices->runs(x, {operation, step, d.dtype, d.m, d.n, d.k, d.r});
}

}  // namespace

py::object low_rank_forward_call(PyObject* const* args) {
    const bool core = args[0] == Py_True;
    PyObject *x = args[1], *gate = args[6];
    PyObject* const frozen[] = {args[2], args[4], args[5]};
    const auto given = read(x);
    if (!given || !in_plain_mode()) return py::none();
    LowRank d{};
    LowRankForward io{};
    int64_t columns = 0;
    bool record = false;
    d.dtype = *dtype_of(*given);
    if (!rows(*given, d.m, columns, io.x) || !operands(core, frozen, gate, args[7], d) ||
        columns != d.k || !bias(args[3], d.dtype, d.n, io.bias) ||
        !gradients_fit({frozen[0], frozen[1], frozen[2]}, {x, args[3], gate}, record))
        return py::none();
    const Runs runs = who_runs(x, Step::forward, d);
    if (runs == Runs::elsewhere) return py::none();
    if (runs == Runs::library) return py::bool_(record);
    d.threads = num_threads();
    const py::object y = new_like(x, *given, d.n);
    io.y = data(y);
    py::object h;
    AlignedBuffer<unsigned char> large;  // h, where nobody asks for it
    if (record) {
        h = new_matrix(x, d.m, d.r);
        io.h = data(h);
    } else {
        const int64_t bytes = d.m * d.r * bytes_of(d.dtype);
        io.h = scratch(large, bytes).reserve(bytes);
    }
    without_gil(d.m * d.n * d.k, [&] { low_rank_forward(d, io); });
    return record ? py::object(py::make_tuple(y, h)) : y;
}

py::object low_rank_backward_call(PyObject* const* args) {
    const bool core = args[0] == Py_True, need_dx = args[8] == Py_True;
    const bool need_dgate = args[9] == Py_True;
    PyObject *dy = args[1], *gate = args[5];
    const auto given = read(dy), h = read(args[6]);
    if (!given || !h || !in_plain_mode()) return py::none();
    LowRank d{};
    LowRankBackward io{};
    int64_t columns = 0;
    d.dtype = *dtype_of(*given);
    if (!rows(*given, d.m, columns, io.dy) || !operands(core, args + 2, gate, args[7], d) ||
        columns != d.n)
        return py::none();
    if (h->ndim != 2 || h->shape[0] != d.m || h->shape[1] != d.r || !is_contiguous(*h) ||
        dtype_of(*h) != d.dtype)
        return py::none();
    const Runs runs = who_runs(dy, Step::backward, d);
    if (runs == Runs::elsewhere) return py::none();
    if (runs == Runs::library) return py::bool_(false);
    d.threads = num_threads();
    io.h = h->data;
    py::object dx = py::none();
    if (need_dx) {
        dx = new_like(dy, *given, d.k);
        io.dx = data(dx);
    }
    Gradient dgate(need_dgate, gate);
    io.dgate = dgate.sums();
    without_gil(d.m * d.n * d.k, [&] { low_rank_backward(d, io); });
    return py::make_tuple(dx, dgate.finished());
}

}  // namespace qrlora
