// The tile unit: eight tiles of 16 rows by 64 bytes, and the moves that bring operands into them.
// tdpbf16ps adds to C [16, 16] fp32 the product of A [16, 32] (rows contiguous) and B [32, 16] in
// pairs: row p of the tile holds (B[2p, j], B[2p + 1, j]) for j = 0..15.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "qrlora/dtype.h"

namespace qrlora::amx {

constexpr int64_t tile_depth = 32;  // contraction elements of one tile
constexpr int64_t tile_bytes = 1024;

inline int64_t round_up(int64_t v, int64_t to) { return (v + to - 1) / to * to; }

// Before it all stores to the memory at `p` are done, behind it nothing is known of that memory.
// GCC 12 is told by its own intrinsics of eight of a configuration's bytes and of none that a tile
// load reads, and left out or moved stores that it took for unread.
inline void settle(const void* p) { asm volatile("" : : "r"(p) : "memory"); }

// _tile_loadd, which wants a literal for the tile, between the stores around it.
#define QRLORA_TILE_LOAD(tile, from, stride) \
    do {                                     \
        settle(from);                        \
        _tile_loadd(tile, from, stride);     \
        settle(from);                        \
    } while (false)

// Configures this thread's tiles, and gives the previous owner its configuration back.
class TileScope {
  public:
    // Tiles 0..5 have `rows` rows, for sums and left operands; the others 16.
    explicit TileScope(int64_t rows = 16) {
        settle(&before_);
        _tile_storeconfig(&before_);
        settle(&before_);
        Config mine;
        for (int t = 0; t < 8; ++t) {
            mine.bytes[t] = 64;
            mine.rows[t] = static_cast<uint8_t>(t < 6 ? rows : 16);
        }
        settle(&mine);
        _tile_loadconfig(&mine);
        settle(&mine);
    }
    ~TileScope() {
        settle(&before_);
        _tile_loadconfig(&before_);
    }
    TileScope(const TileScope&) = delete;
    TileScope& operator=(const TileScope&) = delete;

  private:
    struct alignas(64) Config {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t bytes[16] = {};
        uint8_t rows[16] = {};
    };
    Config before_;
};

struct Free {
    void operator()(void* p) const { std::free(p); }
};
template <typename T>
using Zeroed = std::unique_ptr<T[], Free>;

// Zeros, aligned to a cache line.
template <typename T = bf16>
inline Zeroed<T> allocate(int64_t count) {
    const int64_t bytes = round_up(std::max<int64_t>(count, 1) * sizeof(T), 64);
    void* p = std::aligned_alloc(64, bytes);
    if (!p) throw std::bad_alloc();
    std::memset(p, 0, bytes);
    return Zeroed<T>(static_cast<T*>(p));
}

// How many pieces of `side` cover `size`.
inline int64_t tiles(int64_t size, int64_t side) { return (size + side - 1) / side; }

// Bit j set for the first `count` of 32 (16) lanes.
inline __mmask32 first32(int64_t count) {
    return count >= 32 ? ~__mmask32(0) : count <= 0 ? 0 : (__mmask32(1) << count) - 1;
}
inline __mmask16 first16(int64_t count) {
    return count >= 16 ? __mmask16(~0u) : count <= 0 ? 0 : __mmask16((1u << count) - 1);
}

// r[i] holds row i of a 16x16 matrix of 32-bit words; on return it holds column i.
inline void transpose_words(__m512i (&r)[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; ++i) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

// Two rows of 32 bf16 to pairs: low has columns 0..15, high columns 16..31.
inline void pair_rows(__m512i even, __m512i odd, __m512i& low, __m512i& high) {
    const __m512i step =
        _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                         37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    low = _mm512_permutex2var_epi16(even, step, odd);
    high = _mm512_permutex2var_epi16(even, _mm512_add_epi16(step, _mm512_set1_epi16(16)), odd);
}

// bf16 [rows, columns] in memory, rows ld apart, to zero-padded rows `to_ld` apart.
inline void copy_rows(const bf16* from, int64_t ld, int64_t rows, int64_t columns, bf16* to,
                      int64_t to_rows, int64_t to_ld) {
    for (int64_t i = 0; i < to_rows; ++i)
        for (int64_t j = 0; j < to_ld; j += 32)
            _mm512_storeu_si512(
                to + i * to_ld + j,
                _mm512_maskz_loadu_epi16(i < rows ? first32(columns - j) : 0, from + i * ld + j));
}

// 32 columns of B over the whole depth, as two tiles for each 32 of the depth; zero padded.
void pack_b(const bf16* b, int64_t row, int64_t col, int64_t depth, int64_t columns, bf16* to);

// 32 rows of A into rows of `ld` elements (a multiple of 32), zero padded.
void pack_a(const bf16* a, int64_t row, int64_t col, int64_t depth, int64_t rows, bf16* to,
            int64_t ld);

}  // namespace qrlora::amx
