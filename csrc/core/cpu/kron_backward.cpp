// dA, dB and the update's dx in one pass over x and dy: S and T stay in the L1 cache.
#include <algorithm>
#include <vector>

#include "arena.h"
#include "kron_chunks.h"
#include "qrlora/cpu/kron.h"
#include "qrlora/cpu/parallel.h"
#include "rows.h"
#include "small_gemm.h"

namespace qrlora::QRLORA_ISA {

namespace {

template <typename E, typename T>
class Backward {
  public:
    Backward(const KronShape& d, const KronBackward& args)
        : d_(d), args_(args), r_ld_(padded<T>(d.r)), k_ld_(padded<T>(d.k)), chunks_(d.tokens) {
        right_.resize(d.k * r_ld_);
        load_rows(static_cast<const T*>(args.right), d.k, d.r, right_.data(), r_ld_);
        right_t_.resize(d.terms * d.r * k_ld_);
        load_rows(static_cast<const T*>(args.right_t), d.terms * d.r, d.k, right_t_.data(), k_ld_);
        if (args.da) da_.assign(chunks_.count * d.n * r_ld_, 0);
        if (args.db) db_.assign(chunks_.count * d.k * r_ld_, 0);
    }

    void run() {
        in_parallel(chunks_.threads(d_.threads), arena_bytes<Work>(*this), [&](Team team) {
            Arena arena(team.scratch());
            const Work work(*this, arena);
            // The padding of S^T is read and never written.
            std::fill_n(work.s_t, d_.r * r_ld_, T(0));
            team.for_dynamic(chunks_.count, [&](int64_t chunk) {
                const int64_t first = chunk * chunks_.tokens;
                for (int64_t m = first; m < first + chunks_.tokens && m < d_.tokens; ++m)
                    add_token(m, chunk, work);
            });
        });
        if (args_.da) sum_chunks(da_, d_.n, args_.scaling, static_cast<T*>(args_.da));
        if (args_.db) sum_chunks(db_, d_.k, 1.0, static_cast<T*>(args_.db));
    }

  private:
    // One thread's working set, of a token.
    struct Work {
        T *x, *dy, *s, *s_t, *t, *dx;
        Work(const Backward& b, Arena& arena)
            : x(arena.take<T>(b.d_.r * b.k_ld_)),
              dy(arena.take<T>(b.d_.n * b.r_ld_)),
              s(arena.take<T>(b.d_.r * b.r_ld_)),
              s_t(arena.take<T>(b.d_.r * b.r_ld_)),
              t(arena.take<T>(b.d_.terms * b.d_.r * b.r_ld_)),
              dx(arena.take<T>(b.d_.r * b.k_ld_)) {}
    };

    void add_token(int64_t m, int64_t chunk, const Work& w) {
        const E* x = static_cast<const E*>(args_.x.data) + m * args_.x.stride;
        const E* dy = static_cast<const E*>(args_.dy.data) + m * args_.dy.stride;
        load_rows(x, d_.r, d_.k, w.x, k_ld_);
        load_rows(dy, d_.n, d_.r, w.dy, r_ld_);
        if (args_.da) add_da(w, da_.data() + chunk * d_.n * r_ld_);
        if (!args_.db && !args_.dx) return;
        small_gemm(d_.terms * d_.r, r_ld_, d_.n, row_major(args_.left_t, d_.n), w.dy, r_ld_, w.t,
                   r_ld_);
        if (args_.dx) store_dx(m, w);
        if (args_.db) add_db(w, db_.data() + chunk * d_.k * r_ld_);
    }

    // dA += dY S^T
    void add_da(const Work& w, T* da) {
        small_gemm(d_.r, r_ld_, d_.k, row_major(w.x, k_ld_), right_.data(), r_ld_, w.s, r_ld_);
        for (int64_t i = 0; i < d_.r; ++i)
            for (int64_t j = 0; j < d_.r; ++j) w.s_t[j * r_ld_ + i] = w.s[i * r_ld_ + j];
        small_gemm(d_.n, r_ld_, d_.r, row_major(w.dy, r_ld_), w.s_t, r_ld_, da, r_ld_, true);
    }

    // dX = sum_t T_t R_t^T
    void store_dx(int64_t m, const Work& w) {
        for (int64_t t = 0; t < d_.terms; ++t)
            small_gemm(d_.r, k_ld_, d_.r, row_major(w.t + t * d_.r * r_ld_, r_ld_),
                       right_t_.data() + t * d_.r * k_ld_, k_ld_, w.dx, k_ld_, t > 0);
        store_rows(w.dx, k_ld_, d_.r, d_.k, static_cast<E*>(args_.dx) + m * d_.r * d_.k);
    }

    // dB += X^T (T_0 + s T_1); T_0 is overwritten
    void add_db(const Work& w, T* db) {
        const int64_t size = d_.r * r_ld_;
        if (d_.terms == 2)
            for (int64_t i = 0; i < size; ++i) w.t[i] += T(args_.scaling) * w.t[size + i];
        small_gemm(d_.k, r_ld_, d_.r, Strided<T>{w.x, 1, k_ld_}, w.t, r_ld_, db, r_ld_, true);
    }

    static Strided<T> row_major(const void* data, int64_t ld) {
        return {static_cast<const T*>(data), ld, 1};
    }

    void sum_chunks(const std::vector<T>& parts, int64_t rows, double scale, T* out) const {
        const int64_t size = rows * r_ld_;
        for (int64_t i = 0; i < rows; ++i)
            for (int64_t j = 0; j < d_.r; ++j) {
                T sum = 0;
                for (int64_t c = 0; c < chunks_.count; ++c) sum += parts[c * size + i * r_ld_ + j];
                out[i * d_.r + j] = T(scale) * sum;
            }
    }

    const KronShape& d_;
    const KronBackward& args_;
    const int64_t r_ld_, k_ld_;
    const KronChunks chunks_;
    std::vector<T> right_, right_t_, da_, db_;
};

}  // namespace

void kron_backward(const KronShape& d, DType dtype, const KronBackward& args) {
    if (dtype == DType::f64)
        Backward<double, double>(d, args).run();
    else if (dtype == DType::bf16)
        Backward<bf16, float>(d, args).run();
    else
        Backward<float, float>(d, args).run();
}

}  // namespace qrlora::QRLORA_ISA
