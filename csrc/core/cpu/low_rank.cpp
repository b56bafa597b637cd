// Few tokens in fp32 and fp64.
#include "qrlora/cpu/low_rank.h"

#include <algorithm>

#include "columns.h"
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

// One pass in a team of threads: what forward and backward have in common.
template <typename T>
struct Pass {
    const LowRank& d;
    const T* gate;
    T scaling;
    int threads;

    explicit Pass(const LowRank& shape)
        : d(shape),
          gate(static_cast<const T*>(shape.gate)),
          scaling(static_cast<T>(shape.scaling)),
          threads(useful_threads(d.threads, d.m, d.n, d.k)) {}

    // Calls body(team) on every thread.
    template <typename Body>
    void run(const Body& body) const {
        in_parallel(threads, part_bytes<T>(d.m), body);
    }

    // inner [m, r] = rows B, and with a diagonal gate mid = s inner ∘ λ.
    void into_rank(Team team, Layout<T> rows, Layout<T> b, int64_t depth, T* inner, T* mid) const {
        over_blocks(team, d.r, block_columns(d.m, b, d.r, threads),
                    [&](int64_t first, int64_t last) {
                        start_columns<T>(d.m, nullptr, first, last, inner, d.r);
                        add_product(d.m, rows, b, depth, first, last, inner, d.r, part(team));
                        if (d.core) return;
                        for (int64_t i = 0; i < d.m; ++i)
                            for (int64_t j = first; j < last; ++j)
                                mid[i * d.r + j] = scaling * gate[j] * inner[i * d.r + j];
                    });
    }

    // mid [m, r] = s inner G, for a core G.
    void through_core(Team team, const T* inner, Layout<T> core, T* mid) const {
        over_blocks(
            team, d.r, block_columns(d.m, core, d.r, threads), [&](int64_t first, int64_t last) {
                start_columns<T>(d.m, nullptr, first, last, mid, d.r);
                add_product(d.m, {inner, d.r, 1}, core, d.r, first, last, mid, d.r, part(team));
                for (int64_t i = 0; i < d.m; ++i)
                    for (int64_t j = first; j < last; ++j) mid[i * d.r + j] *= scaling;
            });
    }

    // out [m, columns] = bias + rows B + mid B'.
    void out_of_rank(Team team, Layout<T> rows, Layout<T> b, int64_t depth, const T* mid,
                     Layout<T> up, const T* bias, int64_t columns, T* out) const {
        over_blocks(team, columns, block_columns(d.m, b, columns, threads),
                    [&](int64_t first, int64_t last) {
                        start_columns(d.m, bias, first, last, out, columns);
                        add_product(d.m, rows, b, depth, first, last, out, columns, part(team));
                        add_product(d.m, {mid, d.r, 1}, up, d.r, first, last, out, columns,
                                    part(team));
                    });
    }

    // dλ = s Σ_m h ∘ g.
    void diagonal_gradient(Team team, const T* h, const T* g, T* dlam) const {
        over_blocks(team, d.r, 64, [&](int64_t first, int64_t last) {
            double sum[64] = {};
            for (int64_t i = 0; i < d.m; ++i)
                for (int64_t j = first; j < last; ++j)
                    sum[j - first] += static_cast<double>(h[i * d.r + j]) * g[i * d.r + j];
            for (int64_t j = first; j < last; ++j)
                dlam[j] = static_cast<T>(d.scaling * sum[j - first]);
        });
    }

    // dC = s hᵀ g, by its rows: threads that share a row of it write to the same cache lines.
    void core_gradient(Team team, const T* h, const T* g, T* dcore) const {
        const bool at_once = d.m <= chunk;
        over_blocks(team, d.r, at_once ? (d.r + threads - 1) / threads : core_block,
                    [&](int64_t first, int64_t last) {
                        const int64_t rows = last - first;
                        T* out = dcore + first * d.r;
                        std::fill(out, out + rows * d.r, T(0));
                        if (at_once)
                            add_rows<T>(rows, {h + first, 1, d.r}, {g, d.r, 1}, d.m, 0, d.r, out,
                                        d.r);
                        else
                            add_chunks(h + first, g, rows, out);
                        if (scaling == 1) return;
                        for (int64_t i = 0; i < rows * d.r; ++i) out[i] *= scaling;
                    });
    }

    // Rows of dC += hᵀ g over many tokens, which are summed in chunks and the chunks in order: a
    // long sum is made of short ones, which keeps its error low.
    void add_chunks(const T* h, const T* g, int64_t rows, T* out) const {
        for (int64_t j0 = 0; j0 < d.r; j0 += core_block) {
            const int64_t columns = std::min(core_block, d.r - j0);
            for (int64_t m0 = 0; m0 < d.m; m0 += chunk) {
                T part[core_block * core_block] = {};
                add_rows<T>(rows, {h + m0 * d.r, 1, d.r}, {g + m0 * d.r + j0, d.r, 1},
                            std::min(chunk, d.m - m0), 0, columns, part, core_block);
                for (int64_t i = 0; i < rows; ++i)
                    for (int64_t j = 0; j < columns; ++j)
                        out[i * d.r + j0 + j] += part[i * core_block + j];
            }
        }
    }

    static T* part(Team team) { return reinterpret_cast<T*>(team.scratch()); }

    static constexpr int64_t chunk = 1024, core_block = 64;
};

template <typename T>
void forward(const LowRank& d, const LowRankForward& io) {
    AlignedBuffer<T> large;
    T *mid = scratch(large, d.m * d.r).reserve(d.m * d.r), *h = static_cast<T*>(io.h);
    const Pass<T> pass(d);
    const auto x = layout<T>(io.x);
    pass.run([&](Team team) {
        pass.into_rank(team, x, transposed_layout<T>(d.down), d.k, h, mid);
        team.barrier();
        if (d.core) {
            pass.through_core(team, h, {pass.gate, d.r, 1}, mid);
            team.barrier();
        }
        pass.out_of_rank(team, x, transposed_layout<T>(d.weight), d.k, mid,
                         transposed_layout<T>(d.up), static_cast<const T*>(io.bias), d.n,
                         static_cast<T*>(io.y));
    });
}

template <typename T>
void backward(const LowRank& d, const LowRankBackward& io) {
    AlignedBuffer<T> large;
    T *g = scratch(large, 2 * d.m * d.r).reserve(2 * d.m * d.r), *mid = g + d.m * d.r;
    const Pass<T> pass(d);
    const auto dy = layout<T>(io.dy);
    const auto* h = static_cast<const T*>(io.h);
    auto *dgate = static_cast<T*>(io.dgate), *dx = static_cast<T*>(io.dx);
    pass.run([&](Team team) {
        pass.into_rank(team, dy, layout<T>(d.up), d.n, g, mid);
        team.barrier();
        if (dgate && d.core)
            pass.core_gradient(team, h, g, dgate);
        else if (dgate)
            pass.diagonal_gradient(team, h, g, dgate);
        if (!dx) return;
        if (d.core) {
            pass.through_core(team, g, {pass.gate, 1, d.r}, mid);
            team.barrier();
        }
        pass.out_of_rank(team, dy, layout<T>(d.weight), d.n, mid, layout<T>(d.down), nullptr, d.k,
                         dx);
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
