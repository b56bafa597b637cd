#include "qrlora/cpu/table.h"

#include "dense.h"
#include "qrlora/cpu/amx.h"
#include "qrlora/isa.h"

namespace qrlora {

// What the sources that CMakeLists.txt compiles once per instruction set define for each.
#define QRLORA_DECLARE(isa)                                           \
    namespace isa {                                                   \
    void low_rank_forward(const LowRank&, const LowRankForward&);     \
    void low_rank_backward(const LowRank&, const LowRankBackward&);   \
    void linear_add(const LinearAdd&);                                \
    void kron_forward(const KronShape&, DType, const KronForward&);   \
    void kron_backward(const KronShape&, DType, const KronBackward&); \
    const DenseKernels& dense_kernels();                              \
    const PanelKernels& panel_kernels();                              \
    }
#define QRLORA_DECLARE_HALF(isa)                                    \
    namespace isa::half {                                           \
    void low_rank_forward(const LowRank&, const LowRankForward&);   \
    void low_rank_backward(const LowRank&, const LowRankBackward&); \
    void linear_add(const LinearAdd&);                              \
    const PanelKernels& panel_kernels();                            \
    }
// The column of a set whose bf16 products are its own, and which has everything else of `wide`.
#define QRLORA_COLUMN(isa, wide)                                                           \
    {#isa,                                                                                 \
     []() -> const std::string& { return obstacle(Isa::isa); },                            \
     wide_dtypes | DType::bf16,                                                            \
     wide_dtypes,                                                                          \
     false,                                                                                \
     by_dtype<wide::low_rank_forward, isa::half::low_rank_forward>,                        \
     by_dtype<wide::low_rank_backward, isa::half::low_rank_backward>,                      \
     by_dtype<wide::linear_add, isa::half::linear_add>,                                    \
     wide::kron_forward,                                                                   \
     wide::kron_backward,                                                                  \
     wide::dense_kernels,                                                                  \
     [](DType dtype) -> const PanelKernels& {                                              \
         return dtype == DType::bf16 ? isa::half::panel_kernels() : wide::panel_kernels(); \
     }}

QRLORA_DECLARE(baseline)
QRLORA_DECLARE_HALF(baseline)
#if defined(__x86_64__)
QRLORA_DECLARE(avx2)
QRLORA_DECLARE_HALF(avx2)
QRLORA_DECLARE(avx512)
QRLORA_DECLARE_HALF(avx512)
#endif
#if defined(QRLORA_WITH_AVX512_BF16)
QRLORA_DECLARE_HALF(avx512_bf16)
#endif

#if defined(QRLORA_WITH_AMX)
QRLORA_DECLARE_HALF(amx)
namespace amx {
void kron_forward(const KronShape&, DType, const KronForward&);
void kron_backward(const KronShape&, DType, const KronBackward&);
}  // namespace amx
#endif

namespace {

constexpr DTypes wide_dtypes = DTypes{} | DType::f32 | DType::f64;

template <auto* Wide, auto* Half, typename Problem, typename... Operands>
void by_dtype(const Problem& d, const Operands&... operands) {
    d.dtype == DType::bf16 ? Half(d, operands...) : Wide(d, operands...);
}

}  // namespace

const std::vector<Column>& columns() {
    static const std::vector<Column> table{
        QRLORA_COLUMN(baseline, baseline),
#if defined(__x86_64__)
        QRLORA_COLUMN(avx2, avx2),
        QRLORA_COLUMN(avx512, avx512),
#endif
#if defined(QRLORA_WITH_AVX512_BF16)
        QRLORA_COLUMN(avx512_bf16, avx512),
#endif
#if defined(QRLORA_WITH_AMX)
        {"amx", amx::obstacle, DTypes{} | DType::bf16, DTypes{}, true, amx::half::low_rank_forward,
         amx::half::low_rank_backward, amx::half::linear_add, amx::kron_forward, amx::kron_backward,
         nullptr, nullptr},
#endif
    };
    return table;
}

int best_column() { return static_cast<int>(best_isa()); }

const DenseKernels& dense_kernels() { return columns()[best_column()].dense_kernels(); }

const PanelKernels& panel_kernels(DType dtype) {
    return columns()[best_column()].panel_kernels(dtype);
}

}  // namespace qrlora
