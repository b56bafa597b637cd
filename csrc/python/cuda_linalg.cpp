// Pivoted QR of CUDA matrices on the module: one object per batch of one shape. Pointers and the
// stream come from Python as integers; the tensors behind them outlive the object's calls.
#include <stdexcept>

#include "bindings.h"
#include "qrlora/cuda/pivoted_qr.h"

namespace py = pybind11;

namespace qrlora {
namespace {

class CudaPivots {
  public:
    CudaPivots(int64_t dtype, int64_t count, int64_t rows, int64_t columns, int64_t row_stride,
               int64_t column_stride, int64_t capacity, double tau, bool factors, int device,
               uintptr_t stream)
        : batch_{static_cast<DType>(dtype),
                 count,
                 rows,
                 columns,
                 row_stride,
                 column_stride,
                 capacity,
                 tau,
                 factors,
                 nullptr,
                 nullptr,
                 nullptr,
                 nullptr,
                 nullptr,
                 nullptr},
          device_(device),
          stream_(pointer<void>(stream)) {}

    int64_t workspace_bytes() const { return cuda::pivot_workspace_bytes(batch_); }

    void bind(uintptr_t matrices, uintptr_t states, uintptr_t pivots, uintptr_t norms,
              uintptr_t bounds, uintptr_t workspace) {
        batch_.matrices = pointer<const void* const>(matrices);
        batch_.states = pointer<cuda::PivotState>(states);
        batch_.pivots = pointer<int64_t>(pivots);
        batch_.norms = pointer<double>(norms);
        batch_.bounds = pointer<double>(bounds);
        batch_.workspace = pointer<void>(workspace);
    }

    void start() const { check(cuda::launch_search_start(batch_, device_, stream_)); }

    // One round of a search or of factors; how many matrices are not done.
    int64_t round() const {
        int64_t left = 0;
        const auto launch = batch_.factors ? cuda::launch_factor_round : cuda::launch_search_round;
        check(launch(batch_, device_, stream_, left));
        return left;
    }

    void store_bounds() const { check(cuda::launch_search_finish(batch_, device_, stream_)); }

    void store_factors(int64_t dtype, uintptr_t q, uintptr_t r) const {
        const cuda::PivotFactors out{static_cast<DType>(dtype), pointer<void* const>(q),
                                     pointer<void* const>(r)};
        check(cuda::launch_factor_finish(batch_, out, device_, stream_));
    }

  private:
    static void check(const char* failure) {
        if (failure) throw std::runtime_error(failure);
    }

    cuda::PivotBatch batch_;
    int device_;
    void* stream_;
};

}  // namespace

void bind_cuda_linalg(py::module_& m) {
    using unlocked = py::call_guard<py::gil_scoped_release>;
    m.attr("cuda_pivot_state_words") = sizeof(cuda::PivotState) / sizeof(int64_t);
    py::class_<CudaPivots>(m, "CudaPivots", "Pivoted QR of a batch; see qrlora/cuda/pivoted_qr.h")
        .def(py::init<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, double, bool,
                      int, uintptr_t>(),
             py::kw_only(), py::arg("dtype"), py::arg("count"), py::arg("rows"), py::arg("columns"),
             py::arg("row_stride"), py::arg("column_stride"), py::arg("capacity"), py::arg("tau"),
             py::arg("factors"), py::arg("device"), py::arg("stream"))
        .def("workspace_bytes", &CudaPivots::workspace_bytes)
        .def("bind", &CudaPivots::bind, py::kw_only(), py::arg("matrices"), py::arg("states"),
             py::arg("pivots"), py::arg("norms"), py::arg("bounds"), py::arg("workspace"))
        .def("start", &CudaPivots::start, unlocked())
        .def("round", &CudaPivots::round, unlocked())
        .def("store_bounds", &CudaPivots::store_bounds, unlocked())
        .def("store_factors", &CudaPivots::store_factors, unlocked());
}

}  // namespace qrlora
