// Normalisation and gating of rows of bfloat16 in one pass over memory, computed in float32 and rounded where the plain
// operations round. Rows lie side by side; their length `width` is a multiple of LANES.

#include "vectors.h"

// out = round(x / rms(x)) weight, rms(x) = sqrt(mean(x^2) + epsilon); `inverse` [rows] keeps 1 / rms(x).
int norm_forward(const uint16_t *x, const uint16_t *weight, uint16_t *out, float *inverse, long first, long last,
                 long width, float epsilon) {
    for (long i = first; i < last; i++) {
        const uint16_t *from = x + i * width;
        uint16_t *to = out + i * width;
        float scale = 1.0f / sqrtf(inner(from, from, width) / (float)width + epsilon);
        inverse[i] = scale;
        for (long k = 0; k < width; k += LANES) {
            vec normal = rounded(wide(from + k) * scale);
            *(halves *)(to + k) = narrow(normal * wide(weight + k));
        }
    }
    return 0;
}

// The gradients of `norm_forward`. `of_weight` [width] float32: what these rows add to it.
int norm_backward(const uint16_t *x, const uint16_t *weight, const float *inverse, const uint16_t *upper, uint16_t *of_x,
                  float *of_weight, long first, long last, long width) {
    for (long i = first; i < last; i++) {
        const uint16_t *from = x + i * width, *up = upper + i * width;
        float scale = inverse[i];
        vec along = {0};
        for (long k = 0; k < width; k += LANES) {
            vec normal = wide(from + k) * scale, g = wide(up + k);
            along += normal * g * wide(weight + k);
            *(vec *)(of_weight + k) += g * normal;
        }
        float mean = total(along) / (float)width;
        for (long k = 0; k < width; k += LANES) {
            vec normal = wide(from + k) * scale;
            *(halves *)(of_x + i * width + k) = narrow((wide(up + k) * wide(weight + k) - normal * mean) * scale);
        }
    }
    return 0;
}

INLINE vec sigmoid(vec x) {
    vec size = (vec)_mm512_abs_ps((__m512)x);
    vec small = exponential(-size);
    vec share = small / (small + 1.0f); // of -|x|
    return (vec)_mm512_mask_sub_ps((__m512)share, _mm512_cmp_ps_mask((__m512)x, _mm512_setzero_ps(), _CMP_NLT_UQ),
                                   _mm512_set1_ps(1.0f), (__m512)share);
}

// out = round(gate sigmoid(gate)) up
int gate_forward(const uint16_t *gate, const uint16_t *up, uint16_t *out, long first, long last, long width) {
    for (long k = first * width; k < last * width; k += LANES) {
        vec x = wide(gate + k);
        *(halves *)(out + k) = narrow(rounded(x * sigmoid(x)) * wide(up + k));
    }
    return 0;
}

int gate_backward(const uint16_t *gate, const uint16_t *up, const uint16_t *upper, uint16_t *of_gate, uint16_t *of_up,
                  long first, long last, long width) {
    for (long k = first * width; k < last * width; k += LANES) {
        vec x = wide(gate + k), g = wide(upper + k), share = sigmoid(x);
        *(halves *)(of_up + k) = narrow(g * x * share);
        *(halves *)(of_gate + k) = narrow(g * wide(up + k) * share * (1.0f + x * (1.0f - share)));
    }
    return 0;
}

// Rotary positions over heads [rows][heads][width], halves of a head turned against each other: x cos + rotated(x) sin,
// each product rounded; `back`: the gradient. Strides of x and out: of a row and a head, in elements; cos and sin lie as
// [rows][width]. width / 2 is a multiple of LANES.
int rotate(const uint16_t *x, const uint16_t *cosine, const uint16_t *sine, uint16_t *out, const long *strides, long first,
           long last, long heads, long width, int back) {
    long half = width / 2;
    for (long i = first; i < last; i++)
        for (long h = 0; h < heads; h++) {
            const uint16_t *from = x + i * strides[0] + h * strides[1];
            uint16_t *to = out + i * strides[2] + h * strides[3];
            const uint16_t *c = cosine + i * width, *s = sine + i * width;
            for (long k = 0; k < half; k += LANES) {
                vec low = wide(from + k), high = wide(from + half + k);
                vec one = back ? low * wide(c + k) + high * wide(s + half + k)
                               : rounded(low * wide(c + k)) - rounded(high * wide(s + k));
                vec two = back ? high * wide(c + half + k) - low * wide(s + k)
                               : rounded(high * wide(c + half + k)) + rounded(low * wide(s + half + k));
                *(halves *)(to + k) = narrow(one);
                *(halves *)(to + half + k) = narrow(two);
            }
        }
    return 0;
}
