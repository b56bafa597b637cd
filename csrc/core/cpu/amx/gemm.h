// bf16 products on the AMX tile unit.
#pragma once

#include "../half/gemm.h"

namespace qrlora::amx {

using half::Gemm;
using half::Matrix;
using half::Product;

}  // namespace qrlora::amx
