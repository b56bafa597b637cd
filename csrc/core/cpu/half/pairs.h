// Matrices in pairs, the order in which the tile reads them: words of two elements that are summed
// one after the other.
#pragma once

#include <algorithm>

#include "gemm.h"
#include "vectors.h"

namespace qrlora::QRLORA_ISA::half {

constexpr int64_t whole_pairs(int64_t depth) { return (depth + 1) / 2; }

namespace in_pairs {

// One by one: what fills no vector. Elements outside of B are zero.
inline void some(Matrix b, int64_t depth, int64_t columns, int64_t first, int64_t last,
                 int64_t from, int64_t to, int64_t width, bf16* words) {
    for (int64_t p = first; p < last; ++p)
        for (int64_t j = from; j < to; ++j)
            for (int64_t half = 0; half < 2; ++half) {
                const int64_t at = 2 * p + half;
                words[(p * width + j) * 2 + half] =
                    at < depth && j < columns ? b.data[at * b.row + j * b.col] : bf16{0};
            }
}

}  // namespace in_pairs

// B [depth, columns] as words, pair (p, j) at words[2 (p width + j)], zero padded to `width`
// columns, which are whole vectors.
inline void pack_pairs(Matrix b, int64_t depth, int64_t columns, int64_t width, bf16* words) {
    const int64_t pairs = whole_pairs(depth), whole = depth / 2;
    for (int64_t j = 0; j < width; j += lanes) {
        int64_t p = 0;
        if (j + lanes > columns) {
        } else if (b.row == 1) {  // columns are contiguous: squares of words are turned
            for (; p + lanes <= whole; p += lanes) {
                Words r[lanes];
                for (int64_t i = 0; i < lanes; ++i)
                    std::memcpy(&r[i], b.data + (j + i) * b.col + 2 * p, sizeof r[i]);
                transpose<uint32_t>(r);
                for (int64_t i = 0; i < lanes; ++i)
                    std::memcpy(words + ((p + i) * width + j) * 2, &r[i], sizeof r[i]);
            }
        } else {
            for (; p < whole; ++p) {
                const bf16* row = b.data + 2 * p * b.row + j;
                const auto low = __builtin_convertvector(load_halves(row), Words);
                const auto high = __builtin_convertvector(load_halves(row + b.row), Words);
                const Words both = low | high << 16;
                std::memcpy(words + (p * width + j) * 2, &both, sizeof both);
            }
        }
        in_pairs::some(b, depth, columns, p, pairs, j, j + lanes, width, words);
    }
}

}  // namespace qrlora::QRLORA_ISA::half
