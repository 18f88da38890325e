// Products of a few rows with a large matrix: each weight is read once, in memory order, and all
// arithmetic is in float. Vectors are GCC's and Clang's vector extensions, so any CPU will do.

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define WIDE 64  // outputs of a block
#define PARTS (WIDE / 16)
#define PIECE 256  // inputs that are summed separately
#define CHUNK 64  // tokens whose values fit in the L1 cache

typedef float vec __attribute__((vector_size(64)));
typedef uint32_t bits __attribute__((vector_size(64)));
typedef uint16_t halves __attribute__((vector_size(32)));
typedef int8_t bytes __attribute__((vector_size(16)));

// --- numbers -------------------------------------------------------------------------------------

INLINE vec load(const void *p) {
    vec v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE bits load_bits(const void *p) {
    bits v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE float sum(vec v) {
    for (int n = 8; n; n /= 2)
        for (int j = 0; j < n; j++) v[j] += v[j + n];
    return v[0];
}

INLINE float widened(uint16_t h) {
    uint32_t u = (uint32_t)h << 16;
    float f;
    memcpy(&f, &u, sizeof f);
    return f;
}

INLINE uint16_t rounded(float f) {  // to the nearest, ties to even
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    if ((u & 0x7fffffff) > 0x7f800000) return (uint16_t)(u >> 16 | 0x40);  // NaN
    return (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

// element i of an array of bfloat16 (half) or float
INLINE float at(const void *p, long i, int half) {
    return half ? widened(((const uint16_t *)p)[i]) : ((const float *)p)[i];
}

INLINE vec at16(const void *p, long i, int half) {
    if (!half) return load((const float *)p + i);
    halves h;
    memcpy(&h, (const uint16_t *)p + i, sizeof h);
    return (vec)(__builtin_convertvector(h, bits) << 16);
}

INLINE void put(void *p, long i, float f, int half) {
    if (half) ((uint16_t *)p)[i] = rounded(f);
    else ((float *)p)[i] = f;
}

// --- y (rows, n) = x (rows, k) times blocks (n / 64, deep, 64) (bfloat16: pairs of k)

INLINE void piece(const void *w, const float *x, vec (*out)[PARTS], long deep, long from, long to,
                  int rows, int half) {
    vec acc[4][PARTS] = {0};  // local, so that it stays in registers
    if (half) {
        const uint32_t *p = (const uint32_t *)w + from / 2 * WIDE;
        for (long i = from; i < to; i += 2, p += WIDE)
            for (int j = 0; j < PARTS; j++) {
                bits v = load_bits(p + 16 * j);
                vec even = (vec)(v << 16), odd = (vec)(v & 0xffff0000u);
                for (int r = 0; r < rows; r++)
                    acc[r][j] += even * x[r * deep + i] + odd * x[r * deep + i + 1];
            }
    } else {
        const float *p = (const float *)w + from * WIDE;
        for (long i = from; i < to; i++, p += WIDE)
            for (int j = 0; j < PARTS; j++) {
                vec v = load(p + 16 * j);
                for (int r = 0; r < rows; r++) acc[r][j] += v * x[r * deep + i];
            }
    }
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < PARTS; j++) out[r][j] += acc[r][j];
}

// in pieces: small addends would be lost in one long sum
INLINE void block(const void *w, const float *x, vec (*out)[PARTS], long deep, int rows, int half) {
    memset(out, 0, sizeof(vec[4][PARTS]));
    for (long i = 0; i < deep; i += PIECE)
        piece(w, x, out, deep, i, i + PIECE < deep ? i + PIECE : deep, rows, half);
}

INLINE void blocks(const char *w, const float *x, const float *bias, void *y, long rows, long n,
                   long deep, int half, int y_half, int threads) {
    long count = (n + WIDE - 1) / WIDE, size = deep * WIDE * (half ? 2 : 4);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long b = 0; b < count; b++) {
        vec acc[4][PARTS];
        long wide = n - b * WIDE < WIDE ? n - b * WIDE : WIDE;
        for (long r = 0; r < rows; r += 4) {
            int some = rows - r < 4 ? (int)(rows - r) : 4;
            const float *from = x + r * deep;
            switch (some) {  // each case is compiled separately, with its sums in registers
                case 1: block(w + b * size, from, acc, deep, 1, half); break;
                case 2: block(w + b * size, from, acc, deep, 2, half); break;
                case 3: block(w + b * size, from, acc, deep, 3, half); break;
                default: block(w + b * size, from, acc, deep, 4, half);
            }
            for (int q = 0; q < some; q++)
                for (long j = 0; j < wide; j++) {
                    float more = bias ? bias[b * WIDE + j] : 0;
                    put(y, (r + q) * n + b * WIDE + j, acc[q][j / 16][j % 16] + more, y_half);
                }
        }
    }
}

// x as floats, each row padded to the depth of the blocks; 0 if there is no memory for it
static float *rows_of(const void *x, long rows, long k, long deep, int half) {
    float *out = calloc((size_t)(rows * deep), sizeof *out);
    for (long r = 0; out && r < rows; r++)
        for (long i = 0; i < k; i++) out[r * deep + i] = at(x, r * k + i, half);
    return out;
}

int zoo_blocks(const void *w, int half, const void *x, int x_half, const float *bias, void *y,
               int y_half, long rows, long n, long k, long deep, int threads) {
    float *wide = rows_of(x, rows, k, deep, x_half);
    if (!wide) return 0;
    if (half) blocks(w, wide, bias, y, rows, n, deep, 1, y_half, threads);
    else blocks(w, wide, bias, y, rows, n, deep, 0, y_half, threads);
    free(wide);
    return 1;
}

// --- y (rows, n) = x (rows, k) times bytes (n, k), a scale for each of the n ---------------------

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)

// x quantized to 16 bits as 256 high + low; weights are shifted to 0..255, which `shift` undoes
typedef struct {
    int8_t *high, *low;
    double scale, shift;
} quantized;

static int quantize(const void *x, long k, int half, quantized *out) {
    float most = 0;
    for (long i = 0; i < k; i++) {
        float f = at(x, i, half);
        if (!(f - f == 0)) return 0;  // NaN and infinity have no scale
        most = f > most ? f : -f > most ? -f : most;
    }
    float scale = most > 0 ? 32000 / most : 0;
    if (scale - scale != 0) scale = 0;  // x is nearly zero
    long total = 0;
    for (long i = 0; i < k; i++) {
        float f = at(x, i, half) * scale;
        int32_t whole = (int32_t)(f + (f < 0 ? -0.5f : 0.5f));
        out->low[i] = (int8_t)whole;
        out->high[i] = (int8_t)((whole - out->low[i]) >> 8);
        total += whole;
    }
    out->scale = scale > 0 ? 1.0 / scale : 0;
    out->shift = 128.0 * (double)total;
    return 1;
}

INLINE double product(const int8_t *w, const quantized *x, long k) {
    __m512i high = _mm512_setzero_si512(), low = high, flip = _mm512_set1_epi8((char)0x80);
    for (long i = 0; i < k; i += 64) {
        __mmask64 here = k - i < 64 ? (1ull << (k - i)) - 1 : ~0ull;
        __m512i v = _mm512_xor_si512(_mm512_maskz_loadu_epi8(here, w + i), flip);
        high = _mm512_dpbusd_epi32(high, v, _mm512_maskz_loadu_epi8(here, x->high + i));
        low = _mm512_dpbusd_epi32(low, v, _mm512_maskz_loadu_epi8(here, x->low + i));
    }
    double whole = 256.0 * _mm512_reduce_add_epi32(high) + _mm512_reduce_add_epi32(low);
    return (whole - x->shift) * x->scale;
}

int zoo_bytes(const int8_t *w, const float *scale, const void *x, int x_half, const float *bias,
              void *y, int y_half, long rows, long n, long k, int threads) {
    quantized *all = malloc((size_t)rows * sizeof *all);
    int8_t *room = malloc((size_t)(2 * rows * k));
    int fine = all && room && k <= 65536;  // beyond, sums could exceed 32 bits
    for (long r = 0; fine && r < rows; r++) {
        all[r].high = room + 2 * r * k;
        all[r].low = room + (2 * r + 1) * k;
        fine = quantize((const char *)x + r * k * (x_half ? 2 : 4), k, x_half, all + r);
    }
    if (fine) {
#pragma omp parallel for schedule(static) num_threads(threads)
        for (long o = 0; o < n; o++)
            for (long r = 0; r < rows; r++) {
                double f = product(w + o * k, all + r, k) * scale[o];
                put(y, r * n + o, (float)f + (bias ? bias[o] : 0), y_half);
            }
    }
    free(all);
    free(room);
    return fine;
}

#else

int zoo_bytes(const int8_t *w, const float *scale, const void *x, int x_half, const float *bias,
              void *y, int y_half, long rows, long n, long k, int threads) {
    float *wide = rows_of(x, rows, k, k, x_half);
    if (!wide) return 0;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long o = 0; o < n; o++)
        for (long r = 0; r < rows; r++) {
            const float *from = wide + r * k;
            vec acc = {0};
            long i = 0;
            for (; i + 16 <= k; i += 16) {
                bytes b;
                memcpy(&b, w + o * k + i, sizeof b);
                acc += __builtin_convertvector(b, vec) * load(from + i);
            }
            float f = sum(acc);
            for (; i < k; i++) f += w[o * k + i] * from[i];
            put(y, r * n + o, f * scale[o] + (bias ? bias[o] : 0), y_half);
        }
    free(wide);
    return 1;
}

#endif

// --- one query a row over its keys: q (b, g, r, e), keys and values (b, g, t, e), strided

INLINE void score(const char *keys, const float *q, float *out, long r, long t, long e, long step,
                  int half) {
    for (long i = 0; i < t; i++) {
        const char *key = keys + i * step * (half ? 2 : 4);
        for (long n = 0; n < r; n++) {
            vec acc = {0};
            long j = 0;
            for (; j + 16 <= e; j += 16) acc += at16(key, j, half) * load(q + n * e + j);
            float f = sum(acc);
            for (; j < e; j++) f += at(key, j, half) * q[n * e + j];
            out[n * t + i] = f;
        }
    }
}

// scores (b, g, r, t), float
int zoo_scores(const void *q, const char *k, float *out, int half, long b, long g, long r, long t,
               long e, const long *step, float scale, int threads) {
    float *wide = rows_of(q, b * g * r, e, e, half);
    if (!wide) return 0;
    for (long i = 0; i < b * g * r * e; i++) wide[i] *= scale;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long n = 0; n < b * g; n++) {
        const char *keys = k + (n / g * step[0] + n % g * step[1]) * (half ? 2 : 4);
        if (half) score(keys, wide + n * r * e, out + n * r * t, r, t, e, step[2], 1);
        else score(keys, wide + n * r * e, out + n * r * t, r, t, e, step[2], 0);
    }
    free(wide);
    return 1;
}

INLINE void mix(const char *values, const float *p, float *out, long r, long t, long e, long step,
                int half) {
    for (long from = 0; from < t; from += CHUNK) {
        long to = from + CHUNK < t ? from + CHUNK : t;
        for (long n = 0; n < r; n++) {
            long j = 0;
            for (; j + 16 <= e; j += 16) {
                vec acc = load(out + n * e + j);
                for (long i = from; i < to; i++)
                    acc += p[n * t + i] * at16(values + i * step * (half ? 2 : 4), j, half);
                memcpy(out + n * e + j, &acc, sizeof acc);
            }
            for (; j < e; j++)
                for (long i = from; i < to; i++)
                    out[n * e + j] += p[n * t + i] * at(values + i * step * (half ? 2 : 4), j, half);
        }
    }
}

// y (b, g, r, e) of weights (b, g, r, t), float
int zoo_mix(const float *p, const char *v, void *y, int half, long b, long g, long r, long t,
            long e, const long *step, int threads) {
    float *wide = calloc((size_t)(b * g * r * e), sizeof *wide);
    if (!wide) return 0;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long n = 0; n < b * g; n++) {
        const char *values = v + (n / g * step[0] + n % g * step[1]) * (half ? 2 : 4);
        if (half) mix(values, p + n * r * t, wide + n * r * e, r, t, e, step[2], 1);
        else mix(values, p + n * r * t, wide + n * r * e, r, t, e, step[2], 0);
    }
    for (long i = 0; i < b * g * r * e; i++) put(y, i, wide[i], half);
    free(wide);
    return 1;
}

// --- norm and rotary in one pass, where torch makes several ---------------------------------------

// y = x / root of its mean square * (offset + w), rows of d
int zoo_norm(const void *x, const void *w, void *y, int half, long rows, long d, float eps,
             float offset) {
    for (long r = 0; r < rows; r++) {
        float squares = 0;
        vec acc = {0};
        long i = 0;
        for (; i + 16 <= d; i += 16) {
            vec v = at16(x, r * d + i, half);
            acc += v * v;
        }
        for (; i < d; i++) squares += at(x, r * d + i, half) * at(x, r * d + i, half);
        float scale = 1 / sqrtf((squares + sum(acc)) / (float)d + eps);
        for (i = 0; i < d; i++)
            put(y, r * d + i, at(x, r * d + i, half) * scale * (offset + at(w, i, half)), half);
    }
    return 1;
}

// rotary embedding of strided (b, h, e) into contiguous (b, h, e); `width` elements are rotated
int zoo_turn(const void *x, const void *cosines, const void *sines, void *y, int half, long b,
             long h, long e, long width, const long *step, long row) {
    for (long n = 0; n < b * h; n++) {
        long from = n / h * step[0] + n % h * step[1], angle = n / h * row, mid = width / 2;
        for (long i = 0; i < mid; i++) {
            float low = at(x, from + i, half), high = at(x, from + mid + i, half);
            float c = at(cosines, angle + i, half), s = at(sines, angle + i, half);
            put(y, n * e + i, low * c - high * s, half);
            put(y, n * e + mid + i, high * c + low * s, half);
        }
        for (long i = width; i < e; i++) put(y, n * e + i, at(x, from + i, half), half);
    }
    return 1;
}
