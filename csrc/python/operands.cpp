#include "operands.h"

#include <algorithm>

namespace py = pybind11;

namespace qrlora {

bool rows(const dlpack::Tensor& t, int64_t& m, int64_t& columns, Strided2d& out) {
    if (t.ndim < 1 || t.ndim > max_dims || t.strides[t.ndim - 1] != 1) return false;
    columns = t.shape[t.ndim - 1];
    m = 1;
    for (int i = 0; i + 1 < t.ndim; ++i) m *= t.shape[i];
    out = {t.data, t.ndim == 2 ? t.strides[0] : columns, 1};
    return m > 0 && (t.ndim == 2 || is_contiguous(t));
}

bool matrix(const dlpack::Tensor& t, DType dtype, Strided2d& out) {
    if (t.ndim != 2 || dtype_of(t) != dtype) return false;
    if (t.strides[0] != 1 && t.strides[1] != 1) return false;
    out = {t.data, t.strides[0], t.strides[1]};
    return true;
}

bool adapter_index(PyObject* object, const dlpack::Tensor& tokens, int64_t m, int64_t adapters,
                   const int64_t*& out) {
    const auto t = read_int64(object);
    if (!t || !is_contiguous(*t)) return false;
    const bool leading =
        t->ndim + 1 == tokens.ndim && std::equal(t->shape, t->shape + t->ndim, tokens.shape);
    if (!leading && !(t->ndim == 1 && t->shape[0] == m)) return false;
    out = static_cast<const int64_t*>(t->data);
    return std::all_of(out, out + m, [&](int64_t a) { return 0 <= a && a < adapters; });
}

bool bias(PyObject* object, DType dtype, int64_t n, const void*& out) {
    out = nullptr;
    if (object == Py_None) return true;
    const auto t = read(object);
    if (!t || t->ndim != 1 || t->shape[0] != n || !is_contiguous(*t) || dtype_of(*t) != dtype)
        return false;
    out = t->data;
    return true;
}

bool trainable(const dlpack::Tensor& t, DType of_x) {
    const auto dtype = dtype_of(t);
    return is_contiguous(t) && (dtype == of_x || (of_x == DType::bf16 && dtype == DType::f32));
}

bool panels(PyObject* object, LowRankPanels& out) {
    if (object == Py_None) return true;
    if (!PyTuple_Check(object) || PyTuple_GET_SIZE(object) != 3) return false;
    const void** to[] = {&out.base, &out.into, &out.out};
    for (Py_ssize_t i = 0; i < 3; ++i) {
        const auto address = py::handle(PyTuple_GET_ITEM(object, i)).attr("address");
        *to[i] = reinterpret_cast<const void*>(address.cast<intptr_t>());
    }
    return true;
}

bool number(PyObject* object, double& out) {
    if (PyBool_Check(object) || !(PyFloat_Check(object) || PyLong_Check(object))) return false;
    out = PyFloat_AsDouble(object);
    if (out != -1 || !PyErr_Occurred()) return true;
    PyErr_Clear();
    return false;
}

bool gradients_fit(std::initializer_list<PyObject*> frozen, std::initializer_list<PyObject*> others,
                   bool& record) {
    record = false;
    if (!answers_true(torch_hooks.grad_enabled)) return true;
    const auto asks = [](PyObject* t) { return t != Py_None && requires_grad(t); };
    for (PyObject* t : frozen)
        if (asks(t)) return false;
    for (PyObject* t : others) record = record || asks(t);
    return true;
}

Gradient::Gradient(bool needed, PyObject* like) {
    if (!needed) return;
    const auto t = *read(like);
    tensor_ = new_like(like, t, t.shape[t.ndim - 1]);
    data_ = data(tensor_);
    int64_t size = 1;
    for (int i = 0; i < t.ndim; ++i) size *= t.shape[i];
    if (dtype_of(t) == DType::bf16) wide_.resize(size);
}

void* Gradient::sums() { return wide_.empty() ? data_ : wide_.data(); }

py::object Gradient::finished() {
    auto* out = static_cast<bf16*>(data_);
    for (size_t i = 0; i < wide_.size(); ++i) out[i] = to_bf16(wide_[i]);
    return tensor_;
}

}  // namespace qrlora
