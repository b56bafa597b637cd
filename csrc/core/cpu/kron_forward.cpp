// y = sum_t (L_t (X R_t)) per token: x is read once, S stays in the L1 cache, y is written once.
#include <vector>

#include "arena.h"
#include "kron_chunks.h"
#include "qrlora/cpu/kron.h"
#include "qrlora/cpu/parallel.h"
#include "rows.h"
#include "small_gemm.h"

namespace qrlora::QRLORA_ISA {

namespace {

// One thread's working set: X, the S_t and Y of a token.
template <typename T>
struct Work {
    T *x, *s, *y;
    Work(const KronShape& d, int64_t ld, Arena& arena)
        : x(arena.take<T>(d.r * d.k)),
          s(arena.take<T>(d.terms * d.r * ld)),
          y(arena.take<T>(d.n * ld)) {}
};

template <typename E, typename T>
void forward(const KronShape& d, KronRows x, const T* left, const T* right, E* y) {
    const int64_t ld = padded<T>(d.r), depth = d.terms * d.r;
    std::vector<T> right_padded(d.terms * d.k * ld);
    load_rows(right, d.terms * d.k, d.r, right_padded.data(), ld);
    const KronChunks chunks(d.tokens);
    const E* rows = static_cast<const E*>(x.data);
    in_parallel(chunks.threads(d.threads), arena_bytes<Work<T>>(d, ld), [&](Team team) {
        Arena arena(team.scratch());
        const Work<T> w(d, ld, arena);
        team.for_dynamic(chunks.count, [&](int64_t chunk) {
            const int64_t first = chunk * chunks.tokens;
            for (int64_t m = first; m < first + chunks.tokens && m < d.tokens; ++m) {
                load_rows(rows + m * x.stride, d.r, d.k, w.x, d.k);
                for (int64_t t = 0; t < d.terms; ++t)
                    small_gemm(d.r, ld, d.k, Strided<T>{w.x, d.k, 1},
                               right_padded.data() + t * d.k * ld, ld, w.s + t * d.r * ld, ld);
                small_gemm(d.n, ld, depth, Strided<T>{left, depth, 1}, w.s, ld, w.y, ld);
                store_rows(w.y, ld, d.n, d.r, y + m * d.n * d.r);
            }
        });
    });
}

}  // namespace

void kron_forward(const KronShape& d, DType dtype, const KronForward& args) {
    const auto as = [&](auto sum, auto element) {
        using T = decltype(sum);
        using E = decltype(element);
        forward(d, args.x, static_cast<const T*>(args.left), static_cast<const T*>(args.right),
                static_cast<E*>(args.y));
    };
    if (dtype == DType::f64)
        as(double{}, double{});
    else if (dtype == DType::bf16)
        as(float{}, bf16{});
    else
        as(float{}, float{});
}

}  // namespace qrlora::QRLORA_ISA
