// C = A_0 B_0 + A_1 B_1 + bias + addend by tiles whose sums stay in registers from the first
// product's first pair to the last rounding. A is read where it lies, if its pairs do; B is brought
// into panels, a few at a time, unless somebody keeps it so. Where the products are deep or B's
// rows far apart, they are cut into segments: a tile's sums then wait in memory, in fp32, from one
// segment to the next. The order of a sum depends on the depths alone.
#include "gemm.h"

#include "../arena.h"
#include "../skinny.h"
#include "pairs.h"
#include "qrlora/cpu/parallel.h"
#include "tile.h"

namespace qrlora::QRLORA_ISA::half {

namespace {

constexpr int64_t up(int64_t v, int64_t to) { return (v + to - 1) / to * to; }

int64_t paired_depth(const Gemm& g) {
    int64_t pairs = 0;
    for (int t = 0; t < g.count; ++t) pairs += whole_pairs(g.products[t].depth);
    return 2 * pairs;
}

// Whether the tile can read pairs of A where they lie.
bool in_place(const Product& p) { return p.a.col == 1 && p.depth % 2 == 0; }

// How many threads are worth waking: that takes as long as some millions of multiplications.
int useful_threads(const Gemm& g) {
    constexpr int64_t grain = 1 << 21;
    return static_cast<int>(std::min<int64_t>(
        g.threads, 1 + std::max<int64_t>(4, g.m) * g.n * paired_depth(g) / grain));
}

// Sizes of what is worked on at a time, in elements, and how it is shared among threads.
struct Cut {
    static constexpr int64_t cached = 1 << 17;   // of B, in the L2 cache
    static constexpr int64_t deepest = 1 << 12;  // of a segment
    static constexpr int64_t waiting = 1 << 9;   // rows whose sums wait
    static constexpr int64_t copied = 1 << 19;   // of A

    int64_t depth, segment, group, rows;
    int64_t row_part, column_part;  // of a thread's task
    bool packs = false;             // some of B is brought into panels
    int64_t copied_depth = 0;       // of a segment, where A is copied

    explicit Cut(const Gemm& g) : depth(paired_depth(g)) {
        for (int t = 0; t < g.count; ++t) {
            packs |= !g.products[t].panels;
            if (!in_place(g.products[t])) copied_depth += 2 * whole_pairs(g.products[t].depth);
        }
        segment = std::max<int64_t>(2, depth);
        if (packs) {
            const int64_t most = far_apart(g) ? cached / stretch(g) : deepest;
            segment = up(segment / ((segment + most - 1) / most) + 1, 2);
        }
        copied_depth = std::min(copied_depth, segment);
        group = std::max<int64_t>(1, cached / segment / panel_width) * panel_width;
        share(g);
        group = std::min(group, up(column_part, panel_width));
        rows = row_part;
        if (segments() > 1) rows = std::min(rows, waiting);
        if (copied_depth > 0) rows = std::min(rows, std::max<int64_t>(48, copied / copied_depth));
    }
    int64_t segments() const { return std::max<int64_t>(1, (depth + segment - 1) / segment); }
    int64_t copied_rows() const { return up(rows, lanes); }

  private:
    // Rows of B in pages of their own, for few tokens: long stretches of them are read, and the
    // more often the sums wait.
    static bool far_apart(const Gemm& g) {
        const Matrix& b = g.products[0].b;
        return g.m <= 256 && b.col == 1 && b.row * g.n >= 1 << 21;
    }
    static int64_t stretch(const Gemm& g) { return g.m <= 16 ? 1 << 11 : 1 << 9; }

    // By columns, so that none is packed twice; by rows where there are few columns for so many.
    void share(const Gemm& g) {
        const int64_t panels = (g.n + panel_width - 1) / panel_width, threads = g.threads;
        const int64_t each = (panels + threads - 1) / threads;
        const bool uneven = 8 * each * threads > 9 * panels && g.m >= 32 * threads;
        column_part = uneven ? g.n : each * panel_width;
        row_part = uneven ? up((g.m + threads - 1) / threads, 12) : g.m;
    }
};

// One thread's working set: pairs of B and A, and sums that wait.
struct Work {
    bf16 *panels, *left;
    float* sums;
    Work(const Cut& cut, Arena& arena)
        : panels(arena.take<bf16>(cut.packs ? cut.group * cut.segment : 0)),
          left(arena.take<bf16>(cut.copied_rows() * cut.copied_depth)),
          sums(arena.take<float>(cut.segments() > 1 ? cut.rows * cut.group : 0)) {}
};

// sums [rows, columns] + bias + addend into C at (i, j).
void finish(const Gemm& g, const float* sums, int64_t ld, int64_t rows, int64_t columns, int64_t i,
            int64_t j) {
    for (int64_t row = 0; row < rows; ++row, ++i, sums += ld)
        for (int64_t v = 0; v < columns; v += lanes) {
            const int64_t count = std::min(lanes, columns - v), at = i * g.ldc + j + v;
            Floats sum = load(sums + v);
            if (g.bias) sum += widen(load_some(g.bias + j + v, count));
            if (g.addend) sum += widen(load_some(g.addend + at, count));
            if (g.fp32_out) {
                float some[lanes];
                store(some, sum);
                copy_some(some, count, static_cast<float*>(g.c) + at);
            } else {
                store_some(static_cast<bf16*>(g.c) + at, narrow(sum), count);
            }
            if (!g.scaled) continue;
            float scale[lanes] = {};
            copy_some(g.column_scale + j + v, count, scale);
            store_some(g.scaled + at, narrow(sum * load(scale)), count);
        }
}

class Task {
  public:
    Task(const Gemm& g, const Cut& cut, Arena arena) : g_(g), cut_(cut), work_(cut, arena) {}

    void run(int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
        for (int64_t j = j0; j < j1; j += cut_.group)
            for (int64_t i = i0; i < i1; i += cut_.rows)
                block(i, std::min(i1, i + cut_.rows), j, std::min(j1, j + cut_.group));
    }

  private:
    // Rows [i0, i1) of a group of columns [j0, j1).
    void block(int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
        i0_ = i0, i1_ = i1, j0_ = j0, j1_ = j1;
        const int64_t count = cut_.segments(), whole = j0 + (j1 - j0) / panel_width * panel_width;
        for (int64_t s = 0; s < count; ++s) {
            first_ = s == 0, last_ = s + 1 == count;
            prepare(s * cut_.segment, std::min(cut_.depth, (s + 1) * cut_.segment));
            if (whole > j0) panels(constant<MOST_VECTORS>, j0, whole);
            if (whole == j1) continue;
            const int64_t vectors = (j1 - whole + lanes - 1) / lanes;
            if (vectors == 1) panels(constant<1>, whole, j1);
            if (vectors == 2) panels(constant<2>, whole, j1);
            if constexpr (MOST_VECTORS == 4) {
                if (vectors == 3) panels(constant<3>, whole, j1);
                if (vectors == 4) panels(constant<4>, whole, j1);
            }
        }
    }

    // The part [from, to) of the products' paired depth.
    void prepare(int64_t from, int64_t to) {
        terms_ = 0;
        bf16 *panel = work_.panels, *left = work_.left;
        int64_t begin = 0;
        for (int t = 0; t < g_.count; ++t) {
            const Product& p = g_.products[t];
            const int64_t low = std::max<int64_t>(0, from - begin);
            const int64_t high = std::min(p.depth, to - begin);
            begin += 2 * whole_pairs(p.depth);
            if (low >= high) continue;
            const int64_t pairs = whole_pairs(high - low);
            term_[terms_] = {left_of(p, low, high - low, left), nullptr, pairs};
            if (p.panels) {
                kept_[terms_] = {p.panels + j0_ * 2 * whole_pairs(p.depth),
                                 2 * whole_pairs(p.depth), low};
            } else {
                kept_[terms_] = {panel, 2 * pairs, 0};
                pack(p, low, high - low, panel);
                panel += 2 * pairs * (up(j1_ - j0_, lanes));
            }
            ++terms_;
        }
    }

    Left left_of(const Product& p, int64_t low, int64_t depth, bf16*& copy) const {
        const bf16* from = p.a.data + i0_ * p.a.row + low * p.a.col;
        if (in_place(p)) return {from, p.a.row, 2};
        const int64_t width = cut_.copied_rows();
        pack_pairs({from, p.a.col, p.a.row}, depth, i1_ - i0_, width, copy);
        const Left left{copy, 2, 2 * width};
        copy += 2 * whole_pairs(depth) * width;
        return left;
    }

    void pack(const Product& p, int64_t low, int64_t depth, bf16* to) const {
        for (int64_t j = j0_; j < j1_; j += panel_width) {
            const int64_t columns = std::min(panel_width, j1_ - j), width = up(columns, lanes);
            pack_pairs({p.b.data + low * p.b.row + j * p.b.col, p.b.row, p.b.col}, depth, columns,
                       width, to);
            to += 2 * whole_pairs(depth) * width;
        }
    }

    // A panel of each term after the other, for all rows; rows in the L1 cache meet all panels.
    template <typename Vectors>
    void panels(Vectors vectors, int64_t from, int64_t to) {
        int64_t i = i0_;
        const auto rows = [&](auto count) {
            for (; i + count() <= i1_; i += count())
                for (int64_t j = from; j < to; j += panel_width)
                    one<count(), vectors()>(i, j, std::min(to - j, panel_width));
        };
        rows(constant<TALLEST<vectors()>>);
        rows(constant<4>);
        rows(constant<2>);
        rows(constant<1>);
    }

    template <int ROWS, int VECTORS>
    void one(int64_t i, int64_t j, int64_t columns) {
        alignas(64) float block[ROWS * VECTORS * lanes];
        const bool waits = !(first_ && last_);
        float* sums = waits ? work_.sums + (i - i0_) * cut_.group + j - j0_ : block;
        const int64_t ld = waits ? cut_.group : VECTORS * lanes;
        for (int t = 0; t < terms_; ++t)
            term_[t].panel =
                kept_[t].data + (j - j0_) * kept_[t].stride + kept_[t].low * VECTORS * lanes;
        if (last_ && columns == VECTORS * lanes && !g_.fp32_out) {
            const Plain plain = at(i, j);
            return tile<ROWS, VECTORS>(term_, terms_, i - i0_, first_, sums, ld, &plain);
        }
        tile<ROWS, VECTORS>(term_, terms_, i - i0_, first_, sums, ld, nullptr);
        if (last_) finish(g_, sums, ld, ROWS, columns, i, j);
    }

    Plain at(int64_t i, int64_t j) const {
        const int64_t to = i * g_.ldc + j;
        return {static_cast<bf16*>(g_.c) + to,        g_.bias ? g_.bias + j : nullptr,
                g_.addend ? g_.addend + to : nullptr, g_.scaled ? g_.column_scale + j : nullptr,
                g_.scaled ? g_.scaled + to : nullptr, g_.ldc};
    }

    // Panels of a term: a column's share of them, and the depth at which the segment begins.
    struct Panels {
        const bf16* data;
        int64_t stride, low;
    };

    const Gemm& g_;
    const Cut& cut_;
    const Work work_;
    int64_t i0_ = 0, i1_ = 0, j0_ = 0, j1_ = 0;
    bool first_ = true, last_ = true;
    int terms_ = 0;
    Term term_[2];
    Panels kept_[2];
};

}  // namespace

void gemm(const Gemm& asked) {
    if (asked.m == 0 || asked.n == 0) return;
    Gemm g = asked;
    g.threads = useful_threads(asked);
    const Cut cut(g);
    const int64_t across = (g.n + cut.column_part - 1) / cut.column_part;
    const int64_t down = (g.m + cut.row_part - 1) / cut.row_part;
    in_parallel(g.threads, arena_bytes<Work>(cut), [&](Team team) {
        Task task(g, cut, Arena(team.scratch()));
        team.for_static(across * down, [&](int64_t part) {
            const int64_t j = part % across * cut.column_part, i = part / across * cut.row_part;
            task.run(i, std::min(g.m, i + cut.row_part), j, std::min(g.n, j + cut.column_part));
        });
    });
}

}  // namespace qrlora::QRLORA_ISA::half
