// Who runs a problem, as Python told it once. Nothing here decides.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <optional>
#include <unordered_map>

#include "codes.h"

namespace qrlora {

struct Problem {
    Operation operation;
    Step step;
    DType dtype;
    int64_t m, n, k, r;
    Gate gate;       // of kron: vector
    int64_t layout;  // of W: 1 where columns are contiguous and rows are not, 2 in panels, else 0
    int64_t needs;   // backward: bits of the gradients asked for, in their order; forward: 0
    bool bias;       // forward: whether there is one; backward: false
    using Key = std::array<int64_t, 11>;
    Key key() const;
};

struct Plan {
    Recipe recipe;
    pybind11::object name, choice;  // what is noted where it is followed
};

class Plans {
  public:
    explicit Plans(pybind11::dict last) : last_(last) {}
    // The plan for a problem on so many threads, noted as the last one unless it is somebody
    // else's; none where nothing was told.
    std::optional<Plan> find(const Problem& problem, int threads);
    void tell(const Problem::Key& key, int64_t code, pybind11::object name, pybind11::object choice,
              int threads);
    void forget();

  private:
    struct Hash {
        size_t operator()(const Problem::Key& key) const;
    };
    // What was told holds for the number of threads that it was told for.
    void meet(int threads);
    void note(const Plan& plan) const;

    static constexpr size_t kept = 4096;
    std::unordered_map<Problem::Key, Plan, Hash> known_;
    int threads_ = 0;
    pybind11::dict last_;  // {name: choice}, in the order of the last calls
};
extern Plans* plans;  // null before set_torch; never freed: the interpreter may be gone by then

}  // namespace qrlora
