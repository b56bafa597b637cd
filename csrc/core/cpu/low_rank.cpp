// In fp32 and fp64: few tokens over operands where they lie, any number over panels.
#include "qrlora/cpu/low_rank.h"

#include <algorithm>

#include "columns.h"
#include "gate_gradient.h"
#include "panels.h"
#include "qrlora/cpu/buffer.h"

namespace qrlora::QRLORA_ISA {

namespace {

template <typename T>
void start_columns(int64_t m, const T* bias, int64_t first, int64_t last, T* c, int64_t ldc) {
    for (int64_t i = 0; i < m; ++i) {
        if (bias)
            std::copy(bias + first, bias + last, c + i * ldc + first);
        else
            std::fill(c + i * ldc + first, c + i * ldc + last, T(0));
    }
}

// A frozen matrix where it lies, and in panels, which are read in its place; null: there are none.
template <typename T>
struct Factor {
    Layout<T> lies;
    const T* panels;

    Factor(const Strided2d& b, const void* in_panels)
        : lies(layout<T>(b)), panels(static_cast<const T*>(in_panels)) {}
};

// One pass in a team of threads: what forward and backward have in common.
template <typename T>
struct Pass {
    const LowRank& d;
    T scaling;
    int threads;

    explicit Pass(const LowRank& shape)
        : d(shape),
          scaling(static_cast<T>(shape.scaling)),
          threads(useful_threads(d.threads, d.m, d.n, d.k)) {}

    // Whether products read panels: those that are given, or for many tokens some that are made of
    // the operands, a few at a time.
    bool by_panels() const { return d.panels.base || makes_panels(); }
    bool makes_panels() const { return !d.panels.base && !d.index && d.m >= MANY_ROWS; }
    // Elements of `packed` below.
    int64_t packed_core() const { return by_panels() && d.core ? whole_panels<T>(d.r) * d.r : 0; }
    // The gate of row i; as a core, transposed where `turned`.
    const T* gate(int64_t i) const {
        const int64_t size = d.core ? d.r * d.r : d.r;
        return static_cast<const T*>(d.gate) + (d.index ? d.index[i] * size : 0);
    }
    Layout<T> core(int64_t i, bool turned) const {
        return {gate(i), turned ? 1 : d.r, turned ? d.r : 1};
    }

    // Calls body(team) on every thread.
    template <typename Body>
    void run(const Body& body) const {
        constexpr int64_t size = sizeof(T);
        const int64_t room = makes_panels() ? made_panels_room<T>(std::max({d.n, d.k, d.r})) * size
                             : by_panels()  ? panel_room<T> * size
                                            : part_bytes<T>(d.m);
        in_parallel(threads, room, body);
    }

    // Calls body(block) for blocks of C [m, columns] = A B, shared among the threads of the team.
    template <typename Body>
    void over(Team team, const Factor<T>& b, int64_t columns, const Body& body) const {
        if (by_panels()) return over_shares<T>(team, d.m, columns, threads, body);
        over_blocks(team, columns, block_columns(d.m, b.lies, columns, threads),
                    [&](int64_t first, int64_t last) { body(Block{0, d.m, first, last - first}); });
    }

    // A block of C = bias + A B, or of C + A B where `onto`.
    void product(Team team, Block p, Layout<T> a, const Factor<T>& b, int64_t depth, const T* bias,
                 bool onto, T* c, int64_t ldc) const {
        a.data += p.i * a.row;
        c += p.i * ldc;
        Start<T> start{bias ? bias + p.j : nullptr, 0};
        if (onto) start = {c + p.j, ldc};
        if (b.panels)
            return times_panels(p.rows, a.data, a.row, depth, b.panels + p.j * depth, p.columns,
                                start, c + p.j, ldc, part(team));
        if (makes_panels())
            return times_made_panels(p.rows, a.data, a.row, depth, b.lies, p.j, p.columns, start,
                                     c + p.j, ldc, part(team));
        if (!onto) start_columns(p.rows, bias, p.j, p.j + p.columns, c, ldc);
        add_product(p.rows, a, b.lies, depth, p.j, p.j + p.columns, c, ldc, part(team));
    }

    // inner [m, r] = rows B, and with a diagonal gate mid = s inner ∘ λ.
    void into_rank(Team team, Layout<T> rows, const Factor<T>& b, int64_t depth, T* inner,
                   T* mid) const {
        over(team, b, d.r, [&](Block p) {
            product(team, p, rows, b, depth, nullptr, false, inner, d.r);
            if (d.core) return;
            for (int64_t i = p.i; i < p.i + p.rows; ++i) {
                const T* lam = gate(i);
                for (int64_t j = p.j; j < p.j + p.columns; ++j)
                    mid[i * d.r + j] = scaling * lam[j] * inner[i * d.r + j];
            }
        });
    }

    // mid [m, r] = s inner G, or s inner Gᵀ where `turned`, for cores G.
    void through_core(Team team, const T* inner, bool turned, T* packed, T* mid) const {
        if (by_panels()) return through_packed_core(team, inner, turned, packed, mid);
        const auto some_rows = [&](int64_t row, int64_t rows, int64_t first, int64_t last) {
            T* to = mid + row * d.r;
            start_columns<T>(rows, nullptr, first, last, to, d.r);
            add_product(rows, {inner + row * d.r, d.r, 1}, core(row, turned), d.r, first, last, to,
                        d.r, part(team));
            for (int64_t i = 0; i < rows; ++i)
                for (int64_t j = first; j < last; ++j) to[i * d.r + j] *= scaling;
        };
        if (!d.index)
            return over_blocks(
                team, d.r, block_columns(d.m, core(0, turned), d.r, threads),
                [&](int64_t first, int64_t last) { some_rows(0, d.m, first, last); });
        const int64_t block = cached_columns(d.m);  // what `part` has room for
        team.for_static(d.m, [&](int64_t row) {
            for (int64_t first = 0; first < d.r; first += block)
                some_rows(row, 1, first, std::min(d.r, first + block));
        });
    }

    // The same by panels of G, which is one for all rows.
    void through_packed_core(Team team, const T* inner, bool turned, T* packed, T* mid) const {
        over_blocks(team, d.r, panel_width<T>, [&](int64_t first, int64_t last) {
            pack_panels(core(0, turned), d.r, first, last, packed + first * d.r);
        });
        team.barrier();
        const Factor<T> gate({}, packed);
        over(team, gate, d.r, [&](Block p) {
            product(team, p, {inner, d.r, 1}, gate, d.r, nullptr, false, mid, d.r);
            for (int64_t i = p.i; i < p.i + p.rows; ++i)
                for (int64_t j = p.j; j < p.j + p.columns; ++j) mid[i * d.r + j] *= scaling;
        });
    }

    // out [m, columns] = bias + rows B + mid B'.
    void out_of_rank(Team team, Layout<T> rows, const Factor<T>& b, int64_t depth, const T* mid,
                     const Factor<T>& other, const T* bias, int64_t columns, T* out) const {
        over(team, b, columns, [&](Block p) {
            product(team, p, rows, b, depth, bias, false, out, columns);
            product(team, p, {mid, d.r, 1}, other, d.r, nullptr, true, out, columns);
        });
    }

    static T* part(Team team) { return reinterpret_cast<T*>(team.scratch()); }
};

template <typename T>
void forward(const LowRank& d, const LowRankForward& io) {
    const Pass<T> pass(d);
    const int64_t size = d.m * d.r, taken = size + pass.packed_core();
    AlignedBuffer<T> large;
    T *mid = scratch(large, taken).reserve(taken), *h = static_cast<T*>(io.h);
    const auto x = layout<T>(io.x);
    const Factor<T> base(transposed(d.weight), d.panels.base);
    const Factor<T> into(transposed(d.down), d.panels.into), out(transposed(d.up), d.panels.out);
    pass.run([&](Team team) {
        pass.into_rank(team, x, into, d.k, h, mid);
        team.barrier();
        if (d.core) {
            pass.through_core(team, h, false, mid + size, mid);
            team.barrier();
        }
        pass.out_of_rank(team, x, base, d.k, mid, out, static_cast<const T*>(io.bias), d.n,
                         static_cast<T*>(io.y));
    });
}

template <typename T>
void backward(const LowRank& d, const LowRankBackward& io) {
    auto *dgate = static_cast<T*>(io.dgate), *dx = static_cast<T*>(io.dx);
    const auto* h = static_cast<const T*>(io.h);
    const Pass<T> pass(d);
    const GateGradient<T> gradient(d, dgate != nullptr, pass.threads);
    const int64_t size = d.m * d.r, sorted = gradient.sorts() ? 2 * size : 0;
    const int64_t taken = 2 * size + sorted + pass.packed_core();
    AlignedBuffer<T> large;
    T *g = scratch(large, taken).reserve(taken), *mid = g + size;
    const auto dy = layout<T>(io.dy);
    const Factor<T> base(d.weight, d.panels.base);
    const Factor<T> into(d.up, d.panels.into), out(d.down, d.panels.out);
    pass.run([&](Team team) {
        pass.into_rank(team, dy, into, d.n, g, mid);
        team.barrier();
        if (dgate) gradient.compute(team, h, g, mid + size, dgate);
        if (!dx) return;
        if (d.core) {
            pass.through_core(team, g, true, mid + size + sorted, mid);
            team.barrier();
        }
        pass.out_of_rank(team, dy, base, d.n, mid, out, nullptr, d.k, dx);
    });
}

}  // namespace

void low_rank_forward(const LowRank& d, const LowRankForward& io) {
    d.dtype == DType::f64 ? forward<double>(d, io) : forward<float>(d, io);
}

void low_rank_backward(const LowRank& d, const LowRankBackward& io) {
    d.dtype == DType::f64 ? backward<double>(d, io) : backward<float>(d, io);
}

}  // namespace qrlora::QRLORA_ISA
