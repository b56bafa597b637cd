// The CPU kernels in this binary: a column for each instruction set, and one for the tile unit.
// Nothing here decides which of them computes a problem; the caller names the column.
#pragma once

#include <string>
#include <vector>

#include "qrlora/cpu/kron.h"
#include "qrlora/cpu/linear_add.h"
#include "qrlora/cpu/low_rank.h"
#include "qrlora/cpu/panels.h"
#include "qrlora/dtype.h"

namespace qrlora {

struct DenseKernels;

// Element types that something computes in.
struct DTypes {
    unsigned bits = 0;
    constexpr bool has(DType dtype) const { return bits >> static_cast<int>(dtype) & 1; }
    constexpr DTypes operator|(DType dtype) const { return {bits | 1u << static_cast<int>(dtype)}; }
};

// A kernel that a column does not have is null.
struct Column {
    const char* name;
    const std::string& (*obstacle)();  // why it does not run on this machine; empty if it does
    DTypes dtypes;
    DTypes mixes;          // low_rank with gates by row
    bool rounded_factors;  // kron reads its factors in bf16, not in the type of the sums
    void (*low_rank_forward)(const LowRank&, const LowRankForward&);
    void (*low_rank_backward)(const LowRank&, const LowRankBackward&);
    void (*linear_add)(const LinearAdd&);
    void (*kron_forward)(const KronShape&, DType, const KronForward&);
    void (*kron_backward)(const KronShape&, DType, const KronBackward&);
    const DenseKernels& (*dense_kernels)();
    const PanelKernels& (*panel_kernels)(DType);
};

// The instruction sets from the least to the best, then what a CPU may have beside one.
const std::vector<Column>& columns();
// Where in the table the instruction set in use stands: the best one of this CPU, or the one that
// QRLORA_ISA names if it is lower.
int best_column();
// Those of the instruction set in use.
const PanelKernels& panel_kernels(DType dtype);

}  // namespace qrlora
