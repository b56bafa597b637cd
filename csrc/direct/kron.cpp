// OHoRA on the tensors themselves: the update, and the base product onto it unless the library's is
// preferred.
#include "qrlora/cpu/kron.h"

#include "calls.h"
#include "choices.h"
#include "operands.h"
#include "qrlora/cpu/linear_add.h"

namespace py = pybind11;

namespace qrlora {

namespace {

struct Problem {
    int64_t m, n, k;
    DType dtype;  // of the activations and the weight
    Strided2d weight;
    KronShape shape;
    KronFactors factors;

    Runs runs(PyObject* x, Step step) const {
        return choices->runs(x, {Operation::kron_linear, step, dtype, m, n, k, shape.r});
    }
    // bf16 is taken on the tile unit alone.
    bool tiles() const { return dtype == DType::bf16; }
    int64_t multiplications() const { return m * (n * k + shape.terms * shape.r * (n + k)); }
};

// factors: a, b, a0, b0; m and dtype are the caller's.
bool operands(PyObject* weight, PyObject* const* factors, PyObject* scaling, Problem& p) {
    const auto w = read(weight), a = read(factors[0]);
    if (!w || w->ndim != 2 || !a || a->ndim != 2 || !trainable(*a, p.dtype)) return false;
    p.n = w->shape[0], p.k = w->shape[1];
    const int64_t r = a->shape[1];
    if (p.n < 1 || p.k < 1 || r < 1 || p.n % r || p.k % r) return false;
    const bool start = factors[2] != Py_None;
    if (start != (factors[3] != Py_None)) return false;
    p.shape = {p.m, p.n / r, r, p.k / r, start ? 2 : 1, num_threads()};
    p.factors.dtype = *dtype_of(*a);
    const void** to[] = {&p.factors.a, &p.factors.b, &p.factors.a0, &p.factors.b0};
    for (int i = 0; i < (start ? 4 : 2); ++i) {
        const auto t = read(factors[i]);
        if (!t || t->ndim != 2 || dtype_of(*t) != p.factors.dtype || !is_contiguous(*t) ||
            t->shape[0] != (i % 2 ? p.shape.k : p.shape.n) || t->shape[1] != r)
            return false;
        *to[i] = t->data;
    }
    return number(scaling, p.factors.scaling) && matrix(*w, p.dtype, p.weight);
}

}  // namespace

py::object kron_forward_call(PyObject* const* args) {
    PyObject *x = args[0], *weight = args[1], *const *factors = args + 3;
    const auto given = read(x);
    if (!given || !in_plain_mode()) return py::none();
    Problem p{};
    p.dtype = *dtype_of(*given);
    int64_t columns = 0;
    Strided2d tokens{};
    const void* b = nullptr;
    bool record = false;
    if (!rows(*given, p.m, columns, tokens) || !operands(weight, factors, args[7], p) ||
        columns != p.k || !bias(args[2], p.dtype, p.n, b) ||
        !gradients_fit({weight, factors[2], factors[3]}, {x, args[2], factors[0], factors[1]},
                       record))
        return py::none();
    const Runs runs = p.runs(x, Step::forward);
    if (runs == Runs::elsewhere) return py::none();
    const py::object result = new_like(x, *given, p.n);
    void* y = data(result);
    const bool whole = runs == Runs::here;
    without_gil(p.multiplications(), [&] {
        kron_forward(p.shape, p.dtype, p.factors, {tokens.data, tokens.row}, y, p.tiles());
        if (whole) linear_add({p.m, p.n, p.k, p.dtype, tokens, p.weight, b, y, y, p.shape.threads});
    });
    return py::make_tuple(result, whole, record);
}

py::object kron_backward_call(PyObject* const* args) {
    PyObject *dy = args[0], *x = args[1], *const *factors = args + 3;
    const bool need_dx = args[8] == Py_True;
    const auto given = read(dy), given_x = read(x);
    if (!given || !given_x || !in_plain_mode()) return py::none();
    Problem p{};
    p.dtype = *dtype_of(*given);
    int64_t tokens = 0, columns = 0, columns_of_x = 0;
    Strided2d rows_of_dy{}, rows_of_x{};
    if (dtype_of(*given_x) != p.dtype || !rows(*given, p.m, columns, rows_of_dy) ||
        !rows(*given_x, tokens, columns_of_x, rows_of_x) || tokens != p.m ||
        !operands(args[2], factors, args[7], p) || columns != p.n || columns_of_x != p.k)
        return py::none();
    const Runs runs = p.runs(dy, Step::backward);
    if (runs == Runs::elsewhere) return py::none();
    // Without dx the start does not matter: dA and dB are those of the whole product.
    if (!need_dx) p.shape.terms = 1;
    KronBackward io{};
    py::object dx = py::none();
    if (need_dx) {
        dx = new_like(dy, *given, p.k);
        io.dx = data(dx);
    }
    Gradient da(args[9] == Py_True, factors[0]), db(args[10] == Py_True, factors[1]);
    io.dy = {rows_of_dy.data, rows_of_dy.row};
    io.x = {rows_of_x.data, rows_of_x.row};
    io.da = da.sums();
    io.db = db.sums();
    const bool whole = runs == Runs::here;
    without_gil(p.multiplications(), [&] {
        kron_backward(p.shape, p.dtype, p.factors, io, p.tiles());
        if (whole && need_dx)
            linear_add({p.m, p.k, p.n, p.dtype, rows_of_dy, transposed(p.weight), nullptr, io.dx,
                        io.dx, p.shape.threads});
    });
    return py::make_tuple(dx, da.finished(), db.finished(), whole);
}

}  // namespace qrlora
