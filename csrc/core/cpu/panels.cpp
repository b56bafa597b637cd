// Products by a matrix in panels, of fp32 and fp64, on a team of threads. Every sum is one
// thread's, so that its bits do not depend on their number.
#include "qrlora/cpu/panels.h"

#include "columns.h"
#include "panels.h"

namespace qrlora::QRLORA_ISA {

namespace {

// The size of parts of `count`, each of whole units, so that every thread has one.
int64_t share(int64_t count, int64_t unit, int threads) {
    const int64_t units = (count + unit - 1) / unit;
    return std::max<int64_t>(1, (units + threads - 1) / threads) * unit;
}

template <typename T>
void pack(const PackPanels& d) {
    constexpr int64_t width = panel_width<T>;
    auto* panels = static_cast<T*>(d.panels);
    const int threads = useful_threads(d.threads, 1, d.columns, d.depth);
    in_parallel(threads, 0, [&](Team team) {
        over_blocks(team, d.columns, width, [&](int64_t first, int64_t last) {
            pack_panels(layout<T>(d.b), d.depth, first, last, panels + first * d.depth);
        });
    });
}

// The addend, and with a bias their sum in C.
template <typename T>
Start<T> start_of(const T* addend, const T* bias, int64_t rows, int64_t columns, T* c, int64_t ld) {
    if (!bias) return {addend, ld};
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < columns; ++j) c[i * ld + j] = addend[i * ld + j] + bias[j];
    return {c, ld};
}

template <typename T>
void times(const TimesPanels& d) {
    const auto x = layout<T>(d.x);
    const auto *panels = static_cast<const T*>(d.panels), *bias = static_cast<const T*>(d.bias);
    const auto *mid = static_cast<const T*>(d.mid), *beside = static_cast<const T*>(d.mid_panels);
    const auto* addend = static_cast<const T*>(d.addend);
    auto* y = static_cast<T*>(d.y);
    const int threads = useful_threads(d.threads, d.m, d.n, d.k);
    // A thread that has columns of its own reads its own panels only.
    const int64_t count = (d.n + panel_width<T> - 1) / panel_width<T>;
    const bool by_columns = count >= 4 * threads || count % threads == 0;
    const auto block = [&](Team team, int64_t i, int64_t rows, int64_t j, int64_t columns) {
        auto* part = reinterpret_cast<T*>(team.scratch());
        T* out = y + i * d.n + j;
        Start<T> start{bias ? bias + j : nullptr, 0};
        if (addend) start = start_of(addend + i * d.n + j, start.data, rows, columns, out, d.n);
        times_panels<T>(rows, x.data + i * x.row, x.row, d.k, panels + j * d.k, columns, start, out,
                        d.n, part);
        if (d.r)
            times_panels<T>(rows, mid + i * d.r, d.r, d.r, beside + j * d.r, columns, {out, d.n},
                            out, d.n, part);
    };
    in_parallel(threads, panel_room<T> * static_cast<int64_t>(sizeof(T)), [&](Team team) {
        if (by_columns)
            over_blocks(team, d.n, share(d.n, panel_width<T>, threads),
                        [&](int64_t j, int64_t end) { block(team, 0, d.m, j, end - j); });
        else
            over_blocks(team, d.m, share(d.m, PANEL_ROWS, threads),
                        [&](int64_t i, int64_t end) { block(team, i, end - i, 0, d.n); });
    });
}

int64_t elements(DType dtype, int64_t depth, int64_t columns) {
    return depth *
           (dtype == DType::f64 ? whole_panels<double>(columns) : whole_panels<float>(columns));
}

}  // namespace

const PanelKernels& panel_kernels() {
    static constexpr PanelKernels kernels{
        elements,
        [](const PackPanels& d) { d.dtype == DType::f64 ? pack<double>(d) : pack<float>(d); },
        [](const TimesPanels& d) { d.dtype == DType::f64 ? times<double>(d) : times<float>(d); },
    };
    return kernels;
}

}  // namespace qrlora::QRLORA_ISA
