// QR-LoRA and LoRA-XS on the module: a matrix comes as (address, row stride, column stride). The
// calls that take tensors are in csrc/direct.
#include "qrlora/cpu/low_rank.h"

#include <pybind11/stl.h>

#include <tuple>

#include "qrlora/bindings.h"
#include "qrlora/isa.h"

namespace py = pybind11;

namespace qrlora {

namespace {

using Gate = std::tuple<int64_t, int64_t, bool, double>;  // address, dtype, core, scaling
using Problem =
    std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int>;  // m n k r dtype threads

LowRank low_rank(const Problem& p, const Numbers& weight, const Numbers& down, const Numbers& up,
                 const Gate& gate) {
    const auto [m, n, k, r, dtype, threads] = p;
    const auto [address, gate_dtype, core, scaling] = gate;
    return {m,
            n,
            k,
            r,
            checked_dtype(dtype),
            matrix(weight),
            matrix(down),
            matrix(up),
            pointer(address),
            static_cast<DType>(gate_dtype),
            core,
            scaling,
            threads};
}

void forward(const Problem& problem, const Numbers& x, const Numbers& weight, const Numbers& down,
             const Numbers& up, const Gate& gate, int64_t bias, int64_t y, int64_t h) {
    const LowRank d = low_rank(problem, weight, down, up, gate);
    const LowRankForward io{matrix(x), pointer(bias), pointer(y), pointer(h)};
    py::gil_scoped_release release;
    low_rank_forward(d, io);
}

void backward(const Problem& problem, const Numbers& dy, const Numbers& weight, const Numbers& down,
              const Numbers& up, const Gate& gate, int64_t h, int64_t dx, int64_t dgate) {
    const LowRank d = low_rank(problem, weight, down, up, gate);
    const LowRankBackward io{matrix(dy), pointer(h), pointer(dx), pointer(dgate)};
    py::gil_scoped_release release;
    low_rank_backward(d, io);
}

}  // namespace

void low_rank_forward(const LowRank& d, const LowRankForward& io) {
#ifdef QRLORA_WITH_AMX
    if (d.dtype == DType::bf16) return amx::low_rank_forward(d, io);
#endif
    QRLORA_DISPATCH(low_rank_forward, d, io);
}

void low_rank_backward(const LowRank& d, const LowRankBackward& io) {
#ifdef QRLORA_WITH_AMX
    if (d.dtype == DType::bf16) return amx::low_rank_backward(d, io);
#endif
    QRLORA_DISPATCH(low_rank_backward, d, io);
}

void bind_low_rank(py::module_& m) {
    m.def("low_rank_forward", &forward, "y and h; see qrlora/cpu/low_rank.h");
    m.def("low_rank_backward", &backward, "dx and dG; see qrlora/cpu/low_rank.h");
}

}  // namespace qrlora
