#include "tensors.h"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <stdexcept>

namespace py = pybind11;

namespace qrlora {

namespace {

py::object empty(PyObject* like, const int64_t* sizes, int count) {
    static PyObject* const name = PyUnicode_InternFromString("new_empty");
    std::array<py::object, max_dims> numbers;
    std::array<PyObject*, max_dims + 1> arguments{like};
    for (int i = 0; i < count; ++i) {
        numbers[i] = py::reinterpret_steal<py::object>(PyLong_FromLongLong(sizes[i]));
        arguments[i + 1] = numbers[i].ptr();
    }
    return py::reinterpret_steal<py::object>(
        PyObject_VectorcallMethod(name, arguments.data(), count + 1, nullptr));
}

}  // namespace

TorchHooks torch_hooks;

const dlpack::ExchangeAPI* exchange_api(PyObject* capsule) {
    if (!PyCapsule_IsValid(capsule, dlpack::capsule_name)) return nullptr;
    auto* header = static_cast<const dlpack::ExchangeHeader*>(
        PyCapsule_GetPointer(capsule, dlpack::capsule_name));
    while (header && header->version.major != dlpack::known_major) header = header->previous;
    auto* api = reinterpret_cast<const dlpack::ExchangeAPI*>(header);
    return api && api->dltensor_from_py_object_no_sync ? api : nullptr;
}

bool answers_true(PyObject* function) {
    const auto answer = py::reinterpret_steal<py::object>(PyObject_CallNoArgs(function));
    const int truth = answer ? PyObject_IsTrue(answer.ptr()) : -1;
    if (truth < 0) PyErr_Clear();
    return truth != 0;
}

bool in_plain_mode() {
    const char* forced = std::getenv("QRLORA_BACKEND");
    if (forced && *forced) return false;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(torch_hooks.states); ++i)
        if (answers_true(PyTuple_GET_ITEM(torch_hooks.states, i))) return false;
    return true;
}

bool requires_grad(PyObject* tensor) {
    static PyObject* const name = PyUnicode_InternFromString("requires_grad");
    const auto answer = py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor, name));
    if (!answer) PyErr_Clear();
    return answer.ptr() != Py_False;
}

int num_threads() {
    const auto count =
        py::reinterpret_steal<py::object>(PyObject_CallNoArgs(torch_hooks.num_threads));
    const long threads = count ? PyLong_AsLong(count.ptr()) : 1;
    if (PyErr_Occurred()) PyErr_Clear();
    return threads < 1 ? 1 : static_cast<int>(threads);
}

std::optional<dlpack::Tensor> read(PyObject* object) {
    const TorchHooks& torch = torch_hooks;
    if (Py_TYPE(object) != torch.tensor && Py_TYPE(object) != torch.parameter) return {};
    dlpack::Tensor t;
    if (torch.api->dltensor_from_py_object_no_sync(object, &t) != 0) {
        PyErr_Clear();
        return {};
    }
    if (t.device.type != dlpack::device_cpu || t.byte_offset != 0) return {};
    if (!t.data || !dtype_of(t)) return {};  // without data: empty, or a wrapper of something else
    return t;
}

std::optional<DType> dtype_of(const dlpack::Tensor& t) {
    const auto [code, bits, lanes] = t.dtype;
    if (lanes != 1) return {};
    if (code == dlpack::code_float && bits == 32) return DType::f32;
    if (code == dlpack::code_float && bits == 64) return DType::f64;
    if (code == dlpack::code_bfloat && bits == 16) return DType::bf16;
    return {};
}

bool is_contiguous(const dlpack::Tensor& t) {
    int64_t stride = 1;
    for (int i = t.ndim - 1; i >= 0; --i) {
        if (t.shape[i] != 1 && t.strides[i] != stride) return false;
        stride *= t.shape[i];
    }
    return true;
}

py::object new_like(PyObject* like, const dlpack::Tensor& shape, int64_t last) {
    std::array<int64_t, max_dims> sizes;
    std::copy(shape.shape, shape.shape + shape.ndim, sizes.begin());
    sizes[shape.ndim - 1] = last;
    return empty(like, sizes.data(), shape.ndim);
}

py::object new_matrix(PyObject* like, int64_t rows, int64_t last) {
    const int64_t sizes[2] = {rows, last};
    return empty(like, sizes, 2);
}

void* data(const py::object& made) {
    if (!made) throw py::error_already_set();
    const auto t = read(made.ptr());
    if (!t) throw std::runtime_error("a new tensor cannot be read");
    return t->data;
}

}  // namespace qrlora
