#include "plans.h"

#include <stdexcept>
#include <string>
#include <utility>

namespace py = pybind11;

namespace qrlora {

Plans* plans = nullptr;

Problem::Key Problem::key() const {
    return {static_cast<int64_t>(operation),
            static_cast<int64_t>(step),
            static_cast<int64_t>(dtype),
            m,
            n,
            k,
            r,
            static_cast<int64_t>(gate),
            layout,
            needs,
            bias};
}

size_t Plans::Hash::operator()(const Problem::Key& key) const {
    uint64_t hash = 0;
    for (const int64_t part : key) hash = (hash ^ part) * 0x9e3779b97f4a7c15u;
    return hash ^ hash >> 32;
}

// What is let go may run other Python code, which must find the plans in order.
void Plans::forget() { decltype(known_)().swap(known_); }

void Plans::meet(int threads) {
    if (threads != threads_) forget();
    threads_ = threads;
}

void Plans::note(const Plan& plan) const {
    PyObject *last = last_.ptr(), *name = plan.name.ptr();
    if (PyDict_DelItem(last, name) != 0) {
        if (!PyErr_ExceptionMatches(PyExc_KeyError)) throw py::error_already_set();
        PyErr_Clear();
    }
    if (PyDict_SetItem(last, name, plan.choice.ptr()) != 0) throw py::error_already_set();
}

std::optional<Plan> Plans::find(const Problem& problem, int threads) {
    meet(threads);
    const auto at = known_.find(problem.key());
    if (at == known_.end()) return {};
    std::optional<Plan> plan = at->second;  // a copy: noting it may run other Python code
    if (plan->recipe.runs != Recipe::elsewhere) note(*plan);
    return plan;
}

void Plans::tell(const Problem::Key& key, int64_t code, py::object name, py::object choice,
                 int threads) {
    const auto operation = static_cast<Operation>(key[0]);
    if (operation != Operation::low_rank && operation != Operation::kron)
        throw std::runtime_error("no operation has the number " + std::to_string(key[0]));
    const Demand demand{operation, checked_dtype(key[2]), is_mixed(static_cast<Gate>(key[7]))};
    Plan plan{recipe_of(code, demand), std::move(name), std::move(choice)};
    meet(threads);
    if (known_.size() >= kept) forget();
    known_.insert_or_assign(key, std::move(plan));
}

}  // namespace qrlora
