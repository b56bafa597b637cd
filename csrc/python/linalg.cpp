// Pivoted QR of a list of matrices: which thread takes which matrix, Ctrl-C and progress.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <exception>
#include <memory>
#include <numeric>
#include <optional>
#include <thread>

#include "bindings.h"
#include "qrlora/cpu/parallel.h"
#include "qrlora/cpu/pivoted_qr.h"

namespace py = pybind11;

namespace qrlora {
namespace {

// (address, dtype, rows, columns, row stride, column stride), strides in elements
using MatrixArgs = std::tuple<uintptr_t, int64_t, int64_t, int64_t, int64_t, int64_t>;

// Matrices below this many elements are taken one per thread; larger ones by all threads at once.
constexpr int64_t SHARED_ELEMENTS = int64_t(1) << 22;

MatrixView as_view(const MatrixArgs& args) {
    const auto& [data, dtype, rows, columns, row_stride, column_stride] = args;
    return {reinterpret_cast<const void*>(data),
            static_cast<DType>(dtype),
            rows,
            columns,
            row_stride,
            column_stride};
}

// Lets the calling thread, every tenth of a second and without the GIL in between, handle signals
// and report how many matrices are done. An exception there ends the work of all threads.
class Watch {
  public:
    explicit Watch(py::function report) : report_(std::move(report)) {}

    bool interrupted() {
        const auto now = std::chrono::steady_clock::now();
        if (std::this_thread::get_id() != owner_ || cancelled_ ||
            now - last_ < std::chrono::milliseconds(100)) {
            return cancelled_;
        }
        last_ = now;
        py::gil_scoped_acquire gil;
        try {
            if (PyErr_CheckSignals() != 0) throw py::error_already_set();
            report_(done_.load());
        } catch (...) {
            error_ = std::current_exception();
            cancelled_ = true;
        }
        return cancelled_;
    }
    void finished_one() { ++done_; }
    void rethrow() const {
        if (error_) std::rethrow_exception(error_);
    }

  private:
    py::function report_;
    const std::thread::id owner_ = std::this_thread::get_id();
    std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
    std::atomic<bool> cancelled_{false};
    std::atomic<int64_t> done_{0};
    std::exception_ptr error_;
};

// Runs work(i, threads) for every matrix: small ones first-come, one per thread, largest first.
template <class Work>
void for_each_matrix(const std::vector<MatrixView>& views, int threads, Watch& watch,
                     const Work& work) {
    std::vector<int64_t> order(views.size());
    std::iota(order.begin(), order.end(), int64_t(0));
    const auto elements = [&](int64_t i) { return views[i].rows * views[i].columns; };
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return elements(a) > elements(b); });
    const auto small = std::find_if(order.begin(), order.end(),
                                    [&](int64_t i) { return elements(i) < SHARED_ELEMENTS; });
    const auto run = [&](int64_t i, int count) {
        if (watch.interrupted()) return;
        work(i, count);
        watch.finished_one();
    };
    for (auto it = order.begin(); it != small; ++it) run(*it, threads);
    const int64_t rest = order.end() - small;
    if (rest == 1) return run(*small, threads);
    parallel_for(threads, rest, [&](int64_t i) { run(small[i], 1); });
}

std::vector<MatrixView> as_views(const std::vector<MatrixArgs>& args) {
    std::vector<MatrixView> views;
    for (const MatrixArgs& one : args) views.push_back(as_view(one));
    return views;
}

// Bytes that keep their memory where it is.
py::array_t<unsigned char> as_array(AlignedBuffer<unsigned char> buffer, int64_t bytes) {
    using Buffer = AlignedBuffer<unsigned char>;
    auto owned = std::make_unique<Buffer>(std::move(buffer));
    const py::capsule owner(owned.get(), [](void* p) { delete static_cast<Buffer*>(p); });
    return py::array_t<unsigned char>(bytes, owned.release()->data(), owner);
}

// (q, r, diagonal), or None
py::object as_tuple(std::optional<PivotFactors> factors, const MatrixView& w, DType dtype) {
    if (!factors) return py::none();
    const int64_t unit = bytes_of(dtype) * factors->diagonal.size();
    return py::make_tuple(as_array(std::move(factors->q), w.rows * unit),
                          as_array(std::move(factors->r), w.columns * unit),
                          std::move(factors->diagonal));
}

// (columns, norms, bounds, deficient, finite, factors) of each matrix; `limits` holds the most
// pivots of each, `dtypes` those of its factors, if they are wanted.
py::list pivot_search(const std::vector<MatrixArgs>& matrices, const std::vector<int64_t>& limits,
                      int64_t rule, double tau, int64_t max_rank, int64_t block,
                      const std::optional<std::vector<int64_t>>& dtypes, int threads,
                      py::function report) {
    const std::vector<MatrixView> views = as_views(matrices);
    const auto dtype = [&](int64_t i) -> std::optional<DType> {
        if (!dtypes) return std::nullopt;
        return static_cast<DType>((*dtypes)[i]);
    };
    std::vector<Pivots> found(views.size());
    Watch watch(std::move(report));
    {
        py::gil_scoped_release nogil;
        for_each_matrix(views, threads, watch, [&](int64_t i, int count) {
            const PivotOptions options{limits[i], static_cast<RankRule>(rule), tau, max_rank, block,
                                       dtype(i)};
            found[i] = search_pivots(views[i], options, count, [&] { return watch.interrupted(); });
        });
    }
    watch.rethrow();
    py::list result;
    for (size_t i = 0; i < found.size(); ++i) {
        Pivots& p = found[i];
        result.append(py::make_tuple(
            std::move(p.columns), std::move(p.norms), std::move(p.bounds), p.deficient, p.finite,
            as_tuple(std::move(p.factors), views[i], dtype(i).value_or(DType::f64))));
    }
    return result;
}

}  // namespace

void bind_linalg(py::module_& m) {
    m.attr("EXPLICIT_LIMIT") = EXPLICIT_LIMIT;
    m.def("pivot_search", &pivot_search, py::arg("matrices"), py::arg("limits"), py::arg("rule"),
          py::arg("tau"), py::arg("max_rank"), py::arg("block"), py::arg("dtypes"),
          py::arg("threads"), py::arg("report"), "Greedy column pivots of a list of CPU matrices");
}

}  // namespace qrlora
