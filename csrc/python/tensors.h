// Tensors taken from Python as they are, for calls that a kernel can serve at once: plain eager
// mode, plain CPU tensors. Whatever else comes is refused without an error, and Python's own path,
// with its checks and messages, takes the call.
#pragma once

#include <pybind11/pybind11.h>

#include <optional>

#include "dlpack.h"
#include "qrlora/dtype.h"

namespace qrlora {

// What Python hands over once; the objects live as long as the process.
struct TorchHooks {
    const dlpack::ExchangeAPI* api = nullptr;
    PyTypeObject *tensor = nullptr, *parameter = nullptr;  // exactly these types are plain
    PyObject* states = nullptr;  // functions; in plain eager mode each answers something false
    PyObject* grad_enabled = nullptr;  // functions
    PyObject* num_threads = nullptr;
};
extern TorchHooks torch_hooks;

// The table in a capsule, or null where it is not one that can be read.
const dlpack::ExchangeAPI* exchange_api(PyObject* capsule);

// No backend forced by the environment, and none of the states.
bool in_plain_mode();
// What a function that Python handed over answers; an error counts as true.
bool answers_true(PyObject* function);
bool requires_grad(PyObject* tensor);
int num_threads();

// Whether a floating tensor is what it seems: no subclass, no wrapper, no negation still to be
// done, and a storage that holds every element. On any device. qrlora_kernels/native/pointers.py
// asks this, and says what is wrong where it is not so.
bool is_plain(PyObject* object);
// Such a tensor, if it is on the CPU, of a dtype that kernels take, and not empty.
std::optional<dlpack::Tensor> read(PyObject* object);
std::optional<dlpack::Tensor> read_int64(PyObject* object);  // likewise
std::optional<DType> dtype_of(const dlpack::Tensor& t);
bool is_contiguous(const dlpack::Tensor& t);

constexpr int max_dims = 8;  // of the tensors that are made here

// A new tensor like `like` (dtype, device) with its leading dimensions and `last`, or of [rows,
// last]; null with a Python error.
pybind11::object new_like(PyObject* like, const dlpack::Tensor& shape, int64_t last);
pybind11::object new_matrix(PyObject* like, int64_t rows, int64_t last);
void* data(const pybind11::object& made);  // of such a tensor; the error, if it is null

}  // namespace qrlora
