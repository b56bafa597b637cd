// The base product over a given addend in bf16; see qrlora/cpu/linear_add.h.
#include "qrlora/cpu/linear_add.h"

#include "gemm.h"

namespace qrlora::QRLORA_ISA::half {

void linear_add(const LinearAdd& d) {
    Gemm g{};
    g.m = d.m;
    g.n = d.n;
    g.products[0] = {matrix(d.x), matrix(transposed(d.weight)), d.k};
    g.count = 1;
    g.bias = static_cast<const bf16*>(d.bias);
    g.addend = static_cast<const bf16*>(d.addend);
    g.c = d.y;
    g.ldc = d.n;
    g.threads = d.threads;
    gemm(g);
}

}  // namespace qrlora::QRLORA_ISA::half
