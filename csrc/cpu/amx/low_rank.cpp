// QR-LoRA and LoRA-XS in bf16 as a few products on the tile unit; see qrlora/cpu/low_rank.h.
#include "qrlora/cpu/low_rank.h"

#include <algorithm>

#include "qrlora/cpu/amx.h"
#include "qrlora/cpu/buffer.h"

namespace qrlora::amx {

namespace {

constexpr int64_t tokens_at_once = 8192;  // where the sum runs over tokens; bounds the scratch

Matrix matrix(const Strided2d& m) { return {static_cast<const bf16*>(m.data), m.row, m.col}; }

Matrix transposed(const Strided2d& m) { return {static_cast<const bf16*>(m.data), m.col, m.row}; }

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

float gate_at(const LowRank& d, int64_t i) {
    return d.gate_dtype == DType::f32 ? static_cast<const float*>(d.gate)[i]
                                      : to_float(static_cast<const bf16*>(d.gate)[i]);
}

// What one call needs between its products.
struct Scratch {
    AlignedBuffer<bf16> inner, mid, core;
    AlignedBuffer<float> scale, part;
};

// mid [m, r] = s (rows B) G and inner = rows B; `turned`: Gᵀ, where G is a core.
void into_rank(const LowRank& d, Matrix rows, Matrix b, int64_t depth, bool turned, bf16* inner,
               bf16* mid, Scratch& scratch) {
    const auto s = static_cast<float>(d.scaling);
    Gemm g = product(d, d.m, d.r, {rows, b, depth}, inner);
    if (!d.core) {
        float* scale = scratch.scale.reserve(d.r);
        for (int64_t i = 0; i < d.r; ++i) scale[i] = s * gate_at(d, i);
        g.column_scale = scale;
        g.scaled = mid;  // from the unrounded product
        return gemm(g);
    }
    gemm(g);
    bf16* core = scratch.core.reserve(d.r * d.r);
    for (int64_t i = 0; i < d.r * d.r; ++i) core[i] = to_bf16(s * gate_at(d, i));
    const Matrix gate{core, turned ? 1 : d.r, turned ? d.r : 1};
    gemm(product(d, d.m, d.r, {{inner, d.r, 1}, gate, d.r}, mid));
}

// dG = s Σ_m h ∘ g, or s hᵀ g, in fp32.
void gate_gradient(const LowRank& d, const bf16* h, const bf16* g, float* out, Scratch& scratch) {
    const auto s = static_cast<float>(d.scaling);
    if (!d.core) return column_dots(d.m, d.r, h, d.r, g, d.r, s, out);
    const int64_t size = d.r * d.r;
    std::fill(out, out + size, 0.0f);
    float* part = scratch.part.reserve(size);
    for (int64_t i = 0; i < d.m; i += tokens_at_once) {
        const int64_t tokens = std::min(tokens_at_once, d.m - i);
        Gemm sum =
            product(d, d.r, d.r, {{h + i * d.r, 1, d.r}, {g + i * d.r, d.r, 1}, tokens}, part);
        sum.fp32_out = true;
        gemm(sum);
        for (int64_t j = 0; j < size; ++j) out[j] += part[j];
    }
    for (int64_t j = 0; j < size; ++j) out[j] *= s;
}

}  // namespace

void low_rank_forward(const LowRank& d, const LowRankForward& io) {
    Scratch large;
    Scratch& scratch = qrlora::scratch(large, d.m * d.r);
    bf16* mid = scratch.mid.reserve(d.m * d.r);
    const Matrix x = matrix(io.x);
    into_rank(d, x, transposed(d.down), d.k, false, static_cast<bf16*>(io.h), mid, scratch);
    Gemm g = product(d, d.m, d.n, {x, transposed(d.weight), d.k}, io.y);
    g.products[g.count++] = {{mid, d.r, 1}, transposed(d.up), d.r};
    g.bias = static_cast<const bf16*>(io.bias);
    gemm(g);
}

void low_rank_backward(const LowRank& d, const LowRankBackward& io) {
    Scratch large;
    Scratch& scratch = qrlora::scratch(large, d.m * d.r);
    bf16 *inner = scratch.inner.reserve(d.m * d.r), *mid = scratch.mid.reserve(d.m * d.r);
    const Matrix dy = matrix(io.dy);
    into_rank(d, dy, matrix(d.up), d.n, true, inner, mid, scratch);
    if (io.dgate)
        gate_gradient(d, static_cast<const bf16*>(io.h), inner, static_cast<float*>(io.dgate),
                      scratch);
    if (!io.dx) return;
    Gemm g = product(d, d.m, d.k, {dy, matrix(d.weight), d.n}, io.dx);
    g.products[g.count++] = {{mid, d.r, 1}, matrix(d.down), d.r};
    gemm(g);
}

}  // namespace qrlora::amx
