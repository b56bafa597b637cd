#include "qrlora/cpu/table.h"

#include "dense.h"
#include "qrlora/cpu/amx.h"
#include "qrlora/isa.h"

namespace qrlora {

// What the sources that CMakeLists.txt compiles once per instruction set define for each, and its
// column.
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
#define QRLORA_COLUMN(isa)                                      \
    {#isa,                                                      \
     []() -> const std::string& { return obstacle(Isa::isa); }, \
     wide,                                                      \
     wide | DType::bf16,                                        \
     true,                                                      \
     false,                                                     \
     isa::low_rank_forward,                                     \
     isa::low_rank_backward,                                    \
     isa::linear_add,                                           \
     isa::kron_forward,                                         \
     isa::kron_backward,                                        \
     isa::dense_kernels,                                        \
     isa::panel_kernels}

QRLORA_DECLARE(baseline)
#if defined(__x86_64__)
QRLORA_DECLARE(avx2)
QRLORA_DECLARE(avx512)
#endif

#if defined(QRLORA_WITH_AMX)
namespace amx {
void low_rank_forward(const LowRank&, const LowRankForward&);
void low_rank_backward(const LowRank&, const LowRankBackward&);
void linear_add(const LinearAdd&);
void kron_forward(const KronShape&, DType, const KronForward&);
void kron_backward(const KronShape&, DType, const KronBackward&);
}  // namespace amx
#endif

const std::vector<Column>& columns() {
    static constexpr DTypes wide = DTypes{} | DType::f32 | DType::f64;
    static const std::vector<Column> table{
        QRLORA_COLUMN(baseline),
#if defined(__x86_64__)
        QRLORA_COLUMN(avx2),
        QRLORA_COLUMN(avx512),
#endif
#if defined(QRLORA_WITH_AMX)
        {"amx", amx::obstacle, DTypes{} | DType::bf16, DTypes{} | DType::bf16, false, true,
         amx::low_rank_forward, amx::low_rank_backward, amx::linear_add, amx::kron_forward,
         amx::kron_backward, nullptr, nullptr},
#endif
    };
    return table;
}

int best_column() { return static_cast<int>(best_isa()); }

const DenseKernels& dense_kernels() { return columns()[best_column()].dense_kernels(); }

const PanelKernels& panel_kernels() { return columns()[best_column()].panel_kernels(); }

}  // namespace qrlora
