/* Products of matrices of bfloat16 with a processor's matrix registers (AMX), in float32. */

#pragma once

#include "lanes.h"

#if defined(__AMX_BF16__) && defined(__linux__)
#define TILES 1

#include <stdlib.h>

#define TILE 16  /* rows of a register, and columns of one that holds float32 */
#define DEPTH 32 /* bfloat16 in a row: what one instruction sums over */

INLINE int64_t rounded(int64_t size, int64_t unit) { return (size + unit - 1) / unit * unit; }
INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

/* An odd number of cache lines, so that rows do not meet in the same places of the cache. */
INLINE int64_t spread(int64_t row) { return rounded(row, 2 * DEPTH) + DEPTH; }

INLINE void configure_tiles(void) {
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } layout = {.palette = 1};
    for (int i = 0; i < 8; i++) layout.bytes[i] = 64, layout.rows[i] = TILE;
    _tile_loadconfig(&layout);
}

static void *zeros(int64_t values, int64_t bytes) { /* and a line more, since whole lanes are copied */
    int64_t size = rounded(values * bytes, 64) + 64;
    void *memory = aligned_alloc(64, size);
    memset(memory, 0, size);
    return memory;
}

/* A right factor, register by register, with zeros beyond its rows and columns. Two rows alternate in a register. */
typedef struct {
    uint16_t *values;
    int64_t steps, across;
} Packed;

/* Of lanes, as many as there are; all of them at most. */
INLINE __mmask16 in_use(int64_t count) { return count >= LANES ? 0xFFFF : count > 0 ? (1 << count) - 1 : 0; }

INLINE void narrow_some(const float *from, int64_t count, uint16_t *to) {
    narrow((lanes)_mm512_maskz_loadu_ps(in_use(count), from), to);
}

/* Of a matrix (columns, sum) that is to be multiplied by turned. */
static Packed pack_turned(const float *matrix, int64_t sum, int64_t columns) {
    Packed p = {0, rounded(sum, DEPTH) / DEPTH, rounded(columns, TILE) / TILE};
    p.values = zeros(p.steps * p.across * TILE * DEPTH, 2);
    for (int64_t n = 0; n < p.across; n++)
        for (int64_t t = 0; t < p.steps; t++) {
            lanes block[TILE] = {0};
            for (int64_t c = 0; c < least(TILE, columns - n * TILE); c++)
                for (int64_t half = 0; half < 2; half++) {
                    int64_t k = t * DEPTH + half * TILE;
                    narrow_some(matrix + (n * TILE + c) * sum + k, sum - k, (uint16_t *)(block + c) + half * TILE);
                }
            transpose(block);
            memcpy(p.values + (n * p.steps + t) * TILE * DEPTH, block, sizeof block);
        }
    return p;
}

/* Of a matrix (sum, columns). */
static Packed pack(const float *matrix, int64_t sum, int64_t columns) {
    Packed p = {0, rounded(sum, DEPTH) / DEPTH, rounded(columns, TILE) / TILE};
    p.values = zeros(p.steps * p.across * TILE * DEPTH, 2);
    for (int64_t n = 0; n < p.across; n++)
        for (int64_t k = 0; k < sum; k++) {
            uint16_t some[LANES], *to = p.values + ((n * p.steps + k / DEPTH) * TILE + k % DEPTH / 2) * DEPTH + k % 2;
            narrow_some(matrix + k * columns + n * TILE, columns - n * TILE, some);
            for (int64_t c = 0; c < TILE; c++) to[2 * c] = some[c];
        }
    return p;
}

/* `right` registers of out (16 * down rows, TILE * right columns) = a @ p from register `n` on */
INLINE void multiply(const uint16_t *a, int64_t a_row, Packed p, int64_t n, int down, int right, float *out,
                     int64_t row) {
    const uint16_t *b = p.values + n * p.steps * TILE * DEPTH, *next = b + p.steps * TILE * DEPTH;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t t = 0; t < p.steps; t++, a += DEPTH, b += TILE * DEPTH, next += TILE * DEPTH) {
        _tile_loadd(6, b, 64);
        _tile_loadd(4, a, 2 * a_row);
        _tile_dpbf16ps(0, 4, 6);
        if (right > 1) {
            _tile_loadd(7, next, 64);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (down > 1) {
            _tile_loadd(5, a + TILE * a_row, 2 * a_row);
            _tile_dpbf16ps(2, 5, 6);
            if (right > 1) _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, out, 4 * row);
    if (right > 1) _tile_stored(1, out + TILE, 4 * row);
    if (down > 1) _tile_stored(2, out + TILE * row, 4 * row);
    if (down > 1 && right > 1) _tile_stored(3, out + TILE * row + TILE, 4 * row);
}

/* out (rows, columns) = a @ p, for rows a multiple of 16; both may have room between their rows */
static void product(const uint16_t *a, int64_t a_row, int64_t rows, Packed p, float *out, int64_t row) {
    for (int64_t n = 0; n < p.across; n += 2)
        for (int64_t r = 0; r < rows; r += 2 * TILE) {
            const uint16_t *from = a + r * a_row;
            float *to = out + r * row + n * TILE;
            int down = rows - r > TILE ? 2 : 1, right = p.across - n > 1 ? 2 : 1;
            if (down > 1 && right > 1)
                multiply(from, a_row, p, n, 2, 2, to, row);
            else if (down > 1)
                multiply(from, a_row, p, n, 2, 1, to, row);
            else if (right > 1)
                multiply(from, a_row, p, n, 1, 2, to, row);
            else
                multiply(from, a_row, p, n, 1, 1, to, row);
        }
}

#endif
