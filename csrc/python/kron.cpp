// The Kronecker update on the module: on addresses, and with the base product on the tensors
// themselves.
#include "qrlora/cpu/kron.h"

#include <tuple>

#include "bindings.h"
#include "calls.h"
#include "operands.h"
#include "plans.h"
#include "qrlora/cpu/linear_add.h"

namespace py = pybind11;

namespace qrlora {

namespace {

// --- on addresses

// (tokens, n, r, k, dtype, threads) of the activations
using ShapeArgs = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int>;
// (a, b, a0, b0, dtype, scaling), contiguous; a0 and b0 are 0 without a start
using FactorArgs = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, double>;
using RowsArgs = std::tuple<int64_t, int64_t>;  // (address, stride)

struct Update {
    KronShape shape;
    DType dtype;
    KronFactors factors;
    const Column& column;

    Update(int64_t code, const ShapeArgs& s, const FactorArgs& f)
        : dtype(checked_dtype(std::get<4>(s))), column(column_of(code, {Operation::kron, dtype})) {
        const auto& [tokens, n, r, k, number, threads] = s;
        const auto& [a, b, a0, b0, of_factors, scaling] = f;
        shape = {tokens, n, r, k, a0 ? 2 : 1, threads};
        factors = {pointer(a), pointer(b), pointer(a0), pointer(b0), checked_dtype(of_factors),
                   scaling};
    }
};

KronRows rows(const RowsArgs& args) { return {pointer(std::get<0>(args)), std::get<1>(args)}; }

void forward(int64_t code, const ShapeArgs& shape, const RowsArgs& x, const FactorArgs& factors,
             int64_t y) {
    const Update u(code, shape, factors);
    py::gil_scoped_release release;
    kron_forward(u.column, u.shape, u.dtype, u.factors, rows(x), pointer(y));
}

void backward(int64_t code, const ShapeArgs& shape, const RowsArgs& dy, const RowsArgs& x,
              const FactorArgs& factors, int64_t dx, int64_t da, int64_t db) {
    const Update u(code, shape, factors);
    KronBackward args{};
    args.dy = rows(dy), args.x = rows(x);
    args.dx = pointer(dx), args.da = pointer(da), args.db = pointer(db);
    py::gil_scoped_release release;
    kron_backward(u.column, u.shape, u.dtype, u.factors, args);
}

// --- on tensors

struct Operands {
    int64_t m, n, k;
    DType dtype;  // of the activations and the weight
    Strided2d weight;
    KronShape shape;
    KronFactors factors;
    bool panels;  // of W are kept too

    int64_t multiplications() const { return m * (n * k + shape.terms * shape.r * (n + k)); }
    std::optional<Plan> plan(Step step, int64_t needs, bool bias) const {
        const int64_t layout = panels ? 2 : weight.col != 1;
        return plans->find(
            {Operation::kron, step, dtype, m, n, k, shape.r, Gate::vector, layout, needs, bias},
            shape.threads);
    }
};

// factors: a, b, a0, b0; m and dtype are the caller's.
bool operands(PyObject* weight, PyObject* const* factors, PyObject* scaling, Operands& p) {
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
    if (!in_plain_mode()) return py::none();  // before anything asks a tensor, which a mode hears
    const auto given = read(x);
    if (!given) return py::none();
    Operands p{};
    p.dtype = *dtype_of(*given);
    p.panels = args[8] != Py_None;
    int64_t columns = 0;
    Strided2d tokens{};
    const void* b = nullptr;
    bool record = false;
    if (!rows(*given, p.m, columns, tokens) || !operands(weight, factors, args[7], p) ||
        columns != p.k || !bias(args[2], p.dtype, p.n, b) ||
        !gradients_fit({weight, factors[2], factors[3]}, {x, args[2], factors[0], factors[1]},
                       record))
        return py::none();
    const auto plan = p.plan(Step::forward, 0, b != nullptr);
    if (!plan) return not_told();
    if (plan->recipe.runs == Recipe::elsewhere) return py::none();
    const Column& column = *plan->recipe.column;
    const bool whole = plan->recipe.runs == Recipe::whole;
    const py::object result = new_like(x, *given, p.n);
    void* y = data(result);
    without_gil(p.multiplications(), [&] {
        kron_forward(column, p.shape, p.dtype, p.factors, {tokens.data, tokens.row}, y);
        if (whole)
            column.linear_add({p.m, p.n, p.k, p.dtype, tokens, p.weight, b, y, y, p.shape.threads});
    });
    return py::make_tuple(result, whole ? py::none() : plan->choice, record);
}

py::object kron_backward_call(PyObject* const* args) {
    PyObject *dy = args[0], *x = args[1], *const *factors = args + 3;
    const bool need_dx = args[8] == Py_True, need_da = args[9] == Py_True;
    const bool need_db = args[10] == Py_True;
    if (!in_plain_mode()) return py::none();
    const auto given = read(dy), given_x = read(x);
    if (!given || !given_x) return py::none();
    Operands p{};
    p.dtype = *dtype_of(*given);
    p.panels = args[11] != Py_None;
    int64_t tokens = 0, columns = 0, columns_of_x = 0;
    Strided2d rows_of_dy{}, rows_of_x{};
    if (dtype_of(*given_x) != p.dtype || !rows(*given, p.m, columns, rows_of_dy) ||
        !rows(*given_x, tokens, columns_of_x, rows_of_x) || tokens != p.m ||
        !operands(args[2], factors, args[7], p) || columns != p.n || columns_of_x != p.k)
        return py::none();
    const auto plan = p.plan(Step::backward, need_dx + 2 * need_da + 4 * need_db, false);
    if (!plan) return not_told();
    if (plan->recipe.runs == Recipe::elsewhere) return py::none();
    const Column& column = *plan->recipe.column;
    const bool whole = plan->recipe.runs == Recipe::whole;
    // Without dx the start does not matter: dA and dB are those of the whole product.
    if (!need_dx) p.shape.terms = 1;
    KronBackward io{};
    py::object dx = py::none();
    if (need_dx) {
        dx = new_like(dy, *given, p.k);
        io.dx = data(dx);
    }
    Gradient da(need_da, factors[0]), db(need_db, factors[1]);
    io.dy = {rows_of_dy.data, rows_of_dy.row};
    io.x = {rows_of_x.data, rows_of_x.row};
    io.da = da.sums();
    io.db = db.sums();
    without_gil(p.multiplications(), [&] {
        kron_backward(column, p.shape, p.dtype, p.factors, io);
        if (whole && need_dx)
            column.linear_add({p.m, p.k, p.n, p.dtype, rows_of_dy, transposed(p.weight), nullptr,
                               io.dx, io.dx, p.shape.threads});
    });
    const bool base_is_due = need_dx && !whole;
    return py::make_tuple(dx, da.finished(), db.finished(),
                          base_is_due ? plan->choice : py::none());
}

void bind_kron(py::module_& m) {
    m.def("kron_forward", &forward, "y = sum_t L_t (X R_t) per token; see qrlora/cpu/kron.h");
    m.def("kron_backward", &backward,
          "dA, dB and the update's dX in one pass; see qrlora/cpu/kron.h");
}

}  // namespace qrlora
