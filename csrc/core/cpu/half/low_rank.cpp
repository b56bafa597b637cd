// QR-LoRA and LoRA-XS in bf16 as a few products; see qrlora/cpu/low_rank.h.
#include "qrlora/cpu/low_rank.h"

#include <algorithm>

#include "gemm.h"
#include "qrlora/cpu/buffer.h"
#include "qrlora/cpu/parallel.h"
#include "vectors.h"

namespace qrlora::QRLORA_ISA::half {

namespace {

constexpr int64_t tokens_at_once = 8192;  // where the sum runs over tokens; bounds the scratch
constexpr int64_t DOTS = 4;               // sums of a column, each of every fourth token
constexpr int64_t DOT_COLUMNS = 64;       // that a thread sums at a time
constexpr int64_t DOT_WORK = 1 << 16;     // multiplications that are worth a thread

const bf16* as_panels(const void* panels) { return static_cast<const bf16*>(panels); }

Gemm product(const LowRank& d, int64_t m, int64_t n, Product first, void* c) {
    Gemm g{};
    g.m = m;
    g.n = n;
    g.products[0] = first;
    g.count = 1;
    g.c = c;
    g.ldc = n;
    g.threads = d.threads;
    return g;
}

// write(i, s G) for each element of the gate.
template <typename Write>
void over_gate(const LowRank& d, int64_t size, const Write& write) {
    const auto s = static_cast<float>(d.scaling);
    if (d.gate_dtype == DType::f32) {
        const auto* gate = static_cast<const float*>(d.gate);
        for (int64_t i = 0; i < size; ++i) write(i, s * gate[i]);
    } else {
        const auto* gate = static_cast<const bf16*>(d.gate);
        for (int64_t i = 0; i < size; ++i) write(i, s * to_float(gate[i]));
    }
}

// Elements [first, last) of out = scale sum_i (u ∘ v)[i, :] over u, v [m, n], in fp32 and in a
// fixed order; they are no more than DOT_COLUMNS.
void column_dots(int64_t m, int64_t n, int64_t first, int64_t last, const bf16* u, const bf16* v,
                 float scale, float* out) {
    float sums[DOTS][DOT_COLUMNS] = {};
    const int64_t columns = last - first;
    for (int64_t i = 0; i < m; ++i) {  // by rows: u and v may be too large for the cache
        const bf16 *left = u + i * n + first, *right = v + i * n + first;
        float* sum = sums[i % DOTS];
        int64_t j = 0;
        for (; j + lanes <= columns; j += lanes)
            store(sum + j,
                  load(sum + j) + widen(load_halves(left + j)) * widen(load_halves(right + j)));
        for (; j < columns; ++j) sum[j] += to_float(left[j]) * to_float(right[j]);
    }
    for (int64_t j = 0; j < columns; ++j)
        out[first + j] = ((sums[0][j] + sums[1][j]) + (sums[2][j] + sums[3][j])) * scale;
}

// What one call needs between its products.
struct Buffers {
    AlignedBuffer<bf16> inner, mid, core;
    AlignedBuffer<float> scale, part;
};

// mid [m, r] = s (rows B) G and inner = rows B; `turned`: Gᵀ, where G is a core.
void into_rank(const LowRank& d, Matrix rows, Matrix b, int64_t depth, bool turned, bf16* inner,
               bf16* mid, Buffers& scratch) {
    Gemm g = product(d, d.m, d.r, {rows, b, depth, as_panels(d.panels.into)}, inner);
    if (!d.core) {
        float* scale = scratch.scale.reserve(d.r);
        over_gate(d, d.r, [&](int64_t i, float v) { scale[i] = v; });
        g.column_scale = scale;
        g.scaled = mid;  // from the unrounded product
        return gemm(g);
    }
    gemm(g);
    bf16* core = scratch.core.reserve(d.r * d.r);
    over_gate(d, d.r * d.r, [&](int64_t i, float v) { core[i] = to_bf16(v); });
    const Matrix gate{core, turned ? 1 : d.r, turned ? d.r : 1};
    gemm(product(d, d.m, d.r, {{inner, d.r, 1}, gate, d.r}, mid));
}

// dG = s Σ_m h ∘ g, or s hᵀ g, in fp32.
void gate_gradient(const LowRank& d, const bf16* h, const bf16* g, float* out, Buffers& scratch) {
    const auto s = static_cast<float>(d.scaling);
    if (!d.core) {
        const auto useful =
            static_cast<int>(std::min<int64_t>(d.threads, 1 + d.m * d.r / DOT_WORK));
        return parallel_for(useful, (d.r + DOT_COLUMNS - 1) / DOT_COLUMNS, [&](int64_t block) {
            const int64_t first = block * DOT_COLUMNS, last = std::min(d.r, first + DOT_COLUMNS);
            column_dots(d.m, d.r, first, last, h, g, s, out);
        });
    }
    const int64_t size = d.r * d.r;
    const auto chunk = [&](int64_t i, float* to) {
        const int64_t tokens = std::min(tokens_at_once, d.m - i);
        Gemm sum = product(d, d.r, d.r, {{h + i * d.r, 1, d.r}, {g + i * d.r, d.r, 1}, tokens}, to);
        sum.fp32_out = true;
        gemm(sum);
    };
    chunk(0, out);
    for (int64_t i = tokens_at_once; i < d.m; i += tokens_at_once) {
        float* part = scratch.part.reserve(size);
        chunk(i, part);
        for (int64_t j = 0; j < size; ++j) out[j] += part[j];
    }
    for (int64_t j = 0; j < size; ++j) out[j] *= s;
}

}  // namespace

void low_rank_forward(const LowRank& d, const LowRankForward& io) {
    Buffers large;
    Buffers& scratch = qrlora::scratch(large, d.m * d.r);
    bf16* mid = scratch.mid.reserve(d.m * d.r);
    const Matrix x = matrix(io.x);
    into_rank(d, x, matrix(transposed(d.down)), d.k, false, static_cast<bf16*>(io.h), mid, scratch);
    Gemm g = product(d, d.m, d.n, {x, matrix(transposed(d.weight)), d.k, as_panels(d.panels.base)},
                     io.y);
    g.products[g.count++] = {{mid, d.r, 1}, matrix(transposed(d.up)), d.r, as_panels(d.panels.out)};
    g.bias = static_cast<const bf16*>(io.bias);
    gemm(g);
}

void low_rank_backward(const LowRank& d, const LowRankBackward& io) {
    Buffers large;
    Buffers& scratch = qrlora::scratch(large, d.m * d.r);
    bf16 *inner = scratch.inner.reserve(d.m * d.r), *mid = scratch.mid.reserve(d.m * d.r);
    const Matrix dy = matrix(io.dy);
    into_rank(d, dy, matrix(d.up), d.n, true, inner, mid, scratch);
    if (io.dgate)
        gate_gradient(d, static_cast<const bf16*>(io.h), inner, static_cast<float*>(io.dgate),
                      scratch);
    if (!io.dx) return;
    Gemm g = product(d, d.m, d.k, {dy, matrix(d.weight), d.n, as_panels(d.panels.base)}, io.dx);
    g.products[g.count++] = {{mid, d.r, 1}, matrix(d.down), d.r, as_panels(d.panels.out)};
    gemm(g);
}

}  // namespace qrlora::QRLORA_ISA::half
