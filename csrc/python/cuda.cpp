// Kernels for CUDA devices. Pointers and the stream come from Python as integers.
#include <stdexcept>

#include "bindings.h"
#include "qrlora/cuda/decode.h"

namespace qrlora {
namespace {

void* at(uintptr_t address) { return reinterpret_cast<void*>(address); }

void decode(int64_t dtype, int64_t m, int64_t n, int64_t k, int64_t r, uintptr_t x, int64_t ldx,
            uintptr_t weight, int64_t ldw, uintptr_t bias, uintptr_t q, int64_t ldq,
            uintptr_t r_factor, int64_t ldr, uintptr_t gate, bool core, bool gate_is_float,
            double scaling, uintptr_t y, uintptr_t h, uintptr_t mid, int64_t ldm, uintptr_t wide,
            int64_t device, uintptr_t stream) {
    const cuda::Decode problem{static_cast<DType>(dtype),
                               m,
                               n,
                               k,
                               r,
                               at(x),
                               ldx,
                               at(weight),
                               ldw,
                               at(bias),
                               at(q),
                               ldq,
                               at(r_factor),
                               ldr,
                               at(gate),
                               core,
                               gate_is_float,
                               static_cast<float>(scaling),
                               at(y),
                               at(h),
                               at(mid),
                               ldm,
                               static_cast<float*>(at(wide))};
    if (const char* failure = cuda::launch_decode(problem, static_cast<int>(device), at(stream)))
        throw std::runtime_error(failure);
}

}  // namespace

void bind_cuda(pybind11::module_& m) {
    m.attr("cuda_decode_tokens") = cuda::kDecodeTokens;
    m.def("cuda_decode", &decode, pybind11::call_guard<pybind11::gil_scoped_release>(),
          "Few-token forward of a gated adapter; see qrlora/cuda/decode.h");
}

}  // namespace qrlora
