// How a Python tensor is read without a call of its methods: the part of DLPack's C ABI that is
// used here, of dlpack.h 1.3 (https://github.com/dmlc/dlpack, Copyright 2017 by its contributors,
// Apache-2.0). A framework offers the table of functions as a capsule on its tensor type, so no
// header of the framework is needed and one build serves every version that keeps the major number.
#pragma once

#include <cstdint>

namespace qrlora::dlpack {

struct Version {
    uint32_t major, minor;
};
constexpr uint32_t known_major = 1;

struct Device {
    int32_t type, id;
};
constexpr int32_t device_cpu = 1;

struct DataType {
    uint8_t code, bits;
    uint16_t lanes;
};
constexpr uint8_t code_int = 0, code_float = 2, code_bfloat = 4;

// Borrowed: what it points to lives as long as the tensor it was read from. Strides in elements.
struct Tensor {
    void* data;
    Device device;
    int32_t ndim;
    DataType dtype;
    int64_t *shape, *strides;
    uint64_t byte_offset;
};

struct ExchangeHeader {
    Version version;
    const ExchangeHeader* previous;  // the same table for an older major number, or null
};

struct ExchangeAPI {
    ExchangeHeader header;
    void (*managed_tensor_allocator)();  // not used, nor are the next two
    void (*managed_tensor_from_py_object_no_sync)();
    void (*managed_tensor_to_py_object_no_sync)();
    int (*dltensor_from_py_object_no_sync)(void* object,
                                           Tensor* out);  // 0, or a Python error; or null
    void (*current_work_stream)();
};

constexpr const char* capsule_name = "dlpack_exchange_api";

}  // namespace qrlora::dlpack
