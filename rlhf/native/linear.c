// Linear layers of bfloat16 with weights in panels: of 32 outputs each, words [inputs/2][32] of two neighbouring inputs.
// A panel is read once from memory, in order, while up to 14 rows are multiplied by it. Sums are float32, in parts of as
// many inputs as oneDNN takes, so that sampling and training round alike.

#include "vectors.h"

#define MOST 14     // rows at a time: with two vectors of each, and of the panel, what 32 registers hold
#define PANEL 32    // outputs
#define AHEAD 4096  // words by which memory is asked for before it is needed
#define NEAR 131072 // words of x that stay near while panels pass

// Word i of vector j becomes word j of vector i, by exchanging blocks of 1, 2, 4 and 8.
INLINE void transpose(words x[LANES]) {
    const ints lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    for (int d = 1; d < LANES; d *= 2) {
        ints odd = (lane & d) != 0;
        ints low = lane + (odd & (LANES - d)), high = lane + ((odd & LANES) | (~odd & d));
        for (int i = 0; i < LANES; i++)
            if (!(i & d)) {
                __m512i a = (__m512i)x[i], b = (__m512i)x[i + d];
                x[i] = (words)_mm512_permutex2var_epi32(a, (__m512i)low, b);
                x[i + d] = (words)_mm512_permutex2var_epi32(a, (__m512i)high, b);
            }
    }
}

INLINE __mmask16 first_of(long n) { return n >= LANES ? 0xffff : n > 0 ? (__mmask16)((1u << n) - 1) : 0; }

INLINE vec wide_of(__mmask16 there, const uint16_t *x) {
    return (vec)(__builtin_convertvector((halves)_mm256_maskz_loadu_epi16(there, x), words) << 16);
}

// Panels first..last of a weight [outputs][inputs]; `inputs` is even, and what lacks to a panel is zero. Panels begin at
// multiples of 64 bytes, and are written past the caches.
int pack_linear(const uint16_t *weight, uint32_t *panels, long first, long last, long inputs, long outputs) {
    long pairs = inputs / 2;
    for (long p = first; p < last; p++)
        for (long k = 0; k < pairs; k += LANES)
            for (long j = 0; j < PANEL; j += LANES) {
                words x[LANES];
                for (long i = 0; i < LANES; i++) {
                    long output = p * PANEL + j + i;
                    __mmask16 there = output < outputs ? first_of(pairs - k) : 0;
                    x[i] = (words)_mm512_maskz_loadu_epi32(there, weight + output * inputs + 2 * k);
                    _mm_prefetch(weight + output * inputs + 2 * k + 4 * PANEL, _MM_HINT_T0);
                }
                transpose(x);
                for (long i = 0; i < LANES && k + i < pairs; i++)
                    _mm512_stream_si512((void *)(panels + (p * pairs + k + i) * PANEL + j), (__m512i)x[i]);
            }
    _mm_sfence();
    return 0;
}

typedef struct {
    const uint16_t *bias, *residual; // [outputs]; [rows][outputs], added after rounding; or null
    long outputs;
} ending;

// `m` rows by one panel, into columns from `at`. `fetch`: the panel has not been read yet, so ask for what lies ahead.
INLINE void block(const int m, long pairs, const uint32_t *x, const uint32_t *panel, uint16_t *out, long at, int fetch,
                  ending e) {
    vec sum[MOST][2], parts[MOST][2];
    long part = pairs > 512 ? 512 : 256; // as oneDNN
    for (long begin = 0; begin < pairs; begin += part) {
        long end = begin + part < pairs ? begin + part : pairs;
#pragma GCC unroll 14
        for (int i = 0; i < m; i++) sum[i][0] = sum[i][1] = (vec){0};
        for (long k = begin; k < end; k++) {
            const uint32_t *from = panel + k * PANEL;
            words left = *(const words *)from, right = *(const words *)(from + LANES);
            if (fetch) {
                _mm_prefetch(from + AHEAD, _MM_HINT_T0);
                _mm_prefetch(from + AHEAD + LANES, _MM_HINT_T0);
            }
#pragma GCC unroll 14
            for (int i = 0; i < m; i++) {
                sum[i][0] = dot(sum[i][0], x[i * pairs + k], left);
                sum[i][1] = dot(sum[i][1], x[i * pairs + k], right);
            }
        }
        if (begin) {
#pragma GCC unroll 14
            for (int i = 0; i < m; i++) sum[i][0] += parts[i][0], sum[i][1] += parts[i][1];
        }
        if (end < pairs) memcpy(parts, sum, sizeof parts);
    }
    if (!e.bias && !e.residual && at + PANEL <= e.outputs) {
#pragma GCC unroll 14
        for (int i = 0; i < m; i++) {
            *(halves *)(out + i * e.outputs + at) = narrow(sum[i][0]);
            *(halves *)(out + i * e.outputs + at + LANES) = narrow(sum[i][1]);
        }
        return;
    }
#pragma GCC unroll 14
    for (int i = 0; i < m; i++)
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
            long column = at + j * LANES, place = i * e.outputs + column;
            __mmask16 there = first_of(e.outputs - column);
            vec y = sum[i][j];
            if (e.bias) y += wide_of(there, e.bias + column);
            if (e.residual) y = rounded(y) + wide_of(there, e.residual + place);
            _mm256_mask_storeu_epi16(out + place, there, (__m256i)narrow(y));
        }
}

#define CASE(m)                                                                                                        \
    case m: block(m, pairs, x, panel, out, at, fetch, e); break;

static void multiply(long m, long pairs, const uint32_t *x, const uint32_t *panel, uint16_t *out, long at, int fetch,
                     ending e) {
    switch (m) {
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7)
        CASE(8) CASE(9) CASE(10) CASE(11) CASE(12) CASE(13) CASE(14)
    }
}

// x: [rows][inputs] times a weight, into [rows][outputs]; `out` may be `residual`.
int linear(const uint16_t *x, const uint32_t *panels, const uint16_t *bias, const uint16_t *residual, uint16_t *out,
           long rows, long inputs, long outputs, int threads) {
    long pairs = inputs / 2, most = NEAR / pairs / MOST * MOST, last = (outputs + PANEL - 1) / PANEL;
    most = most > MOST ? most : MOST;
    for (long begin = 0; begin < rows; begin += most)
#pragma omp parallel for num_threads(threads) if (threads > 1)
        for (long p = 0; p < last; p++) {
            long count = rows - begin < most ? rows - begin : most, parts = (count + MOST - 1) / MOST;
            for (long part = 0; part < parts; part++) {
                long r = begin + count * part / parts, n = begin + count * (part + 1) / parts - r;
                const uint32_t *panel = panels + p * pairs * PANEL;
                multiply(n, pairs, (const uint32_t *)x + r * pairs, panel, out + r * outputs, p * PANEL, part == 0,
                         (ending){bias, residual ? residual + r * outputs : NULL, outputs});
            }
        }
    return 0;
}
