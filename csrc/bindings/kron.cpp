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

// (tokens, n, r, k, dtype, threads) of the activations
using ShapeArgs = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int>;
// (a, b, a0, b0, dtype, scaling), contiguous; a0 and b0 are 0 without a start
using FactorArgs = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, double>;
using RowsArgs = std::tuple<int64_t, int64_t>;  // (address, stride)

struct Problem {
    KronShape shape;
    DType dtype;
    KronFactors factors;

    Problem(const ShapeArgs& s, const FactorArgs& f, bool tiles) {
        const auto& [tokens, n, r, k, of_x, threads] = s;
        const auto& [a, b, a0, b0, of_factors, scaling] = f;
        shape = {tokens, n, r, k, a0 ? 2 : 1, threads};
        dtype = static_cast<DType>(of_x);
        factors = {pointer(a), pointer(b), pointer(a0), pointer(b0), static_cast<DType>(of_factors),
                   scaling};
        if (tiles && checked_dtype(of_x) != DType::bf16)
            throw std::runtime_error("the tile unit computes in bf16");
    }
};

KronRows rows(const RowsArgs& args) { return {pointer(std::get<0>(args)), std::get<1>(args)}; }

void forward(const ShapeArgs& shape, const RowsArgs& x, const FactorArgs& factors, int64_t y,
             bool tiles) {
    const Problem p(shape, factors, tiles);
    py::gil_scoped_release release;
    kron_forward(p.shape, p.dtype, p.factors, rows(x), pointer(y), tiles);
}

void backward(const ShapeArgs& shape, const RowsArgs& dy, const RowsArgs& x,
              const FactorArgs& factors, int64_t dx, int64_t da, int64_t db, bool tiles) {
    const Problem p(shape, factors, tiles);
    KronBackward args{};
    args.dy = rows(dy), args.x = rows(x);
    args.dx = pointer(dx), args.da = pointer(da), args.db = pointer(db);
    py::gil_scoped_release release;
    kron_backward(p.shape, p.dtype, p.factors, args, tiles);
}

KronOperands operands(const KronShape& shape, DType dtype, const KronFactors& factors, bool tiles,
                      KronStep step) {
    const DType wide = dtype == DType::f64 ? DType::f64 : DType::f32;
    return kron_operands(shape, factors, tiles ? DType::bf16 : wide, step);
}

}  // namespace

void kron_forward(const KronShape& d, DType dtype, const KronFactors& factors, KronRows x, void* y,
                  bool tiles) {
    KronOperands o = operands(d, dtype, factors, tiles, KronStep::forward);
#ifdef QRLORA_WITH_AMX
    if (tiles)
        return amx::kron_forward(d, x, reinterpret_cast<bf16*>(o.left.data()),
                                 reinterpret_cast<bf16*>(o.right.data()), static_cast<bf16*>(y));
#endif
    QRLORA_DISPATCH(kron_forward, d, dtype, x, o.left.data(), o.right.data(), y);
}

void kron_backward(const KronShape& d, DType dtype, const KronFactors& factors, KronBackward args,
                   bool tiles) {
    KronOperands o = operands(d, dtype, factors, tiles, KronStep::backward);
    args.left_t = o.left.data();
    args.right = o.right_0.data();
    args.right_t = o.right.data();
    args.scaling = factors.scaling;
#ifdef QRLORA_WITH_AMX
    if (tiles) return amx::kron_backward(d, args);
#endif
    QRLORA_DISPATCH(kron_backward, d, dtype, args);
}

void bind_kron(py::module_& m) {
    m.def("kron_forward", &forward, "y = sum_t L_t (X R_t) per token; see qrlora/cpu/kron.h");
    m.def("kron_backward", &backward,
          "dA, dB and the update's dX in one pass; see qrlora/cpu/kron.h");
}

}  // namespace qrlora
