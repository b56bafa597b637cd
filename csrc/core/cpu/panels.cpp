// Products by a matrix in panels, of fp32 and fp64, on a team of threads. Every sum is one
// thread's, so that its bits do not depend on their number.
#include "qrlora/cpu/panels.h"

#include "columns.h"
#include "panels.h"

namespace qrlora::QRLORA_ISA {

namespace {

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

template <typename T>
void times(const TimesPanels& d) {
    const auto x = layout<T>(d.x);
    const auto *panels = static_cast<const T*>(d.panels), *bias = static_cast<const T*>(d.bias);
    const auto* addend = static_cast<const T*>(d.addend);
    auto* y = static_cast<T*>(d.y);
    const int threads = useful_threads(d.threads, d.m, d.n, d.k);
    in_parallel(threads, panel_room<T> * static_cast<int64_t>(sizeof(T)), [&](Team team) {
        over_shares<T>(team, d.m, d.n, threads, [&](Block p) {
            const int64_t at = p.i * d.n + p.j;
            Start<T> start{bias ? bias + p.j : nullptr, 0};
            if (addend) start = start_of(addend + at, start.data, p.rows, p.columns, y + at, d.n);
            times_panels<T>(p.rows, x.data + p.i * x.row, x.row, d.k, panels + p.j * d.k, p.columns,
                            start, y + at, d.n, reinterpret_cast<T*>(team.scratch()));
        });
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
