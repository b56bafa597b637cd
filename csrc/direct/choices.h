// Which code runs a problem. Python's chooser decides once per problem; here is what it answered.
#pragma once

#include <array>
#include <unordered_map>

#include "tensors.h"

namespace qrlora {

// The operations in the order of the names that Python hands over.
enum class Operation { qr_linear, lora_xs_linear, kron_linear };
enum class Step { forward, backward };
// Somebody else runs it; the large products, or all of them, are the library's; all of it is here.
enum class Runs { elsewhere, library, here };

struct Question {
    Operation operation;
    Step step;
    DType dtype;
    int64_t m, n, k, r;
};

class Choices {
  public:
    Choices() = default;
    Choices(pybind11::tuple operations, pybind11::object choose, pybind11::dict last)
        : operations_(operations), choose_(choose), last_(last) {}
    // If it is not somebody else, the choice is noted as the operation's last one. x is of the
    // problem's device and dtype.
    Runs runs(PyObject* x, const Question& question);
    void forget();

  private:
    using Key = std::array<int64_t, 7>;
    struct Hash {
        size_t operator()(const Key& key) const;
    };
    struct Answer {
        Runs runs;
        pybind11::object choice;
    };
    Answer ask(PyObject* x, const Question& question, pybind11::handle operation) const;

    static constexpr size_t kept = 4096;
    std::unordered_map<Key, Answer, Hash> known_;
    int64_t forgotten_ = 0;       // how often: an answer that was asked for before is not kept
    pybind11::tuple operations_;  // their names
    pybind11::object
        choose_;           // (operation, step, x, m, n, k, r) -> (Choice, whether all is native)
    pybind11::dict last_;  // the chooser's {operation: Choice of the last call}
};
extern Choices* choices;  // null before set_torch; never freed: the interpreter may be gone by then

}  // namespace qrlora
