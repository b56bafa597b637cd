// The search for greedy pivots; pivot_search.cpp chooses them, pivot_bounds.cpp keeps the bounds,
// pivot_explicit.cpp the residual matrix of a search for many pivots, pivot_seats.cpp the Gram of
// its candidates, and pivot_outputs.cpp writes q and r.
#pragma once

#include <limits>
#include <vector>

#include "basis.h"
#include "qrlora/cpu/pivoted_qr.h"

namespace qrlora {

constexpr double EPS32 = std::numeric_limits<float>::epsilon();
constexpr double EPS64 = std::numeric_limits<double>::epsilon();
constexpr double TIE = 1e-13;
constexpr double DEPENDENT = 64 * EPS64;
// Rounding of a norm² in a Gram. What is left of one after others were taken out of it may be off
// by CHOOSE of itself for a choice in this block, and by CARRY to be used in the next one.
constexpr double GRAM_ERROR = 16 * EPS64;
constexpr double CHOOSE = GRAM_ERROR * 1e4;
constexpr double CARRY = GRAM_ERROR * 10;
// Pivots taken at a time where their candidates' Gram is carried over: what a block costs by the
// cube of its size stays small, and the few last columns, which shrank, are a block of their own.
constexpr int64_t EXPLICIT_TAKE = 32;
constexpr double NONE = -std::numeric_limits<double>::infinity();
constexpr int64_t NOBODY = -1;

enum class Outcome { more, refresh, below_tau };

class Search {
  public:
    Search(const MatrixView& w, const PivotOptions& options, int threads)
        : w_(w),
          options_(options),
          threads_(threads),
          basis_(w.rows, capacity(w, options), threads),
          fp32_pass_(w.dtype != DType::f64) {
        if (options.factors) found_.factors.emplace();
    }

    Pivots run(const Interrupted& interrupted);

  private:
    static int64_t capacity(const MatrixView& w, const PivotOptions& options);
    bool start();
    Outcome block(bool fresh);
    void choose_candidates();
    Outcome pivot_block(bool certify_first);
    bool certified(double value, int64_t column) const;
    void gather_accepted();
    void take_block();
    template <class T>
    void lower_bounds(const Panel& added);
    template <class T>
    void lower_bound(int64_t j, const T* row, int64_t stride, double unit);
    void enter_growth(int64_t count);
    void refresh(double known2);
    void set_exact(int64_t column, double norm2);
    bool bracketed() const;
    bool wants_explicit() const;
    void make_explicit();
    MatrixView residual_columns() const;
    void seat_candidates();
    void drop_dead(int64_t from);
    void meet_newcomers();
    void lower_gram();
    void update_explicit(const Panel& added);
    void store_rows(int64_t first, int64_t last);
    void store_r(int64_t s, int64_t column, double value);
    void store_diagonal(int64_t s, double value);
    void store_basis();
    void add_rows();
    bool shrunk() const;
    void gather_residual(const int64_t* columns, int64_t count);
    void refill_residual();

    // The pivots of the block that is being taken, which end what was found.
    int64_t block_start() const { return found_.columns.size() - accepted_.size(); }
    int64_t block_column(int64_t s) const { return found_.columns[block_start() + s]; }
    double block_norm(int64_t s) const { return found_.norms[block_start() + s]; }

    double bound(int64_t j) const { return alive_[j] ? norm2_[j] + slack_[j] : NONE; }
    bool independent(int64_t j, double norm2) const {
        return norm2 > DEPENDENT * DEPENDENT * noise2_[j];
    }

    const MatrixView& w_;
    const PivotOptions& options_;
    const int threads_;
    Basis basis_;
    bool fp32_pass_;
    // Per column: norm² at the start, estimate of the residual norm², bound of its error, squared
    // scale of the rounding, and whether it is neither a pivot nor dependent on the pivots.
    std::vector<double> start2_, norm2_, slack_, noise2_;
    std::vector<char> alive_;
    std::vector<int64_t> order_, candidates_;
    double outside_ = NONE;  // largest bound outside the candidates, and its lowest column
    int64_t outside_column_ = 0;
    // Pivoted Cholesky of the candidates' Gram: row `step` of the factor holds its column `step`,
    // left2_ what is left of the norms² and error2_ how far off that may be.
    Panel residual_, gram_, factor_, products_, accepted_panel_;
    std::vector<double> left2_, error2_;
    std::vector<int64_t> accepted_;
    // Columns whose residuals residual_ holds, less what the first held_at_ of the basis take out.
    std::vector<int64_t> held_;
    int64_t held_at_ = 0;
    // The residual of the columns kept_, transposed, and where in it a column is. The candidates
    // sit in front; `known_` tells which of them the Gram knows already.
    bool explicit_ = false;
    Panel matrix_, coefficients_;
    std::vector<int64_t> kept_, place_, newcomers_;
    std::vector<char> chosen_, known_;
    std::vector<double> lower_, growth_;
    std::vector<int64_t> new_rows_;
    double floor2_ = 0.0;  // magnitude rule: (tau |R_11|)²
    Pivots found_;         // with factors as long as they are wanted
};

}  // namespace qrlora
