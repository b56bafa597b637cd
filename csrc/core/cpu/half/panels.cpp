// bf16 products by a matrix in panels; see qrlora/cpu/panels.h.
#include "qrlora/cpu/panels.h"

#include "../columns.h"
#include "gemm.h"
#include "pairs.h"
#include "tile.h"

namespace qrlora::QRLORA_ISA::half {

namespace {

int64_t whole_vectors(int64_t columns) { return (columns + lanes - 1) / lanes * lanes; }

int64_t elements(DType, int64_t depth, int64_t columns) {
    return 2 * whole_pairs(depth) * whole_vectors(columns);
}

void pack(const PackPanels& d) {
    const Matrix b = matrix(d.b);
    auto* panels = static_cast<bf16*>(d.panels);
    const int threads = useful_threads(d.threads, 1, d.columns, d.depth);
    in_parallel(threads, 0, [&](Team team) {
        over_blocks(team, d.columns, panel_width, [&](int64_t first, int64_t last) {
            pack_pairs({b.data + first * b.col, b.row, b.col}, d.depth, last - first,
                       whole_vectors(last - first), panels + first * 2 * whole_pairs(d.depth));
        });
    });
}

void times(const TimesPanels& d) {
    Gemm g{};
    g.m = d.m;
    g.n = d.n;
    g.products[g.count++] = {matrix(d.x), {}, d.k, static_cast<const bf16*>(d.panels)};
    g.bias = static_cast<const bf16*>(d.bias);
    g.addend = static_cast<const bf16*>(d.addend);
    g.c = d.y;
    g.ldc = d.n;
    g.threads = d.threads;
    gemm(g);
}

}  // namespace

const PanelKernels& panel_kernels() {
    static constexpr PanelKernels kernels{elements, pack, times};
    return kernels;
}

}  // namespace qrlora::QRLORA_ISA::half
