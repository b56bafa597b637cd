// Operands of the kernels taken from tensors as they lie. What does not fit is refused with false:
// Python's own path has the messages.
#pragma once

#include <vector>

#include "qrlora/cpu/low_rank.h"
#include "qrlora/strided.h"
#include "tensors.h"

namespace qrlora {

// Tokens in rows of contiguous elements: [..., columns] as [m, columns], m > 0.
bool rows(const dlpack::Tensor& t, int64_t& m, int64_t& columns, Strided2d& out);
// A matrix with one of its dimensions contiguous
bool matrix(const dlpack::Tensor& t, DType dtype, Strided2d& out);
// int64 [m], or of the tokens' leading dimensions, contiguous, each in [0, adapters)
bool adapter_index(PyObject* object, const dlpack::Tensor& tokens, int64_t m, int64_t adapters,
                   const int64_t*& out);
// [n] contiguous, or None, which gives null
bool bias(PyObject* object, DType dtype, int64_t n, const void*& out);
// Contiguous, of x's type, or fp32 over bf16.
bool trainable(const dlpack::Tensor& t, DType of_x);
bool number(PyObject* object, double& out);
// Three matrices in panels, as objects with an address, or None, which gives null
bool panels(PyObject* object, LowRankPanels& out);

// Whether autograd asks for nothing that a call has no gradient for; `record` tells whether it has
// to record one.
bool gradients_fit(std::initializer_list<PyObject*> frozen, std::initializer_list<PyObject*> others,
                   bool& record);

// A new gradient like `like`, and where a kernel leaves its sums: in fp32 where it is bf16.
class Gradient {
  public:
    Gradient(bool needed, PyObject* like);
    void* sums();  // null where not needed
    pybind11::object finished();

  private:
    pybind11::object tensor_ = pybind11::none();
    void* data_ = nullptr;
    std::vector<float> wide_;
};

}  // namespace qrlora
