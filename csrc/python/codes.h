// What Python tells of a step: whose it is and, where it is the core's, by which column's kernels.
#pragma once

#include <cstdint>

#include "qrlora/cpu/table.h"

namespace qrlora {

// As Python numbers them.
enum class Operation : int64_t { low_rank, kron, linear_add };
enum class Step : int64_t { forward, backward };
enum class Gate : int64_t { vector, core, mixed_vector, mixed_core };

inline bool is_mixed(Gate gate) { return gate >= Gate::mixed_vector; }

// A code is -1 for what somebody else runs, 0 for library products, 1 + column for the whole step,
// 17 + column for the Kronecker update alone, whose base product is the caller's, 33 + column for
// the whole low-rank step by operands in panels.
struct Recipe {
    enum Runs { elsewhere, library, update, whole, by_panels } runs;
    const Column* column;  // of the last three
};

// What has to be computed.
struct Demand {
    Operation operation;
    DType dtype;
    bool mixed = false;  // gates by row
};

// Throws std::runtime_error, which names the code and why nothing here follows it.
Recipe recipe_of(int64_t code, const Demand& demand);
// Likewise, for a call that runs kernels.
const Column& column_of(int64_t code, const Demand& demand);
DType checked_dtype(int64_t number);

}  // namespace qrlora
