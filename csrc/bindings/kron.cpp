// Kronecker kernels on the module: pointers come as integers, sizes as int64.
#include "qrlora/cpu/kron.h"

#include <stdexcept>
#include <tuple>

#include "qrlora/bindings.h"
#include "qrlora/cpu/amx.h"
#include "qrlora/isa.h"

namespace py = pybind11;

namespace qrlora {

namespace {

void check(bool tiles) {
    if (tiles && !amx::available()) throw std::runtime_error("AMX is not available here");
}

// (tokens, n, r, k, dtype, threads) of the activations
using ShapeArgs = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int>;
// (a, b, a0, b0, dtype, scaling), contiguous; a0 and b0 are 0 without a start
using FactorArgs = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, double>;
using RowsArgs = std::tuple<int64_t, int64_t>;  // (address, stride)

struct Problem {
    KronShape shape;
    DType dtype;
    KronFactors factors;
    bool tiles;

    Problem(const ShapeArgs& s, const FactorArgs& f, bool on_tiles) : tiles(on_tiles) {
        const auto& [tokens, n, r, k, of_x, threads] = s;
        const auto& [a, b, a0, b0, of_factors, scaling] = f;
        shape = {tokens, n, r, k, a0 ? 2 : 1, threads};
        dtype = static_cast<DType>(of_x);
        factors = {pointer(a), pointer(b), pointer(a0), pointer(b0), static_cast<DType>(of_factors),
                   scaling};
        check(tiles);
    }
    KronOperands operands(KronStep step) const {
        const DType wide = dtype == DType::f64 ? DType::f64 : DType::f32;
        return kron_operands(shape, factors, tiles ? DType::bf16 : wide, step);
    }
};

KronRows rows(const RowsArgs& args) { return {pointer(std::get<0>(args)), std::get<1>(args)}; }

void kron_forward(const ShapeArgs& shape, const RowsArgs& x, const FactorArgs& factors, int64_t y,
                  bool tiles) {
    const Problem p(shape, factors, tiles);
    py::gil_scoped_release release;
    KronOperands o = p.operands(KronStep::forward);
#ifdef QRLORA_WITH_AMX
    if (tiles)
        return amx::kron_forward(p.shape, rows(x), reinterpret_cast<bf16*>(o.left.data()),
                                 reinterpret_cast<bf16*>(o.right.data()), pointer<bf16>(y));
#endif
    QRLORA_DISPATCH(kron_forward, p.shape, p.dtype, rows(x), o.left.data(), o.right.data(),
                    pointer(y));
}

void kron_backward(const ShapeArgs& shape, const RowsArgs& dy, const RowsArgs& x,
                   const FactorArgs& factors, int64_t dx, int64_t da, int64_t db, bool tiles) {
    const Problem p(shape, factors, tiles);
    py::gil_scoped_release release;
    KronOperands o = p.operands(KronStep::backward);
    const KronBackward args{rows(dy),         rows(x),        o.left.data(),
                            o.right_0.data(), o.right.data(), p.factors.scaling,
                            pointer(dx),      pointer(da),    pointer(db)};
#ifdef QRLORA_WITH_AMX
    if (tiles) return amx::kron_backward(p.shape, args);
#endif
    QRLORA_DISPATCH(kron_backward, p.shape, p.dtype, args);
}

}  // namespace

void bind_kron(py::module_& m) {
    m.def("kron_forward", &kron_forward, "y = sum_t L_t (X R_t) per token; see qrlora/cpu/kron.h");
    m.def("kron_backward", &kron_backward,
          "dA, dB and the update's dX in one pass; see qrlora/cpu/kron.h");
}

}  // namespace qrlora
