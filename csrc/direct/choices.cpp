#include "choices.h"

#include <pybind11/stl.h>

#include <utility>

namespace py = pybind11;

namespace qrlora {

Choices* choices = nullptr;

size_t Choices::Hash::operator()(const Key& key) const {
    uint64_t hash = 0;
    for (const int64_t part : key) hash = (hash ^ part) * 0x9e3779b97f4a7c15u;
    return hash ^ hash >> 32;
}

Choices::Answer Choices::ask(PyObject* x, const Question& q, py::handle operation) const {
    const char* step = q.step == Step::forward ? "fwd" : "bwd";
    const py::object answer = choose_(operation, step, py::handle(x), q.m, q.n, q.k, q.r);
    if (answer.is_none()) return {Runs::elsewhere, py::none()};
    const auto [choice, native] = answer.cast<std::pair<py::object, bool>>();
    return {native ? Runs::here : Runs::library, choice};
}

void Choices::forget() {
    known_.clear();
    ++forgotten_;
}

Runs Choices::runs(PyObject* x, const Question& q) {
    const py::handle operation =
        PyTuple_GET_ITEM(operations_.ptr(), static_cast<Py_ssize_t>(q.operation));
    const Key key{static_cast<int64_t>(q.operation),
                  static_cast<int64_t>(q.step),
                  static_cast<int64_t>(q.dtype),
                  q.m,
                  q.n,
                  q.k,
                  q.r};
    const auto at = known_.find(key);
    const int64_t forgotten = forgotten_;
    // A copy: what follows may run other Python code.
    const Answer answer = at == known_.end() ? ask(x, q, operation) : at->second;
    if (at == known_.end() && forgotten == forgotten_) {
        if (known_.size() >= kept) known_.clear();
        known_.emplace(key, answer);
    }
    if (answer.runs == Runs::elsewhere) return answer.runs;
    if (PyDict_SetItem(last_.ptr(), operation.ptr(), answer.choice.ptr()) != 0)
        throw py::error_already_set();
    return answer.runs;
}

}  // namespace qrlora
