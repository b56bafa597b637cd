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

// What a method without arguments answers; null, and no error, where it fails.
py::object ask(PyObject* object, PyObject* method) {
    PyObject* self[] = {object};
    auto answer =
        py::reinterpret_steal<py::object>(PyObject_VectorcallMethod(method, self, 1, nullptr));
    if (!answer) PyErr_Clear();
    return answer;
}

bool is_plain_type(PyObject* object) {
    return Py_TYPE(object) == torch_hooks.tensor || Py_TYPE(object) == torch_hooks.parameter;
}

// A negation that is still to be done, of which DLPack tells nothing: the imaginary part of a
// conjugate is such a view. Once detached, saved for backward or loaded from a file it is no view
// of anything any more, so every tensor is asked. Whatever is no plain tensor counts as negated.
bool is_negated(PyObject* object) {
    static PyObject* const name = PyUnicode_InternFromString("is_neg");
    return !is_plain_type(object) || ask(object, name).ptr() != Py_False;
}

// What DLPack says of a plain tensor, wherever it is.
std::optional<dlpack::Tensor> described(PyObject* object) {
    dlpack::Tensor t;
    if (torch_hooks.api->dltensor_from_py_object_no_sync(object, &t) == 0 && t.byte_offset == 0)
        return t;
    PyErr_Clear();
    return {};
}

// The same, if it is on the CPU. Without data it is empty, or a wrapper of something else.
std::optional<dlpack::Tensor> on_cpu(PyObject* object) {
    const auto t = described(object);
    return t && t->device.type == dlpack::device_cpu && t->data ? t : std::nullopt;
}

bool is_empty(const dlpack::Tensor& t) {
    return std::find(t.shape, t.shape + t.ndim, 0) != t.shape + t.ndim;
}

// Whether the storage holds the last element: it can be freed or cut short under its tensors.
bool storage_reaches(PyObject* object, const dlpack::Tensor& t) {
    static PyObject* const storage_of = PyUnicode_InternFromString("untyped_storage");
    static PyObject* const offset_of = PyUnicode_InternFromString("storage_offset");
    const py::object storage = ask(object, storage_of), offset = ask(object, offset_of);
    const Py_ssize_t bytes = storage ? PyObject_Size(storage.ptr()) : -1;
    const int64_t first = offset ? PyLong_AsLongLong(offset.ptr()) : -1;
    if (PyErr_Occurred()) PyErr_Clear();
    int64_t end = first + 1;
    for (int i = 0; i < t.ndim; ++i) end += (t.shape[i] - 1) * t.strides[i];
    return first >= 0 && end <= bytes / (t.dtype.bits / 8);
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

bool is_plain(PyObject* object) {
    if (is_negated(object)) return false;
    const auto t = described(object);
    if (!t) return false;
    const bool floating =
        t->dtype.code == dlpack::code_float || t->dtype.code == dlpack::code_bfloat;
    if (!floating || t->dtype.lanes != 1 || t->dtype.bits < 8) return false;
    return is_empty(*t) || (t->data && storage_reaches(object, *t));
}

std::optional<dlpack::Tensor> read(PyObject* object) {
    if (is_negated(object)) return {};
    const auto t = on_cpu(object);
    return t && dtype_of(*t) && storage_reaches(object, *t) ? t : std::nullopt;
}

std::optional<dlpack::Tensor> read_int64(PyObject* object) {
    if (is_negated(object)) return {};
    const auto t = on_cpu(object);
    if (!t || t->dtype.code != dlpack::code_int || t->dtype.bits != 64 || t->dtype.lanes != 1)
        return {};
    return storage_reaches(object, *t) ? t : std::nullopt;
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
    const auto t = on_cpu(made.ptr());
    if (!t) throw std::runtime_error("a new tensor cannot be read");
    return t->data;
}

}  // namespace qrlora
