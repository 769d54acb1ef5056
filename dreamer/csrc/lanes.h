/* Some float32 at once, for compilers with vectors, gcc and clang. bfloat16 is the upper half of a float32; all
   arithmetic is float32. */

#pragma once

#include <stdint.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif
#define INLINE static inline __attribute__((always_inline))

typedef float lanes __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t bits __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

/* of the lanes of A, numbered from 0, and those of B after them */
#ifdef __clang__
#define SHUFFLE(A, B, ...) __builtin_shufflevector(A, B, __VA_ARGS__)
#else
#define SHUFFLE(A, B, ...) __builtin_shuffle(A, B, (ints){__VA_ARGS__})
#endif

INLINE lanes load(const float *from) {
    lanes v;
    memcpy(&v, from, sizeof v);
    return v;
}

INLINE void store(lanes v, float *to) { memcpy(to, &v, sizeof v); }

INLINE lanes widen(const uint16_t *from) {
    halves upper;
    memcpy(&upper, from, sizeof upper);
    return (lanes)(__builtin_convertvector(upper, bits) << 16);
}

INLINE void narrow(lanes v, uint16_t *to) { /* rounds to nearest even; a NaN stays one */
#ifdef __AVX512BF16__
    __m256bh upper = _mm512_cvtneps_pbh((__m512)v);
#else
    bits whole = (bits)v, nan = (bits)(v != v);
    whole = (whole + 0x7FFF + ((whole >> 16) & 1)) >> 16;
    halves upper = __builtin_convertvector((whole & ~nan) | (0x7FC0 & nan), halves);
#endif
    memcpy(to, &upper, sizeof upper);
}

INLINE lanes choose(ints where, lanes a, lanes b) { return (lanes)((where & (ints)a) | (~where & (ints)b)); }

/* exp(x) = 2^n * 2^f with f in [-0.5, 0.5], 2^f by its Taylor series: off by less than 2e-7 of its value. Beyond 2^126
   and its inverse it stays there. */
INLINE lanes exponential(lanes x) {
    lanes t = x * 1.44269504f;
#ifdef __AVX512F__
    t = (lanes)_mm512_max_ps(_mm512_set1_ps(-126.0f), _mm512_min_ps(_mm512_set1_ps(126.0f), (__m512)t));
    lanes n = (lanes)_mm512_roundscale_ps((__m512)t, _MM_FROUND_TO_NEAREST_INT);
#else
    const lanes most = (lanes){0} + 126.0f;
    t = choose(t > most, most, choose(t < -most, -most, t));
    lanes n = __builtin_convertvector(__builtin_convertvector(t + 126.5f, ints) - 126, lanes);
#endif
    lanes f = (t - n) * 0.693147181f;
    lanes p =
        1.0f +
        f * (1.0f + f * (0.5f + f * (0.166666667f + f * (0.0416666667f + f * (0.00833333333f + f * 0.00138888889f)))));
#ifdef __AVX512F__
    return (lanes)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    return p * (lanes)((__builtin_convertvector(n, ints) + 127) << 23);
#endif
}

INLINE lanes sigmoid(lanes x) {
    lanes d = 1.0f + exponential(-x);
#ifdef __AVX512F__ /* a division takes as long as all the rest */
    lanes r = (lanes)_mm512_rcp14_ps((__m512)d);
    return r * (2.0f - d * r);
#else
    return 1.0f / d;
#endif
}

INLINE float total(lanes v) {
#ifdef __AVX512F__
    return _mm512_reduce_add_ps((__m512)v);
#else
    float sum = 0.0f;
    for (int i = 0; i < LANES; i++) sum += v[i];
    return sum;
#endif
}

#if LANES == 16

/* For lanes I and I + 8 of two vectors, and so on: the former of the first beside the former of the second for I = 0,
   the latter for I = 8. */
#define BY8(I) \
    I, I + 1, I + 2, I + 3, I + 4, I + 5, I + 6, I + 7, I + 16, I + 17, I + 18, I + 19, I + 20, I + 21, I + 22, I + 23
#define BY4(I) \
    I, I + 1, I + 2, I + 3, I + 16, I + 17, I + 18, I + 19, I + 8, I + 9, I + 10, I + 11, I + 24, I + 25, I + 26, I + 27
#define BY2(I) \
    I, I + 1, I + 16, I + 17, I + 4, I + 5, I + 20, I + 21, I + 8, I + 9, I + 24, I + 25, I + 12, I + 13, I + 28, I + 29
#define BY1(I)                                                                                                     \
    I, I + 16, I + 2, I + 18, I + 4, I + 20, I + 6, I + 22, I + 8, I + 24, I + 10, I + 26, I + 12, I + 28, I + 14, \
        I + 30

/* A square of lanes: lane c of v[r] becomes lane r of v[c]. */
INLINE void transpose(lanes *v) {
#define SWAP(S, BY)                          \
    for (int r = 0; r < LANES; r++)          \
        if (!(r & S)) {                      \
            lanes a = v[r], b = v[r + S];    \
            v[r] = SHUFFLE(a, b, BY(0));     \
            v[r + S] = SHUFFLE(a, b, BY(S)); \
        }
    SWAP(8, BY8)
    SWAP(4, BY4)
    SWAP(2, BY2)
    SWAP(1, BY1)
#undef SWAP
}

/* lane r: the sum of v[r] over its lanes; v is used up */
INLINE lanes totals(lanes *v) {
#define ADD(S, BY) \
    for (int r = 0; r < S; r++) v[r] = SHUFFLE(v[r], v[r + S], BY(0)) + SHUFFLE(v[r], v[r + S], BY(S));
    ADD(8, BY8)
    ADD(4, BY4)
    ADD(2, BY2)
    ADD(1, BY1)
#undef ADD
    return v[0];
}

#else

INLINE lanes totals(lanes *v) {
    lanes sum;
    for (int r = 0; r < LANES; r++) sum[r] = total(v[r]);
    return sum;
}

#endif
