// Few tokens in fp32 and fp64.
#include "qrlora/cpu/low_rank.h"

#include <algorithm>
#include <numeric>
#include <vector>

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

// Each adapter's rows in their order, those of adapter a at rows[starts[a]] to rows[starts[a + 1]].
struct RowsByAdapter {
    std::vector<int64_t> starts, rows;

    void sort(const LowRank& d) {
        starts.assign(d.adapters + 1, 0);
        for (int64_t i = 0; i < d.m; ++i) ++starts[d.index[i] + 1];
        std::partial_sum(starts.begin(), starts.end(), starts.begin());
        rows.resize(d.m);
        std::vector<int64_t> next(starts.begin(), starts.end() - 1);
        for (int64_t i = 0; i < d.m; ++i) rows[next[d.index[i]]++] = i;
    }
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

    int64_t gate_size() const { return d.core ? d.r * d.r : d.r; }
    // The gate of row i; as a core, transposed where `turned`.
    const T* gate(int64_t i) const {
        return static_cast<const T*>(d.gate) + (d.index ? d.index[i] * gate_size() : 0);
    }
    Layout<T> core(int64_t i, bool turned) const {
        return {gate(i), turned ? 1 : d.r, turned ? d.r : 1};
    }

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
                        for (int64_t i = 0; i < d.m; ++i) {
                            const T* lam = gate(i);
                            for (int64_t j = first; j < last; ++j)
                                mid[i * d.r + j] = scaling * lam[j] * inner[i * d.r + j];
                        }
                    });
    }

    // mid [m, r] = s inner G, or s inner Gᵀ where `turned`, for cores G.
    void through_core(Team team, const T* inner, bool turned, T* mid) const {
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

    void gather(Team team, const std::vector<int64_t>& numbers, const T* rows, T* out) const {
        team.for_static(
            d.m, [&](int64_t i) { std::copy_n(rows + numbers[i] * d.r, d.r, out + i * d.r); });
    }

    // dG of each gate, from its rows starts[a] to starts[a + 1] of h and g.
    void gate_gradient(Team team, const int64_t* starts, const T* h, const T* g, T* dgate) const {
        const bool shared = d.core && !d.index && d.m <= chunk;  // so small that all take a part
        const int64_t block = shared ? (d.r + threads - 1) / threads : core_block;
        const int64_t blocks = (d.r + block - 1) / block;
        team.for_static(d.adapters * blocks, [&](int64_t task) {
            const int64_t a = task / blocks, first = task % blocks * block;
            const int64_t last = std::min(d.r, first + block), from = starts[a] * d.r;
            const int64_t rows = starts[a + 1] - starts[a];
            T* out = dgate + a * gate_size();
            if (d.core)
                core_gradient(h + from, g + from, rows, first, last, out);
            else
                diagonal_gradient(h + from, g + from, rows, first, last, out);
        });
    }

    // Elements [first, last) of dλ = s Σ_m h ∘ g, over so many rows.
    void diagonal_gradient(const T* h, const T* g, int64_t rows, int64_t first, int64_t last,
                           T* dlam) const {
        if (rows == 0) return std::fill(dlam + first, dlam + last, T(0));
        double sum[core_block] = {};
        for (int64_t i = 0; i < rows; ++i)
            for (int64_t j = first; j < last; ++j)
                sum[j - first] += static_cast<double>(h[i * d.r + j]) * g[i * d.r + j];
        for (int64_t j = first; j < last; ++j) dlam[j] = static_cast<T>(d.scaling * sum[j - first]);
    }

    // Rows [first, last) of dC = s hᵀ g: threads that share one would write to the same cache
    // lines.
    void core_gradient(const T* h, const T* g, int64_t rows, int64_t first, int64_t last,
                       T* dcore) const {
        T* out = dcore + first * d.r;
        const int64_t size = (last - first) * d.r;
        std::fill(out, out + size, T(0));
        if (rows <= chunk)
            add_rows<T>(last - first, {h + first, 1, d.r}, {g, d.r, 1}, rows, 0, d.r, out, d.r);
        else
            add_chunks(h + first, g, rows, last - first, out);
        if (scaling == 1 || rows == 0) return;
        for (int64_t i = 0; i < size; ++i) out[i] *= scaling;
    }

    // `height` rows of dC += hᵀ g over many tokens, which are summed in chunks and the chunks in
    // order: a long sum is made of short ones, which keeps its error low.
    void add_chunks(const T* h, const T* g, int64_t rows, int64_t height, T* out) const {
        for (int64_t j0 = 0; j0 < d.r; j0 += core_block) {
            const int64_t columns = std::min(core_block, d.r - j0);
            for (int64_t m0 = 0; m0 < rows; m0 += chunk) {
                T part[core_block * core_block] = {};
                add_rows<T>(height, {h + m0 * d.r, 1, d.r}, {g + m0 * d.r + j0, d.r, 1},
                            std::min(chunk, rows - m0), 0, columns, part, core_block);
                for (int64_t i = 0; i < height; ++i)
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
            pass.through_core(team, h, false, mid);
            team.barrier();
        }
        pass.out_of_rank(team, x, transposed_layout<T>(d.weight), d.k, mid,
                         transposed_layout<T>(d.up), static_cast<const T*>(io.bias), d.n,
                         static_cast<T*>(io.y));
    });
}

template <typename T>
void backward(const LowRank& d, const LowRankBackward& io) {
    auto *dgate = static_cast<T*>(io.dgate), *dx = static_cast<T*>(io.dx);
    const auto* h = static_cast<const T*>(io.h);
    // Without a token there is no index to point to, and still a gradient for each adapter.
    const bool sorts = dgate && (d.index || d.adapters > 1);
    const int64_t size = d.m * d.r, taken = (sorts ? 4 : 2) * size;
    AlignedBuffer<T> large;
    T *g = scratch(large, taken).reserve(taken), *mid = g + size;
    RowsByAdapter by_adapter;
    if (sorts) by_adapter.sort(d);
    const Pass<T> pass(d);
    const auto dy = layout<T>(io.dy);
    pass.run([&](Team team) {
        pass.into_rank(team, dy, layout<T>(d.up), d.n, g, mid);
        team.barrier();
        if (sorts) {
            T *sorted_h = mid + size, *sorted_g = sorted_h + size;
            pass.gather(team, by_adapter.rows, h, sorted_h);
            pass.gather(team, by_adapter.rows, g, sorted_g);
            team.barrier();
            pass.gate_gradient(team, by_adapter.starts.data(), sorted_h, sorted_g, dgate);
        } else if (dgate) {
            const int64_t all_rows[] = {0, d.m};
            pass.gate_gradient(team, all_rows, h, g, dgate);
        }
        if (!dx) return;
        if (d.core) {
            pass.through_core(team, g, true, mid);
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
