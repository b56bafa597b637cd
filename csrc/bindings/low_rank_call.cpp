// QR-LoRA and LoRA-XS on the tensors themselves: the checks of a plain call, the choice of the
// backend (looked up), the results and the kernel in one call from Python. Operands come in the
// order of the public functions: (weight, q, r, lam) or (weight, a, b, core). Every function
// answers None where Python's own path has to take the call, and a bool where the operands are fit
// and the chooser prefers library products.
#include <pybind11/stl.h>

#include <array>
#include <new>
#include <stdexcept>
#include <unordered_map>
#include <utility>
#include <vector>

#include "qrlora/bindings.h"
#include "qrlora/cpu/buffer.h"
#include "qrlora/cpu/low_rank.h"
#include "qrlora/plain_call.h"

namespace py = pybind11;

namespace qrlora {

namespace {

// --- the choice of the backend

// Python's chooser decides once per problem; here is what it answered.
struct Choices {
    using Key = std::array<int64_t, 6>;  // core, dtype, m, n, k, r
    struct Hash {
        size_t operator()(const Key& key) const {
            uint64_t hash = 0;
            for (const int64_t part : key) hash = (hash ^ part) * 0x9e3779b97f4a7c15u;
            return hash ^ hash >> 32;
        }
    };
    enum class Runs { here, library, elsewhere };
    struct Answer {
        Runs runs;
        py::object choice;
    };
    static constexpr size_t kept = 4096;

    std::unordered_map<Key, Answer, Hash> known;
    py::tuple operations;  // the two names, for a diagonal gate and for a core
    py::object choose;     // (operation, x, m, n, k, r) -> (Choice, whether it is these kernels)
    py::dict last;         // the chooser's {operation: Choice of the last call}

    // Who runs the problem; if it is not somebody else, the choice is noted as the last one.
    Runs runs(PyObject* x, const LowRank& d) {
        const py::handle operation = PyTuple_GET_ITEM(operations.ptr(), d.core ? 1 : 0);
        const Key key{d.core, static_cast<int64_t>(d.dtype), d.m, d.n, d.k, d.r};
        auto at = known.find(key);
        if (at == known.end()) {
            const py::object answer = choose(operation, py::handle(x), d.m, d.n, d.k, d.r);
            Answer found{Runs::elsewhere, py::none()};
            if (!answer.is_none()) {
                const auto [choice, native] = answer.cast<std::pair<py::object, bool>>();
                found = {native ? Runs::here : Runs::library, choice};
            }
            if (known.size() >= kept) known.clear();
            at = known.emplace(key, std::move(found)).first;
        }
        const auto [runs, choice] = at->second;  // a copy: the next line may run other Python code
        if (runs == Runs::elsewhere) return runs;
        if (PyDict_SetItem(last.ptr(), operation.ptr(), choice.ptr()) != 0)
            throw py::error_already_set();
        return runs;
    }
};
Choices* choices = nullptr;  // never freed: the interpreter may be gone by then

// --- operands

bool matrix(PyObject* object, DType dtype, int64_t rows, int64_t columns, Strided2d& out) {
    const auto t = read(object);
    if (!t || t->ndim != 2 || dtype_of(*t) != dtype) return false;
    if (t->shape[0] != rows || t->shape[1] != columns) return false;
    if (t->strides[0] != 1 && t->strides[1] != 1) return false;
    out = {t->data, t->strides[0], t->strides[1]};
    return true;
}

// Tokens in rows of contiguous elements: [..., columns] as [m, columns].
bool rows(const dlpack::Tensor& t, int64_t& m, int64_t& columns, Strided2d& out) {
    if (t.ndim < 1 || t.ndim > max_dims || t.strides[t.ndim - 1] != 1) return false;
    columns = t.shape[t.ndim - 1];
    if (t.ndim == 2) {
        m = t.shape[0];
        out = {t.data, t.strides[0], 1};
        return true;
    }
    m = 1;
    for (int i = 0; i + 1 < t.ndim; ++i) m *= t.shape[i];
    out = {t.data, columns, 1};
    return is_contiguous(t);
}

// The frozen operands and the gate; m, dtype and threads are the caller's.
bool operands(bool core, PyObject* const* frozen, PyObject* gate, PyObject* scaling, LowRank& d) {
    const auto w = read(frozen[0]), g = read(gate);
    if (!w || w->ndim != 2 || !g || g->ndim != (core ? 2 : 1) || !is_contiguous(*g)) return false;
    d.n = w->shape[0], d.k = w->shape[1], d.r = g->shape[0];
    if (d.m < 1 || d.n < 1 || d.k < 1 || d.r < 1 || (core && g->shape[1] != d.r)) return false;
    d.gate = g->data, d.gate_dtype = *dtype_of(*g), d.core = core;
    if (d.gate_dtype != d.dtype && !(d.dtype == DType::bf16 && d.gate_dtype == DType::f32))
        return false;
    if (PyBool_Check(scaling) || !(PyFloat_Check(scaling) || PyLong_Check(scaling))) return false;
    d.scaling = PyFloat_AsDouble(scaling);
    if (d.scaling == -1 && PyErr_Occurred()) return PyErr_Clear(), false;
    // Public order: (q [n, r], r [r, k]) for QR-LoRA, (a [r, k], b [n, r]) for LoRA-XS.
    return matrix(frozen[0], d.dtype, d.n, d.k, d.weight) &&
           matrix(frozen[core ? 1 : 2], d.dtype, d.r, d.k, d.down) &&
           matrix(frozen[core ? 2 : 1], d.dtype, d.n, d.r, d.up);
}

// The GIL is given up where another thread could do something with the time.
template <typename Work>
void run(const LowRank& d, const Work& work) {
    constexpr int64_t long_enough = 1 << 18;  // multiplications, some ten microseconds
    if (d.m * d.n * d.k < long_enough) return work();
    py::gil_scoped_release release;
    work();
}

void* data(const py::object& tensor) {
    if (!tensor) throw py::error_already_set();
    const auto t = read(tensor.ptr());
    if (!t) throw std::runtime_error("a new tensor cannot be read");
    return t->data;
}

// --- the calls

// (core, x, weight, bias, q | a, r | b, gate, scaling) -> y; (y, h) where autograd must record; for
// library products whether it must; None.
py::object forward(PyObject* const* args) {
    const bool core = args[0] == Py_True;
    PyObject *x = args[1], *weight = args[2], *bias = args[3], *gate = args[6];
    const auto given = read(x);
    if (!given || !in_plain_mode()) return py::none();
    LowRank d{};
    LowRankForward io{};
    int64_t columns = 0;
    d.dtype = *dtype_of(*given);
    PyObject* const frozen[] = {weight, args[4], args[5]};
    if (!rows(*given, d.m, columns, io.x) || !operands(core, frozen, gate, args[7], d) ||
        columns != d.k)
        return py::none();
    if (bias != Py_None) {
        const auto b = read(bias);
        if (!b || b->ndim != 1 || b->shape[0] != d.n || !is_contiguous(*b) ||
            dtype_of(*b) != d.dtype)
            return py::none();
        io.bias = b->data;
    }
    bool record = false;
    if (answers_true(torch_hooks.grad_enabled)) {
        for (PyObject* operand : frozen)
            if (requires_grad(operand)) return py::none();
        record =
            requires_grad(x) || requires_grad(gate) || (bias != Py_None && requires_grad(bias));
    }
    const auto runs = choices->runs(x, d);
    if (runs == Choices::Runs::elsewhere) return py::none();
    if (runs == Choices::Runs::library) return py::bool_(record);
    d.threads = num_threads();
    const py::object y = new_like(x, *given, d.n);
    io.y = data(y);
    if (record) {
        const py::object h = new_matrix(x, d.m, d.r);
        io.h = data(h);
        run(d, [&] { low_rank_forward(d, io); });
        return py::make_tuple(y, h);
    }
    AlignedBuffer<unsigned char> large;  // h, which nobody asks for
    const int64_t bytes = d.m * d.r * (d.dtype == DType::f64 ? 8 : d.dtype == DType::f32 ? 4 : 2);
    io.h = scratch(large, bytes).reserve(bytes);
    run(d, [&] { low_rank_forward(d, io); });
    return y;
}

// (core, dy, weight, q | a, r | b, gate, h, scaling, need_dx, need_dgate) -> (dx | None,
// dgate | None); False for library products; None.
py::object backward(PyObject* const* args) {
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
    const auto runs = choices->runs(dy, d);
    if (runs == Choices::Runs::elsewhere) return py::none();
    if (runs == Choices::Runs::library) return py::bool_(false);
    d.threads = num_threads();
    io.h = h->data;
    py::object dx = py::none(), dgate = py::none();
    if (need_dx) {
        dx = new_like(dy, *given, d.k);
        io.dx = data(dx);
    }
    const int64_t size = d.r * (core ? d.r : 1);
    std::vector<float> wide;  // the sums, where they are wider than the gate
    if (need_dgate) {
        const auto shape = *read(gate);
        dgate = new_like(gate, shape, d.r);
        io.dgate = data(dgate);
        if (d.gate_dtype == DType::bf16) {
            wide.resize(size);
            io.dgate = wide.data();
        }
    }
    run(d, [&] { low_rank_backward(d, io); });
    if (!wide.empty()) {
        auto* out = static_cast<bf16*>(data(dgate));
        for (int64_t i = 0; i < size; ++i) out[i] = to_bf16(wide[i]);
    }
    return py::make_tuple(dx, dgate);
}

// Not py::cpp_function: its handling of eight arguments alone costs about a microsecond.
template <py::object (*CALL)(PyObject* const*), int COUNT>
PyObject* entry(PyObject*, PyObject* const* args, Py_ssize_t count) {
    if (count != COUNT || !choices) {
        PyErr_SetString(PyExc_TypeError, "wrong number of arguments, or set_torch was not called");
        return nullptr;
    }
    try {
        return CALL(args).release().ptr();
    } catch (py::error_already_set& error) {
        error.restore();
    } catch (const std::bad_alloc&) {
        PyErr_NoMemory();
    } catch (const std::exception& error) {
        PyErr_SetString(PyExc_RuntimeError, error.what());
    }
    return nullptr;
}

// Whether calls on tensors can be served with this torch.
bool set_torch(py::object capsule, py::object tensor, py::object parameter, py::tuple states,
               py::object grad_enabled, py::object threads, py::tuple operations, py::object choose,
               py::dict last) {
    const auto* api = exchange_api(capsule.ptr());
    if (!api) return false;
    torch_hooks = {api,
                   reinterpret_cast<PyTypeObject*>(tensor.release().ptr()),
                   reinterpret_cast<PyTypeObject*>(parameter.release().ptr()),
                   states.release().ptr(),
                   grad_enabled.release().ptr(),
                   threads.release().ptr()};
    if (!choices) choices = new Choices;
    choices->known.clear();
    choices->operations = operations;
    choices->choose = choose;
    choices->last = last;
    return true;
}

template <py::object (*CALL)(PyObject* const*), int COUNT>
constexpr PyCFunction fast() {
    return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&entry<CALL, COUNT>));
}

PyMethodDef methods[] = {
    {"low_rank_forward_call", fast<forward, 8>(), METH_FASTCALL, "y, (y, h), a bool or None"},
    {"low_rank_backward_call", fast<backward, 10>(), METH_FASTCALL, "(dx, dG), False or None"},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

void bind_low_rank_call(py::module_& m) {
    m.def("set_torch", &set_torch, "What calls on tensors need of torch and of the chooser");
    PyModule_AddFunctions(m.ptr(), methods);
}

}  // namespace qrlora
