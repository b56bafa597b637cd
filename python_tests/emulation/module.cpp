// The CUDA pivoted QR as a module that runs on the CPU; see cuda_runtime.h.
#include "cuda_runtime.h"
#include "qrlora/bindings.h"

PYBIND11_MODULE(emulated, m) {
    qrlora::bind_cuda_linalg(m);
    m.def("set_schedule", &emulation::set_schedule,
          "Order of threads and blocks: 0 ascending, 1 descending, else shuffled with that seed");
}
