// The pybind11 module qrlora_kernels._C. Kernels take raw pointers, int64 sizes and, on CUDA, a
// device and a stream; every check on shapes and dtypes is done in Python before the call.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "bindings.h"
#include "qrlora/cpu/amx.h"
#include "qrlora/cpu/buffer.h"
#include "qrlora/cpu/table.h"

namespace py = pybind11;

namespace {

std::string names_of_columns() {
    std::string names;
    for (const qrlora::Column& column : qrlora::columns())
        names += (names.empty() ? "" : ",") + std::string(column.name);
    return names;
}

// What this binary was built from and for; every value is a plain string.
std::map<std::string, std::string> build_config() {
    std::map<std::string, std::string> config{
        {"version", QRLORA_VERSION},
        {"cpu_kernels", names_of_columns()},
        {"cuda", QRLORA_CUDA_NOTE},
#if defined(__clang__)
        {"compiler", "clang " __clang_version__},
#else
        {"compiler", "g++ " __VERSION__},
#endif
#ifdef _OPENMP
        {"openmp", std::to_string(_OPENMP)},
#else
        {"openmp", "none: one thread"},
#endif
#ifdef QRLORA_SANITIZE
        {"sanitizers", "address, undefined"},
#endif
    };
    return config;
}

// Why each column does not run here; empty where it does.
std::map<std::string, std::string> instruction_sets() {
    std::map<std::string, std::string> sets;
    for (const qrlora::Column& column : qrlora::columns()) sets[column.name] = column.obstacle();
    return sets;
}

#ifdef QRLORA_SANITIZE
// Reads what a kept buffer holds beyond the last request: no allocator knows of that end.
int read_past_the_end() {
    qrlora::AlignedBuffer<unsigned char> buffer;
    buffer.reserve(4096);
    const volatile unsigned char* data = buffer.reserve(100);
    return data[100 + 4];
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Native kernels of qrlora_kernels (no torch dependency)";
    m.def("build_config", &build_config, "What this binary was built from and for");
    m.def("instruction_sets", &instruction_sets,
          "{set that there are CPU kernels for: why it does not run here, or nothing}");
    m.def("cpu_features", &qrlora::amx::features,
          "[(feature beyond the baseline that CPU kernels use, whether this CPU has it)]");
    m.def("amx_obstacle", &qrlora::amx::obstacle,
          "Why bf16 products do not run on the AMX tile unit, or nothing");
#ifdef QRLORA_SANITIZE
    m.def("read_past_the_end", &read_past_the_end, "A fault, to prove that it would be noticed");
#endif
    py::list names;
    for (const qrlora::Column& column : qrlora::columns()) names.append(column.name);
    m.attr("columns") = py::tuple(names);
    m.def("made_by_amd", &qrlora::made_by_amd, "Whether the CPU is an AMD");
    m.def("best_column", &qrlora::best_column,
          "Where in columns the instruction set in use stands; QRLORA_ISA may ask for less");
    qrlora::bind_calls(m);
    qrlora::bind_linalg(m);
    qrlora::bind_linear_add(m);
    qrlora::bind_kron(m);
    qrlora::bind_low_rank(m);
    qrlora::bind_panels(m);
#ifdef QRLORA_WITH_CUDA
    qrlora::bind_cuda(m);
    qrlora::bind_cuda_linalg(m);
#endif
}
