// An orthonormal basis in fp64 that grows by blocks of columns.
#pragma once

#include <cstdint>
#include <vector>

#include "dense.h"
#include "qrlora/cpu/buffer.h"

namespace qrlora {

// A row-major fp64 panel whose rows and columns are padded with zeros to whole tiles.
class Panel {
  public:
    // [rows, columns] of any values, to be followed by clear_padding(); the memory is reused.
    void shape(int64_t rows, int64_t columns);
    void clear_padding();
    // The same, zeroed.
    void reset(int64_t rows, int64_t columns);
    // Columns of `w`, converted.
    void gather(const MatrixView& w, const int64_t* columns, int64_t count, int threads);
    // The same, in place of the columns from `first` on.
    void replace(int64_t first, const MatrixView& w, const int64_t* columns, int64_t count,
                 int threads);
    MatrixView view() const { return {row(0), DType::f64, rows, columns, ld, 1}; }
    double* row(int64_t i) { return buffer_.data() + i * ld; }
    const double* row(int64_t i) const { return buffer_.data() + i * ld; }
    int64_t rows = 0, columns = 0, ld = 0;

  private:
    AlignedBuffer<double> buffer_;
};

// out[a.columns, b.columns] = aᵀ b; with `upper`, only tiles that reach the upper triangle.
void multiply_tn(const Panel& a, int64_t a_columns, const Panel& b, Panel& out, int threads,
                 bool upper = false);
// out[a.rows, b.columns] = a b, and from -= a b, for a [rows, steps].
void multiply_nn(const Panel& a, int64_t steps, const Panel& b, Panel& out, int threads);
void subtract_nn(const Panel& a, int64_t steps, const Panel& b, Panel& from, int threads);

class Basis {
  public:
    Basis(int64_t rows, int64_t capacity, int threads);
    // panel -= Q (Qᵀ panel)
    void project_out(Panel& panel) { project_out(panel, 0, panel.columns, 0); }
    // The same for columns [first, last), which are orthogonal to the first `known` of Q already.
    void project_out(Panel& panel, int64_t first, int64_t last, int64_t known);
    // Appends `panel` · inverse(L)ᵀ, with `project` made orthogonal to the basis, and orthonormal
    // once more, where L Lᵀ is the Gram of `panel` and `lower` holds L [count, count] row-major.
    void append(Panel& panel, std::vector<double> lower, bool project);
    const Panel& transposed() const { return transposed_; }  // Qᵀ [size, rows]
    int64_t size() const { return transposed_.rows; }
    void clear() { transposed_.rows = 0; }

  private:
    void append_orthonormal(const Panel& panel);

    // A block is appended at its end, and read where it lies; the TILE_M rows behind it are zeros.
    Panel transposed_;
    Panel coefficients_, gram_, inverse_, scaled_;
    int threads_;
};

// Lower Cholesky factor, in place and row-major [count, count], of a Gram whose upper triangle is
// given.
void cholesky(std::vector<double>& gram, int64_t count);

}  // namespace qrlora
