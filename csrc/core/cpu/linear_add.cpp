// A given update and the base product in fp32 and fp64.
#include "qrlora/cpu/linear_add.h"

#include "columns.h"
#include "panels.h"

namespace qrlora::QRLORA_ISA {

namespace {

template <typename T>
void many_tokens(const LinearAdd& d) {
    const int threads = useful_threads(d.threads, d.m, d.n, d.k);
    const auto x = layout<T>(d.x), weight = transposed_layout<T>(d.weight);
    const auto *bias = static_cast<const T*>(d.bias), *addend = static_cast<const T*>(d.addend);
    auto* y = static_cast<T*>(d.y);
    const int64_t room = made_panels_room<T>(d.k) * static_cast<int64_t>(sizeof(T));
    in_parallel(threads, room, [&](Team team) {
        over_shares<T>(team, d.m, d.n, threads, [&](Block p) {
            const int64_t at = p.i * d.n + p.j;
            const auto start =
                start_of(addend + at, bias ? bias + p.j : nullptr, p.rows, p.columns, y + at, d.n);
            times_made_panels(p.rows, x.data + p.i * x.row, x.row, d.k, weight, p.j, p.columns,
                              start, y + at, d.n, reinterpret_cast<T*>(team.scratch()));
        });
    });
}

template <typename T>
void few_tokens(const LinearAdd& d) {
    const int threads = useful_threads(d.threads, d.m, d.n, d.k);
    const auto x = layout<T>(d.x), weight = transposed_layout<T>(d.weight);
    const auto *bias = static_cast<const T*>(d.bias), *addend = static_cast<const T*>(d.addend);
    auto* y = static_cast<T*>(d.y);
    const int64_t block = block_columns(d.m, weight, d.n, threads);
    in_parallel(threads, part_bytes<T>(d.m), [&](Team team) {
        auto* part = reinterpret_cast<T*>(team.scratch());
        over_blocks(team, d.n, block, [&](int64_t first, int64_t last) {
            for (int64_t i = 0; i < d.m; ++i)
                for (int64_t j = first; j < last; ++j)
                    y[i * d.n + j] = addend[i * d.n + j] + (bias ? bias[j] : T(0));
            add_product(d.m, x, weight, d.k, first, last, y, d.n, part);
        });
    });
}

template <typename T>
void run(const LinearAdd& d) {
    d.m < MANY_ROWS ? few_tokens<T>(d) : many_tokens<T>(d);
}

}  // namespace

void linear_add(const LinearAdd& d) { d.dtype == DType::f64 ? run<double>(d) : run<float>(d); }

}  // namespace qrlora::QRLORA_ISA
