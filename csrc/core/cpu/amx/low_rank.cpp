// QR-LoRA and LoRA-XS in bf16 as a few products on the tile unit; see qrlora/cpu/low_rank.h.
#include "qrlora/cpu/low_rank.h"

#include <algorithm>

#include "block.h"
#include "qrlora/cpu/buffer.h"

namespace qrlora::amx {

namespace {

constexpr int64_t tokens_at_once = 8192;  // where the sum runs over tokens; bounds the scratch

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

// write(i, mask, s G) for 16 elements of the gate at a time.
template <typename Write>
void over_gate(const LowRank& d, int64_t size, const Write& write) {
    const __m512 s = _mm512_set1_ps(static_cast<float>(d.scaling));
    for (int64_t i = 0; i < size; i += 16) {
        const __mmask16 mask = first16(size - i);
        const __m512 gate = d.gate_dtype == DType::f32
                                ? _mm512_maskz_loadu_ps(mask, static_cast<const float*>(d.gate) + i)
                                : load_bf16(mask, static_cast<const bf16*>(d.gate) + i);
        write(i, mask, _mm512_mul_ps(s, gate));
    }
}

// What one call needs between its products.
struct Buffers {
    AlignedBuffer<bf16> inner, mid, core;
    AlignedBuffer<float> scale, part;
};

// mid [m, r] = s (rows B) G and inner = rows B; `turned`: Gᵀ, where G is a core.
void into_rank(const LowRank& d, Matrix rows, Matrix b, int64_t depth, bool turned, bf16* inner,
               bf16* mid, Buffers& scratch) {
    Gemm g = product(d, d.m, d.r, {rows, b, depth}, inner);
    if (!d.core) {
        float* scale = scratch.scale.reserve(d.r);
        over_gate(d, d.r, [&](int64_t i, __mmask16 mask, __m512 v) {
            _mm512_mask_storeu_ps(scale + i, mask, v);
        });
        g.column_scale = scale;
        g.scaled = mid;  // from the unrounded product
        return gemm(g);
    }
    gemm(g);
    bf16* core = scratch.core.reserve(d.r * d.r);
    over_gate(d, d.r * d.r,
              [&](int64_t i, __mmask16 mask, __m512 v) { store_bf16(core + i, mask, v); });
    const Matrix gate{core, turned ? 1 : d.r, turned ? d.r : 1};
    gemm(product(d, d.m, d.r, {{inner, d.r, 1}, gate, d.r}, mid));
}

// dG = s Σ_m h ∘ g, or s hᵀ g, in fp32.
void gate_gradient(const LowRank& d, const bf16* h, const bf16* g, float* out, Buffers& scratch) {
    const auto s = static_cast<float>(d.scaling);
    if (!d.core) return column_dots(d.m, d.r, h, d.r, g, d.r, s, out);
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
    Gemm g = product(d, d.m, d.n, {x, matrix(transposed(d.weight)), d.k}, io.y);
    g.products[g.count++] = {{mid, d.r, 1}, matrix(transposed(d.up)), d.r};
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
    Gemm g = product(d, d.m, d.k, {dy, matrix(d.weight), d.n}, io.dx);
    g.products[g.count++] = {{mid, d.r, 1}, matrix(d.down), d.r};
    gemm(g);
}

}  // namespace qrlora::amx
