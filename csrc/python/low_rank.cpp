// The gated low-rank operation on the module: on addresses, where a matrix comes as (address, row
// stride, column stride), and on the tensors themselves.
#include "qrlora/cpu/low_rank.h"

#include <pybind11/stl.h>

#include <tuple>

#include "bindings.h"
#include "calls.h"
#include "operands.h"
#include "plans.h"
#include "qrlora/cpu/buffer.h"

namespace py = pybind11;

namespace qrlora {

namespace {

// --- on addresses

using GateArgs = std::tuple<int64_t, int64_t, bool, double>;  // address, dtype, core, scaling
using LowRankShape =
    std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int>;  // m n k r dtype threads
using PanelArgs = std::tuple<int64_t, int64_t, int64_t>;           // of LowRankPanels
constexpr PanelArgs no_panels{0, 0, 0};

LowRank low_rank(const LowRankShape& shape, const Numbers& weight, const Numbers& down,
                 const Numbers& up, const GateArgs& gate, int64_t index, int64_t adapters,
                 const PanelArgs& panels) {
    const auto [m, n, k, r, dtype, threads] = shape;
    const auto [base, into, out] = panels;
    const auto [address, gate_dtype, core, scaling] = gate;
    return {m,
            n,
            k,
            r,
            checked_dtype(dtype),
            matrix(weight),
            matrix(down),
            matrix(up),
            pointer(address),
            checked_dtype(gate_dtype),
            core,
            pointer<const int64_t>(index),
            adapters,
            scaling,
            threads,
            {pointer(base), pointer(into), pointer(out)}};
}

const Column& column_for(int64_t code, const LowRank& d) {
    return column_of(code, {Operation::low_rank, d.dtype, d.index != nullptr});
}

void low_rank_forward(int64_t code, const LowRankShape& shape, const Numbers& x,
                      const Numbers& weight, const Numbers& down, const Numbers& up,
                      const GateArgs& gate, int64_t bias, int64_t y, int64_t h, int64_t index,
                      int64_t adapters, const PanelArgs& panels) {
    const LowRank d = low_rank(shape, weight, down, up, gate, index, adapters, panels);
    const LowRankForward io{matrix(x), pointer(bias), pointer(y), pointer(h)};
    const Column& column = column_for(code, d);
    py::gil_scoped_release release;
    column.low_rank_forward(d, io);
}

void low_rank_backward(int64_t code, const LowRankShape& shape, const Numbers& dy,
                       const Numbers& weight, const Numbers& down, const Numbers& up,
                       const GateArgs& gate, int64_t h, int64_t dx, int64_t dgate, int64_t index,
                       int64_t adapters, const PanelArgs& panels) {
    const LowRank d = low_rank(shape, weight, down, up, gate, index, adapters, panels);
    const LowRankBackward io{matrix(dy), pointer(h), pointer(dx), pointer(dgate)};
    const Column& column = column_for(code, d);
    py::gil_scoped_release release;
    column.low_rank_backward(d, io);
}

// --- on tensors

// The gate, and with an index each row's of several; m and dtype are the caller's.
bool read_gate(PyObject* gate, PyObject* index, const dlpack::Tensor& tokens, LowRank& d) {
    const auto g = read(gate);
    const int axes = index == Py_None ? 0 : 1;
    if (!g || !trainable(*g, d.dtype) || (g->ndim != axes + 1 && g->ndim != axes + 2)) return false;
    d.gate = g->data, d.gate_dtype = *dtype_of(*g);
    d.core = g->ndim == axes + 2;
    d.r = g->shape[axes];
    d.adapters = axes ? g->shape[0] : 1;
    if (axes && d.adapters == 1) return false;  // Python takes it as a gate without an index
    if (d.r < 1 || (d.core && g->shape[axes + 1] != d.r)) return false;
    return !axes || adapter_index(index, tokens, d.m, d.adapters, d.index);
}

// The frozen operands. Of the factors the first r columns and rows count: they may be wider.
bool read_factors(PyObject* weight, PyObject* up, PyObject* down, LowRank& d) {
    const auto w = read(weight), u = read(up), v = read(down);
    if (!w || !u || !v || w->ndim != 2 || u->ndim != 2 || v->ndim != 2) return false;
    d.n = w->shape[0], d.k = w->shape[1];
    return d.n > 0 && d.k > 0 && u->shape[0] == d.n && v->shape[1] == d.k &&
           u->shape[1] == v->shape[0] && u->shape[1] >= d.r && matrix(*w, d.dtype, d.weight) &&
           matrix(*u, d.dtype, d.up) && matrix(*v, d.dtype, d.down);
}

// The frozen operands in panels, of which those of a mixed batch have no kernel.
bool read_panels(PyObject* kept, LowRank& d) {
    return panels(kept, d.panels) && !(d.panels.base && d.index);
}

Gate gate_of(const LowRank& d) {
    if (d.index) return d.core ? Gate::mixed_core : Gate::mixed_vector;
    return d.core ? Gate::core : Gate::vector;
}

std::optional<Plan> plan_for(const LowRank& d, Step step, int64_t needs, bool bias) {
    const int64_t layout = d.panels.base ? 2 : d.weight.col != 1;
    return plans->find(
        {Operation::low_rank, step, d.dtype, d.m, d.n, d.k, d.r, gate_of(d), layout, needs, bias},
        d.threads);
}

py::object library(std::initializer_list<py::object> answers) {
    py::list list;
    for (const py::object& answer : answers) list.append(answer);
    return list;
}

}  // namespace

py::object low_rank_forward_call(PyObject* const* args) {
    const auto [axes, x, weight, bias_of, up, down, gate, index, scaling, kept] = std::array{
        args[0], args[1], args[2], args[3], args[4], args[5], args[6], args[7], args[8], args[9]};
    if (!in_plain_mode()) return py::none();  // before anything asks a tensor, which a mode hears
    const auto given = read(x);
    if (!given) return py::none();
    LowRank d{};
    LowRankForward io{};
    int64_t columns = 0;
    bool record = false;
    d.dtype = *dtype_of(*given);
    if (!rows(*given, d.m, columns, io.x) || !read_gate(gate, index, *given, d) ||
        !read_factors(weight, up, down, d) || columns != d.k || !number(scaling, d.scaling) ||
        !bias(bias_of, d.dtype, d.n, io.bias) || !read_panels(kept, d) ||
        !gradients_fit({weight, up, down}, {x, bias_of, gate}, record) ||
        (index == Py_None && PyLong_AsLong(axes) != (d.core ? 2 : 1)))
        return py::none();
    d.threads = num_threads();
    const auto plan = plan_for(d, Step::forward, 0, io.bias != nullptr);
    if (!plan) return not_told();
    if (plan->recipe.runs == Recipe::elsewhere) return py::none();
    if (plan->recipe.runs == Recipe::library) return library({plan->choice, py::bool_(record)});
    if (plan->recipe.runs != Recipe::by_panels) d.panels = {};
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
    without_gil(d.m * d.n * d.k, [&] { plan->recipe.column->low_rank_forward(d, io); });
    return record ? py::object(py::make_tuple(y, h)) : y;
}

py::object low_rank_backward_call(PyObject* const* args) {
    const auto [dy, weight, up, down, gate, index, h_of, scaling] =
        std::array{args[0], args[1], args[2], args[3], args[4], args[5], args[6], args[7]};
    const bool need_dx = args[8] == Py_True, need_dgate = args[9] == Py_True;
    PyObject* kept = args[10];
    if (!in_plain_mode()) return py::none();
    const auto given = read(dy), h = read(h_of);
    if (!given || !h) return py::none();
    LowRank d{};
    LowRankBackward io{};
    int64_t columns = 0;
    d.dtype = *dtype_of(*given);
    if (!rows(*given, d.m, columns, io.dy) || !read_gate(gate, index, *given, d) ||
        !read_factors(weight, up, down, d) || columns != d.n || !number(scaling, d.scaling) ||
        !read_panels(kept, d))
        return py::none();
    if (h->ndim != 2 || h->shape[0] != d.m || h->shape[1] != d.r || !is_contiguous(*h) ||
        dtype_of(*h) != d.dtype)
        return py::none();
    d.threads = num_threads();
    const auto plan = plan_for(d, Step::backward, need_dx + 2 * need_dgate, false);
    if (!plan) return not_told();
    if (plan->recipe.runs == Recipe::elsewhere) return py::none();
    if (plan->recipe.runs == Recipe::library) return library({plan->choice});
    if (plan->recipe.runs != Recipe::by_panels) d.panels = {};
    io.h = h->data;
    py::object dx = py::none();
    if (need_dx) {
        dx = new_like(dy, *given, d.k);
        io.dx = data(dx);
    }
    Gradient dgate(need_dgate, gate);
    io.dgate = dgate.sums();
    without_gil(d.m * d.n * d.k, [&] { plan->recipe.column->low_rank_backward(d, io); });
    return py::make_tuple(dx, dgate.finished());
}

void bind_low_rank(py::module_& m) {
    using py::arg;
    m.def("low_rank_forward", &low_rank_forward, arg("code"), arg("shape"), arg("x"), arg("weight"),
          arg("down"), arg("up"), arg("gate"), arg("bias"), arg("y"), arg("h"), arg("index") = 0,
          arg("adapters") = 1, arg("panels") = no_panels, "y and h; see qrlora/cpu/low_rank.h");
    m.def("low_rank_backward", &low_rank_backward, arg("code"), arg("shape"), arg("dy"),
          arg("weight"), arg("down"), arg("up"), arg("gate"), arg("h"), arg("dx"), arg("dgate"),
          arg("index") = 0, arg("adapters") = 1, arg("panels") = no_panels,
          "dx and dG; see qrlora/cpu/low_rank.h");
}

}  // namespace qrlora
