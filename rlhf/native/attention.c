// Attention over trees (rlhf/models/trees.py) in bfloat16 on a CPU: products of bfloat16 added up in float32, softmax in
// float32. rlhf/native/__init__.py compiles and calls it.
//
// Every product is C[m][n] (+)= sum_k A[m][k] B[k][n] with two k side by side in a 32-bit word: in the rows of A as they
// lie, in B as words [k/2][n]. The keys of a tree have places: those of the prompt, then of each response, each padded
// to a multiple of LANES.

#include "vectors.h"

#define ROWS 32 // queries at a time

INLINE long padded(long n) { return (n + LANES - 1) / LANES * LANES; }

INLINE void block(const int m, const int n, long pairs, const uint32_t *a, long lda, const uint32_t *b, long ldb,
                  float *c, long ldc, int add) {
    vec sum[6][4];
#pragma GCC unroll 6
    for (int i = 0; i < m; i++)
#pragma GCC unroll 4
        for (int j = 0; j < n; j++) sum[i][j] = add ? *(vec *)(c + i * ldc + j * LANES) : (vec){0};
    for (long k = 0; k < pairs; k++) {
        words right[4];
#pragma GCC unroll 4
        for (int j = 0; j < n; j++) right[j] = *(const words *)(b + k * ldb + j * LANES);
#pragma GCC unroll 6
        for (int i = 0; i < m; i++)
#pragma GCC unroll 4
            for (int j = 0; j < n; j++) sum[i][j] = dot(sum[i][j], a[i * lda + k], right[j]);
    }
#pragma GCC unroll 6
    for (int i = 0; i < m; i++)
#pragma GCC unroll 4
        for (int j = 0; j < n; j++) *(vec *)(c + i * ldc + j * LANES) = sum[i][j];
}

INLINE void columns(const int n, long m, long pairs, const uint32_t *a, long lda, const uint32_t *b, long ldb, float *c,
                    long ldc, int add) {
    for (; m >= 6; m -= 6, a += 6 * lda, c += 6 * ldc) block(6, n, pairs, a, lda, b, ldb, c, ldc, add);
    switch (m) {
    case 5: block(5, n, pairs, a, lda, b, ldb, c, ldc, add); break;
    case 4: block(4, n, pairs, a, lda, b, ldb, c, ldc, add); break;
    case 3: block(3, n, pairs, a, lda, b, ldb, c, ldc, add); break;
    case 2: block(2, n, pairs, a, lda, b, ldb, c, ldc, add); break;
    case 1: block(1, n, pairs, a, lda, b, ldb, c, ldc, add); break;
    }
}

// C[m][n] (+)= A[m][2 pairs] B; strides of A and B in words, of C in floats; n a multiple of LANES.
static void product(long m, long n, long pairs, const uint32_t *a, long lda, const uint32_t *b, long ldb, float *c,
                    long ldc, int add) {
    for (; n >= 4 * LANES; n -= 4 * LANES, b += 4 * LANES, c += 4 * LANES)
        columns(4, m, pairs, a, lda, b, ldb, c, ldc, add);
    if (n >= 2 * LANES) {
        columns(2, m, pairs, a, lda, b, ldb, c, ldc, add);
        n -= 2 * LANES, b += 2 * LANES, c += 2 * LANES;
    }
    if (n) columns(1, m, pairs, a, lda, b, ldb, c, ldc, add);
}

// One of the tensors [heads][tokens][width], at one head: rows of bfloat16, `stride` elements apart.
typedef struct {
    uint16_t *at;
    long stride;
} rows;

INLINE uint16_t *row(rows x, long token) { return x.at + token * x.stride; }

typedef struct {
    long prompt, count;     // tokens; responses
    const int32_t *lengths; // tokens of each response
    long places;
} tree;

INLINE long length_of(const tree *t, long segment) { return segment ? t->lengths[segment - 1] : t->prompt; }

// Reads a tree from `shape`: prompt, number of responses, their lengths. Returns what follows.
static const int32_t *next_tree(const int32_t *shape, tree *t) {
    t->prompt = shape[0], t->count = shape[1], t->lengths = shape + 2;
    t->places = padded(t->prompt);
    for (long i = 0; i < t->count; i++) t->places += padded(t->lengths[i]);
    return shape + 2 + t->count;
}

// Words [width/2][places]: two neighbouring columns of each token.
static void pack_columns(const tree *t, rows x, long width, uint32_t *to) {
    int32_t steps[LANES];
    for (int j = 0; j < LANES; j++) steps[j] = (int32_t)(j * x.stride / 2);
    __m512i at = _mm512_loadu_si512(steps);
    long token = 0, place = 0;
    for (long s = 0; s <= t->count; s++) {
        long n = length_of(t, s);
        for (long i = 0; i < n; i += LANES) {
            __mmask16 there = n - i >= LANES ? 0xffff : (__mmask16)((1u << (n - i)) - 1);
            const uint32_t *from = (const uint32_t *)row(x, token + i);
            for (long k = 0; k < width / 2; k++)
                _mm512_storeu_si512(to + k * t->places + place + i,
                                    _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), there, at, from + k, 4));
        }
        token += n, place += padded(n);
    }
}

// Words [places/2][width]: two neighbouring tokens in each column.
static void pack_tokens(const tree *t, rows x, long width, uint32_t *to) {
    memset(to, 0, sizeof(uint32_t) * (size_t)(width * t->places / 2));
    long token = 0, place = 0;
    for (long s = 0; s <= t->count; s++) {
        long n = length_of(t, s);
        for (long i = 0; i < n; i += 2) {
            const uint16_t *first = row(x, token + i), *second = i + 1 < n ? row(x, token + i + 1) : NULL;
            uint32_t *out = to + (place + i) / 2 * width;
            for (long k = 0; k < width; k++) out[k] = first[k] | (second ? (uint32_t)second[k] << 16 : 0);
        }
        token += n, place += padded(n);
    }
}

// A block of queries of one segment, and the places of the keys it sees: `prefix` from 0, then `own` from `from`.
typedef struct {
    long first, count;     // queries, by their place within the tree's tokens
    long seen;             // tokens of the prompt that all see
    long prefix, from, own; // places
    long before;           // own tokens before the first query
    long width;            // prefix + own
} queries;

INLINE queries queries_at(const tree *t, long segment, long token, long place, long start) {
    long n = length_of(t, segment) - start;
    queries q = {.first = token + start, .count = n < ROWS ? n : ROWS, .from = place, .before = start};
    q.seen = segment ? t->prompt : 0;
    q.prefix = padded(q.seen);
    q.own = padded(start + q.count);
    q.width = q.prefix + q.own;
    return q;
}

// Of all queries: product with the words of their keys, [count][width].
INLINE void with_keys(const tree *t, const queries *q, rows x, long width, const uint32_t *keys, float *scores) {
    const uint32_t *a = (const uint32_t *)row(x, q->first);
    product(q->count, q->prefix, width / 2, a, x.stride / 2, keys, t->places, scores, q->width, 0);
    product(q->count, q->own, width / 2, a, x.stride / 2, keys + q->from, t->places, scores + q->prefix, q->width, 0);
}

// Hides from query i what it must not see.
INLINE void hide(const queries *q, long i, float *scores) {
    for (long k = q->seen; k < q->prefix; k++) scores[k] = -INFINITY;
    for (long k = q->before + i + 1; k < q->own; k++) scores[q->prefix + k] = -INFINITY;
}

// [count][width of a head] = shares [count][width] times the tokens of their places.
INLINE void of_tokens(const queries *q, const uint16_t *shares, const uint32_t *tokens, long width, float *out) {
    const uint32_t *a = (const uint32_t *)shares;
    product(q->count, width, q->prefix / 2, a, q->width / 2, tokens, width, out, width, 0);
    product(q->count, width, q->own / 2, a + q->prefix / 2, q->width / 2, tokens + q->from / 2 * width, width, out, width,
            1);
}

// The softmax of scale * x, n numbers, as bfloat16; the logarithm of its sum. Overwrites x.
INLINE float softmax(float *x, long n, float scale, uint16_t *shares) {
    vec high = all(-INFINITY), sum = {0};
    for (long k = 0; k < n; k += LANES) high = (vec)_mm512_max_ps((__m512)high, (__m512) * (vec *)(x + k));
    float top = _mm512_reduce_max_ps((__m512)high) * scale;
    for (long k = 0; k < n; k += LANES) {
        vec e = exponential(*(vec *)(x + k) * scale - top);
        *(vec *)(x + k) = e;
        sum += e;
    }
    float share = 1.0f / total(sum);
    for (long k = 0; k < n; k += LANES) *(halves *)(shares + k) = narrow(*(vec *)(x + k) * share);
    return top - logf(share);
}

static void *room(size_t bytes) { return aligned_alloc(64, (bytes + 63) / 64 * 64); }

static long most_places(const int32_t *shape, long trees) {
    long most = 0;
    for (long i = 0; i < trees; i++) {
        tree t;
        shape = next_tree(shape, &t);
        if (t.places > most) most = t.places;
    }
    return most;
}

INLINE rows at_head(uint16_t *x, const long *strides, long head, long token) {
    return (rows){x + head * strides[0] + token * strides[1], strides[1]};
}

// Heads first..last of [heads][tokens][width] tensors; strides: of a head and of a token, in elements, for query, key,
// value and out. `logs` [heads][tokens]: the logarithm of each query's sum of exponentials. Returns 0, or 1 without
// memory.
int tree_forward(uint16_t *query, uint16_t *key, uint16_t *value, uint16_t *out, float *logs, const long *strides,
                 const int32_t *shape, long trees, long first, long last, long tokens, long width, float scale) {
    long most = most_places(shape, trees);
    uint32_t *keys = room(sizeof(uint32_t) * width / 2 * most), *values = room(sizeof(uint32_t) * width / 2 * most);
    float *scores = room(sizeof(float) * ROWS * most), *sums = room(sizeof(float) * ROWS * width);
    uint16_t *shares = room(sizeof(uint16_t) * ROWS * most);
    int failed = !keys || !values || !scores || !sums || !shares;
    long begin = 0;
    for (long n = 0; n < trees && !failed; n++) {
        tree t;
        shape = next_tree(shape, &t);
        for (long head = first; head < last; head++) {
            rows q_rows = at_head(query, strides, head, begin), k_rows = at_head(key, strides + 2, head, begin),
                 v_rows = at_head(value, strides + 4, head, begin), o_rows = at_head(out, strides + 6, head, begin);
            pack_columns(&t, k_rows, width, keys);
            pack_tokens(&t, v_rows, width, values);
            long token = 0, place = 0;
            for (long s = 0; s <= t.count; s++) {
                for (long start = 0; start < length_of(&t, s); start += ROWS) {
                    queries q = queries_at(&t, s, token, place, start);
                    with_keys(&t, &q, q_rows, width, keys, scores);
                    for (long i = 0; i < q.count; i++) {
                        float *x = scores + i * q.width;
                        hide(&q, i, x);
                        logs[head * tokens + begin + q.first + i] = softmax(x, q.width, scale, shares + i * q.width);
                    }
                    of_tokens(&q, shares, values, width, sums);
                    for (long i = 0; i < q.count; i++)
                        for (long k = 0; k < width; k += LANES)
                            *(halves *)(row(o_rows, q.first + i) + k) = narrow(*(vec *)(sums + i * width + k));
                }
                token += length_of(&t, s), place += padded(length_of(&t, s));
            }
        }
        begin += t.prompt;
        for (long s = 1; s <= t.count; s++) begin += length_of(&t, s);
    }
    free(keys), free(values), free(scores), free(sums), free(shares);
    return failed;
}

// Rows of a block of queries, turned: words [width][ROWS/2] of two neighbouring queries.
INLINE void turn(const queries *q, rows x, long width, uint16_t *to) {
    for (long k = 0; k < width; k++)
        for (long i = 0; i < ROWS; i++) to[k * ROWS + i] = i < q->count ? row(x, q->first + i)[k] : 0;
}

// Adds the gradient of what a block of queries sees to [width][places].
INLINE void to_keys(const tree *t, const queries *q, const uint16_t *turned, const uint32_t *shares, long width,
                    float *gradient) {
    long pairs = (q->count + 1) / 2;
    const uint32_t *a = (const uint32_t *)turned;
    product(width, q->prefix, pairs, a, ROWS / 2, shares, q->width, gradient, t->places, 1);
    product(width, q->own, pairs, a, ROWS / 2, shares + q->prefix, q->width, gradient + q->from, t->places, 1);
}

// Gradients [width][places] as rows of tokens.
static void unpack(const tree *t, const float *gradient, long width, float scale, rows to) {
    long token = 0, place = 0;
    for (long s = 0; s <= t->count; s++) {
        long n = length_of(t, s);
        for (long i = 0; i < n; i += LANES)
            for (long k = 0; k < width; k++) {
                halves column = narrow(*(const vec *)(gradient + k * t->places + place + i) * scale);
                for (long j = 0; j < LANES && i + j < n; j++) row(to, token + i + j)[k] = column[j];
            }
        token += n, place += padded(n);
    }
}

// The gradients of `tree_forward`. Strides: of query, key, value, out, the gradient of out, and of query, key, value.
int tree_backward(uint16_t *query, uint16_t *key, uint16_t *value, uint16_t *out, uint16_t *upper, uint16_t *of_query,
                  uint16_t *of_key, uint16_t *of_value, const float *logs, const long *strides, const int32_t *shape,
                  long trees, long first, long last, long tokens, long width, float scale) {
    long most = most_places(shape, trees);
    size_t packed = sizeof(uint32_t) * width / 2 * most;
    uint32_t *keys = room(packed), *values = room(packed), *key_tokens = room(packed);
    float *scores = room(sizeof(float) * ROWS * most), *upper_shares = room(sizeof(float) * ROWS * most);
    float *sums = room(sizeof(float) * ROWS * width);
    float *to_key = room(sizeof(float) * width * most), *to_value = room(sizeof(float) * width * most);
    uint16_t *rows_of = room(sizeof(uint16_t) * ROWS * most), *turned = room(sizeof(uint16_t) * ROWS * width);
    uint32_t *shares = room(sizeof(uint32_t) * ROWS / 2 * most), *changes = room(sizeof(uint32_t) * ROWS / 2 * most);
    int failed = !keys || !values || !key_tokens || !scores || !upper_shares || !sums || !to_key || !to_value ||
                 !rows_of || !turned || !shares || !changes;
    long begin = 0;
    for (long n = 0; n < trees && !failed; n++) {
        tree t;
        shape = next_tree(shape, &t);
        for (long head = first; head < last; head++) {
            rows q_rows = at_head(query, strides, head, begin), k_rows = at_head(key, strides + 2, head, begin),
                 v_rows = at_head(value, strides + 4, head, begin), o_rows = at_head(out, strides + 6, head, begin),
                 u_rows = at_head(upper, strides + 8, head, begin);
            pack_columns(&t, k_rows, width, keys);
            pack_columns(&t, v_rows, width, values);
            pack_tokens(&t, k_rows, width, key_tokens);
            memset(to_key, 0, sizeof(float) * width * t.places);
            memset(to_value, 0, sizeof(float) * width * t.places);
            rows to_query = at_head(of_query, strides + 10, head, begin);
            long token = 0, place = 0;
            for (long s = 0; s <= t.count; s++) {
                for (long start = 0; start < length_of(&t, s); start += ROWS) {
                    queries q = queries_at(&t, s, token, place, start);
                    with_keys(&t, &q, q_rows, width, keys, scores);
                    with_keys(&t, &q, u_rows, width, values, upper_shares);
                    for (long i = 0; i < q.count; i++) {
                        float *x = scores + i * q.width, *u = upper_shares + i * q.width;
                        hide(&q, i, x);
                        float log_sum = logs[head * tokens + begin + q.first + i];
                        float mean = inner(row(o_rows, q.first + i), row(u_rows, q.first + i), width);
                        uint32_t *p = shares + i / 2 * q.width, *d = changes + i / 2 * q.width;
                        for (long k = 0; k < q.width; k += LANES) {
                            vec share = exponential(*(vec *)(x + k) * scale - log_sum);
                            halves change = narrow(share * (*(vec *)(u + k) - mean));
                            *(halves *)(rows_of + i * q.width + k) = change;
                            words a = __builtin_convertvector(narrow(share), words);
                            words b = __builtin_convertvector(change, words);
                            if (i % 2) a = *(words *)(p + k) | a << 16, b = *(words *)(d + k) | b << 16;
                            *(words *)(p + k) = a;
                            *(words *)(d + k) = b;
                        }
                    }
                    of_tokens(&q, rows_of, key_tokens, width, sums);
                    for (long i = 0; i < q.count; i++)
                        for (long k = 0; k < width; k += LANES)
                            *(halves *)(row(to_query, q.first + i) + k) = narrow(*(vec *)(sums + i * width + k) * scale);
                    turn(&q, q_rows, width, turned);
                    to_keys(&t, &q, turned, changes, width, to_key);
                    turn(&q, u_rows, width, turned);
                    to_keys(&t, &q, turned, shares, width, to_value);
                }
                token += length_of(&t, s), place += padded(length_of(&t, s));
            }
            unpack(&t, to_key, width, scale, at_head(of_key, strides + 12, head, begin));
            unpack(&t, to_value, width, 1.0f, at_head(of_value, strides + 14, head, begin));
        }
        begin += t.prompt;
        for (long s = 1; s <= t.count; s++) begin += length_of(&t, s);
    }
    free(keys), free(values), free(key_tokens), free(scores), free(upper_shares), free(sums), free(to_key);
    free(to_value), free(rows_of), free(turned), free(shares), free(changes);
    return failed;
}

// What `decode` does, for key heads first..last.
static int decode_heads(const uint16_t *query, const uint16_t *new_key, const uint16_t *new_value, uint16_t *out,
                        uint16_t *own_key, uint16_t *own_value, const uint32_t *const *keys,
                        const uint32_t *const *values, const int32_t *lengths, const int32_t *starts,
                        const int32_t *order, const int32_t *slots, const int32_t *counts, long prompts, long first,
                        long last, long heads, long groups, long width, long space, float scale) {
    long longest = 0;
    for (long p = 0; p < prompts; p++) longest = lengths[p] > longest ? lengths[p] : longest;
    long most = padded(longest) + padded(space);
    float *scores = room(sizeof(float) * ROWS * most), *sums = room(sizeof(float) * ROWS * width);
    uint16_t *shares = room(sizeof(uint16_t) * ROWS * most), *block = room(sizeof(uint16_t) * ROWS * width);
    int failed = !scores || !sums || !shares || !block;
    for (long head = first; head < last && !failed; head++) {
        for (long p = 0; p < prompts; p++) {
            long places = padded(lengths[p]), all_queries = (starts[p + 1] - starts[p]) * groups;
            const uint32_t *prompt_keys = keys[p] + head * width / 2 * places;
            const uint32_t *prompt_values = values[p] + head * places / 2 * width;
            for (long begin = 0; begin < all_queries; begin += ROWS) {
                long n = all_queries - begin < ROWS ? all_queries - begin : ROWS, own = 0;
                for (long i = 0; i < n; i++) {
                    long r = order[starts[p] + (begin + i) / groups], g = (begin + i) % groups, place = counts[r];
                    memcpy(block + i * width, query + ((r * heads + head) * groups + g) * width, 2 * width);
                    if (g == 0) {
                        long at = ((slots[r] * heads + head) * space + place) * width;
                        memcpy(own_key + at, new_key + (r * heads + head) * width, 2 * width);
                        memcpy(own_value + at, new_value + (r * heads + head) * width, 2 * width);
                    }
                    own = place + 1 > own ? place + 1 : own;
                }
                long wide_own = padded(own), all_places = places + wide_own;
                product(n, places, width / 2, (uint32_t *)block, width / 2, prompt_keys, places, scores, all_places, 0);
                for (long i = 0; i < n; i++) {
                    long r = order[starts[p] + (begin + i) / groups], seen = counts[r] + 1;
                    const uint16_t *k = own_key + (slots[r] * heads + head) * space * width;
                    float *x = scores + i * all_places;
                    for (long t = lengths[p]; t < places; t++) x[t] = -INFINITY;
                    for (long t = 0; t < seen; t++) x[places + t] = inner(block + i * width, k + t * width, width);
                    for (long t = seen; t < wide_own; t++) x[places + t] = -INFINITY;
                    softmax(x, all_places, scale, shares + i * all_places);
                }
                product(n, width, places / 2, (uint32_t *)shares, all_places / 2, prompt_values, width, sums, width, 0);
                for (long i = 0; i < n; i++) {
                    long r = order[starts[p] + (begin + i) / groups], g = (begin + i) % groups, seen = counts[r] + 1;
                    const uint16_t *v = own_value + (slots[r] * heads + head) * space * width;
                    for (long k = 0; k < width; k += LANES) {
                        vec sum = *(vec *)(sums + i * width + k);
                        for (long t = 0; t < seen; t++) {
                            uint32_t bits = (uint32_t)shares[i * all_places + places + t] << 16;
                            float share;
                            memcpy(&share, &bits, 4);
                            sum += wide(v + t * width + k) * share;
                        }
                        *(halves *)(out + ((r * heads + head) * groups + g) * width + k) = narrow(sum);
                    }
                }
            }
        }
    }
    free(scores), free(sums), free(shares), free(block);
    return failed;
}

// One step of sampling: each row's new token over its prompt and its own tokens, the new one among them. Queries, new
// keys, new values and out are [rows][heads][width]; own keys and values [slots][key heads][space][width], where the new
// ones are added. A prompt's keys are words [key heads][width/2][places], its values [key heads][places/2][width].
// `order` has the rows by prompt, those of prompt p from starts[p].
int decode(const uint16_t *query, const uint16_t *new_key, const uint16_t *new_value, uint16_t *out, uint16_t *own_key,
           uint16_t *own_value, const uint32_t *const *keys, const uint32_t *const *values, const int32_t *lengths,
           const int32_t *starts, const int32_t *order, const int32_t *slots, const int32_t *counts, long prompts,
           long heads, long groups, long width, long space, float scale, int threads) {
    int failed = 0;
    threads = threads < heads ? threads : (int)heads;
#pragma omp parallel for num_threads(threads) if (threads > 1) reduction(| : failed)
    for (int part = 0; part < threads; part++)
        failed |= decode_heads(query, new_key, new_value, out, own_key, own_value, keys, values, lengths, starts, order,
                               slots, counts, prompts, heads * part / threads, heads * (part + 1) / threads, heads,
                               groups, width, space, scale);
    return failed;
}
