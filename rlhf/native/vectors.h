// Vectors of 16 numbers: float32 to compute with, bfloat16 in memory.

#ifndef VECTORS_H
#define VECTORS_H

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LANES 16
#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t words __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t halves __attribute__((vector_size(32), aligned(2), may_alias));

INLINE vec all(float x) { return x - (vec){0}; }

// To the nearest, ties to even.
INLINE halves narrow(vec x) { return (halves)_mm512_cvtneps_pbh((__m512)x); }

// e^x to 2e-7 for x <= 0; 0 below -87.
INLINE vec exponential(vec x) {
    const float magic = 12582912.0f; // 1.5 * 2^23: adding it rounds to a whole number
    __mmask16 small = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-87.0f), _CMP_LT_OQ);
    vec y = x * 1.44269504f;
    vec shifted = y + magic;
    vec r = y - (shifted - magic);
    vec p = r * 1.5403530e-4f + 1.3333558e-3f;
    p = p * r + 9.6181291e-3f;
    p = p * r + 5.5504109e-2f;
    p = p * r + 2.4022651e-1f;
    p = p * r + 6.9314718e-1f;
    p = p * r + 1.0f;
    vec power = (vec)(((ints)shifted - 0x4b400000 + 127) << 23);
    return (vec)_mm512_mask_mov_ps((__m512)(p * power), small, _mm512_setzero_ps());
}

INLINE vec wide(const uint16_t *x) {
    return (vec)(__builtin_convertvector(*(const halves *)x, words) << 16);
}

INLINE vec rounded(vec x) { return (vec)(__builtin_convertvector(narrow(x), words) << 16); }

INLINE float total(vec x) { return _mm512_reduce_add_ps((__m512)x); }

// sum + a[0] b[0] + a[1] b[1] of two bfloat16 in each word.
INLINE vec dot(vec sum, uint32_t a, words b) {
    return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32((int)a), (__m512bh)b);
}

INLINE float inner(const uint16_t *x, const uint16_t *y, long n) {
    vec sum = {0};
    for (long k = 0; k < n; k += LANES) sum += wide(x + k) * wide(y + k);
    return total(sum);
}

#endif
