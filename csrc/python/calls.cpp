// Calls on the tensors themselves: the checks of a plain call, the plan (looked up), the results
// and the kernels in one call from Python.
#include "calls.h"

#include <pybind11/stl.h>

#include <new>
#include <stdexcept>
#include <utility>

#include "bindings.h"
#include "plans.h"
#include "tensors.h"

namespace py = pybind11;

namespace qrlora {

namespace {

// Not py::cpp_function: its handling of eight arguments alone costs about a microsecond.
template <py::object (*CALL)(PyObject* const*), int COUNT>
PyObject* entry(PyObject*, PyObject* const* args, Py_ssize_t count) {
    if (count != COUNT || !plans) {
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

template <py::object (*CALL)(PyObject* const*), int COUNT>
constexpr PyCFunction fast() {
    return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&entry<CALL, COUNT>));
}

// Whether calls on tensors can be served with this torch.
bool set_torch(py::object capsule, py::object tensor, py::object parameter, py::tuple states,
               py::object grad_enabled, py::object threads, py::dict last) {
    const auto* api = exchange_api(capsule.ptr());
    if (!api) return false;
    torch_hooks = {api,
                   reinterpret_cast<PyTypeObject*>(tensor.release().ptr()),
                   reinterpret_cast<PyTypeObject*>(parameter.release().ptr()),
                   states.release().ptr(),
                   grad_enabled.release().ptr(),
                   threads.release().ptr()};
    if (!plans)
        plans = new Plans(last);
    else
        *plans = Plans(last);
    return true;
}

// (tensor or None, ...) -> whether all of them are plain; false before set_torch.
PyObject* are_plain(PyObject*, PyObject* const* args, Py_ssize_t count) {
    bool plain = plans != nullptr;
    for (Py_ssize_t i = 0; plain && i < count; ++i) plain = args[i] == Py_None || is_plain(args[i]);
    return PyBool_FromLong(plain);
}

void tell(const Problem::Key& key, int64_t code, py::object name, py::object choice) {
    if (!plans) throw std::runtime_error("set_torch was not called");
    plans->tell(key, code, std::move(name), std::move(choice), num_threads());
}

void forget_choices() {
    if (plans) plans->forget();
}

PyMethodDef methods[] = {
    {"low_rank_forward_call", fast<low_rank_forward_call, 10>(), METH_FASTCALL, nullptr},
    {"low_rank_backward_call", fast<low_rank_backward_call, 11>(), METH_FASTCALL, nullptr},
    {"kron_forward_call", fast<kron_forward_call, 9>(), METH_FASTCALL, nullptr},
    {"kron_backward_call", fast<kron_backward_call, 12>(), METH_FASTCALL, nullptr},
    {"are_plain", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&are_plain)),
     METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

void bind_calls(py::module_& m) {
    m.def("set_torch", &set_torch,
          "What calls on tensors need of torch, and where choices are noted");
    m.def("tell", &tell, py::arg("key"), py::arg("code"), py::arg("name"), py::arg("choice"),
          "Who runs a problem; see plans.h and codes.h");
    m.def("forget_choices", &forget_choices, "Nothing is told any more");
    PyModule_AddFunctions(m.ptr(), methods);
}

}  // namespace qrlora
