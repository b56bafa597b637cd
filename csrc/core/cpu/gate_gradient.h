// The gradient of gates in fp32 and fp64, dG = s Σ_m h ∘ g or s hᵀ g, of each adapter over its
// rows.
#pragma once

#include <algorithm>
#include <numeric>
#include <vector>

#include "columns.h"
#include "qrlora/cpu/low_rank.h"

namespace qrlora::QRLORA_ISA {

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

template <typename T>
class GateGradient {
  public:
    GateGradient(const LowRank& shape, bool wanted, int team)
        : d(shape),
          scaling(static_cast<T>(shape.scaling)),
          threads(team),
          // Without a token there is no index to point to, and still a gradient for each adapter.
          sorts_(wanted && (d.index || d.adapters > 1)) {
        if (sorts_) by_adapter_.sort(d);
    }

    // Whether rows are sorted by adapter.
    bool sorts() const { return sorts_; }

    // dG of each gate; `room` is for twice the rows where they are sorted.
    void compute(Team team, const T* h, const T* g, T* room, T* dgate) const {
        if (!sorts_) {
            const int64_t all_rows[] = {0, d.m};
            return of_gates(team, all_rows, h, g, dgate);
        }
        T *sorted_h = room, *sorted_g = room + d.m * d.r;
        gather(team, by_adapter_.rows, h, sorted_h);
        gather(team, by_adapter_.rows, g, sorted_g);
        team.barrier();
        of_gates(team, by_adapter_.starts.data(), sorted_h, sorted_g, dgate);
    }

  private:
    void gather(Team team, const std::vector<int64_t>& numbers, const T* rows, T* out) const {
        team.for_static(
            d.m, [&](int64_t i) { std::copy_n(rows + numbers[i] * d.r, d.r, out + i * d.r); });
    }

    // dG of each gate, from its rows starts[a] to starts[a + 1] of h and g.
    void of_gates(Team team, const int64_t* starts, const T* h, const T* g, T* dgate) const {
        const bool shared = d.core && !d.index && d.m <= chunk;  // so small that all take a part
        const int64_t block = shared ? (d.r + threads - 1) / threads : core_block;
        const int64_t blocks = (d.r + block - 1) / block;
        team.for_static(d.adapters * blocks, [&](int64_t task) {
            const int64_t a = task / blocks, first = task % blocks * block;
            const int64_t last = std::min(d.r, first + block), from = starts[a] * d.r;
            const int64_t rows = starts[a + 1] - starts[a];
            T* out = dgate + a * (d.core ? d.r * d.r : d.r);
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

    static constexpr int64_t chunk = 1024, core_block = 64;

    const LowRank& d;
    const T scaling;
    const int threads;
    const bool sorts_;
    RowsByAdapter by_adapter_;
};

}  // namespace qrlora::QRLORA_ISA
