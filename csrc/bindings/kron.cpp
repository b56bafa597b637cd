// Kronecker kernels on the module: pointers come as integers, sizes as int64.
#include "qrlora/cpu/kron.h"

#include <stdexcept>

#include "qrlora/bindings.h"
#include "qrlora/cpu/amx.h"
#include "qrlora/isa.h"

namespace py = pybind11;

namespace qrlora {

namespace {

void check(bool tiles) {
    if (tiles && !amx::available()) throw std::runtime_error("AMX is not available here");
}

void kron_forward(int64_t tokens, int64_t n, int64_t r, int64_t k, int64_t terms, int64_t dtype,
                  int64_t x, int64_t x_stride, int64_t left, int64_t right, int64_t y, bool tiles,
                  int threads) {
    const KronShape shape{tokens, n, r, k, terms, threads};
    check(tiles);
    py::gil_scoped_release release;
#ifdef QRLORA_WITH_AMX
    if (tiles)
        return amx::kron_forward(shape, {pointer(x), x_stride}, pointer<bf16>(left),
                                 pointer<bf16>(right), pointer<bf16>(y));
#endif
    QRLORA_DISPATCH(kron_forward, shape, static_cast<DType>(dtype), KronRows{pointer(x), x_stride},
                    pointer(left), pointer(right), pointer(y));
}

void kron_backward(int64_t tokens, int64_t n, int64_t r, int64_t k, int64_t terms, int64_t dtype,
                   int64_t dy, int64_t dy_stride, int64_t x, int64_t x_stride, int64_t left_t,
                   int64_t right, int64_t right_t, double scaling, int64_t dx, int64_t da,
                   int64_t db, bool tiles, int threads) {
    const KronShape shape{tokens, n, r, k, terms, threads};
    const KronBackward args{{pointer(dy), dy_stride},
                            {pointer(x), x_stride},
                            pointer(left_t),
                            pointer(right),
                            pointer(right_t),
                            scaling,
                            pointer(dx),
                            pointer(da),
                            pointer(db)};
    check(tiles);
    py::gil_scoped_release release;
#ifdef QRLORA_WITH_AMX
    if (tiles) return amx::kron_backward(shape, args);
#endif
    QRLORA_DISPATCH(kron_backward, shape, static_cast<DType>(dtype), args);
}

}  // namespace

void bind_kron(py::module_& m) {
    m.def("kron_forward", &kron_forward, "y = sum_t L_t (X R_t) per token; see qrlora/cpu/kron.h");
    m.def("kron_backward", &kron_backward,
          "dA, dB and the update's dX in one pass; see qrlora/cpu/kron.h");
}

}  // namespace qrlora
