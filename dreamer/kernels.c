/* LayerNorm followed by SiLU over rows of C values, forward and backward, and the squared error of images, each in one
   pass over memory.

   Plain C for any compiler with OpenMP; kernels.py builds it and describes the arguments. Values come as bfloat16, the
   upper half of a float32; all arithmetic is float32. */

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#define WIDEST 4096 /* columns; kernels.py sends no wider rows here */
#define TILE 1024   /* values of whole rows that are worked on at a time, or one row: little enough for the L1 cache */

static inline float widen(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline uint16_t narrow(float value) { /* round to nearest even; a NaN stays one */
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    return (uint16_t)(value != value ? 0x7FC0 : rounded);
}

static inline float sigmoid(float x) {
    /* exp(-x) = 2^n * 2^f with f in [-0.5, 0.5], 2^f by its Taylor series: off by less than 2e-7 of its value. */
    float t = -x * 1.44269504f;
    t = t > 126.0f ? 126.0f : t < -126.0f ? -126.0f : t;
    float n = rintf(t), f = (t - n) * 0.693147181f;
    float p = 1.0f + f * (1.0f + f * (0.5f + f * (0.166666667f + f * (0.0416666667f + f * (0.00833333333f + f * 0.00138888889f)))));
    int32_t bits = ((int32_t)n + 127) << 23;
    float scale;
    memcpy(&scale, &bits, 4);
    return 1.0f / (1.0f + p * scale);
}

#define INLINE static inline __attribute__((always_inline))

/* mean and 1 / standard deviation of a row */
INLINE void moments(const float *restrict v, int64_t columns, float eps, float *mean, float *scale) {
    float sum = 0.0f, squares = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < columns; c++) sum += v[c];
    float m = sum / (float)columns;
#pragma omp simd reduction(+ : squares)
    for (int64_t c = 0; c < columns; c++) squares += (v[c] - m) * (v[c] - m);
    *mean = m;
    *scale = 1.0f / sqrtf(squares / (float)columns + eps);
}

INLINE void forward_rows(float *restrict v, const float *restrict weight, const float *restrict bias, int64_t rows,
                         int64_t columns, float eps) {
    for (int64_t r = 0; r < rows; r++, v += columns) {
        float mean, scale;
        moments(v, columns, eps, &mean, &scale);
#pragma omp simd
        for (int64_t c = 0; c < columns; c++) {
            float n = (v[c] - mean) * scale * weight[c] + bias[c];
            v[c] = n * sigmoid(n);
        }
    }
}

/* g: the outputs' gradient, becomes the inputs' */
INLINE void backward_rows(float *restrict v, float *restrict g, const float *restrict weight,
                          const float *restrict bias, float *restrict dweight, float *restrict dbias, int64_t rows,
                          int64_t columns, float eps) {
    for (int64_t r = 0; r < rows; r++, v += columns, g += columns) {
        float mean, scale, sum = 0.0f, product = 0.0f;
        moments(v, columns, eps, &mean, &scale);
#pragma omp simd reduction(+ : sum, product)
        for (int64_t c = 0; c < columns; c++) {
            float normed = (v[c] - mean) * scale, n = normed * weight[c] + bias[c], s = sigmoid(n);
            float dn = g[c] * s * (1.0f + n * (1.0f - s)), dnormed = dn * weight[c];
            dweight[c] += dn * normed;
            dbias[c] += dn;
            v[c] = normed;
            g[c] = dnormed;
            sum += dnormed;
            product += dnormed * normed;
        }
        sum /= (float)columns;
        product /= (float)columns;
#pragma omp simd
        for (int64_t c = 0; c < columns; c++) g[c] = scale * (g[c] - sum - v[c] * product);
    }
}

/* A constant number of columns lets the compiler unroll what is short. */
#define BY_WIDTH(CALL) \
    if (columns == 16) CALL(16); \
    else if (columns == 32) CALL(32); \
    else if (columns == 64) CALL(64); \
    else CALL(columns)
#define FORWARD(WIDTH) forward_rows(v, weight, bias, count, WIDTH, eps)
#define BACKWARD(WIDTH) backward_rows(v, g, weight, bias, dw, db, count, WIDTH, eps)

void norm_silu_forward(const uint16_t *x, const float *weight, const float *bias, uint16_t *y, int64_t rows,
                       int64_t columns, float eps, int threads) {
    int64_t step = columns < TILE ? TILE / columns : 1;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; r += step) {
        float v[WIDEST];
        int64_t count = rows - r < step ? rows - r : step, size = count * columns, at = r * columns;
        for (int64_t i = 0; i < size; i++) v[i] = widen(x[at + i]);
        BY_WIDTH(FORWARD);
        for (int64_t i = 0; i < size; i++) y[at + i] = narrow(v[i]);
    }
}

/* dweight, dbias: (threads, columns); the caller adds up the threads' shares. */
void norm_silu_backward(const uint16_t *x, const uint16_t *dy, const float *weight, const float *bias, uint16_t *dx,
                        float *dweight, float *dbias, int64_t rows, int64_t columns, float eps, int threads) {
    int64_t step = columns < TILE ? TILE / columns : 1;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t part = 0; part < threads; part++) {
        float v[WIDEST], g[WIDEST], dw[WIDEST], db[WIDEST];
        memset(dw, 0, columns * sizeof(float));
        memset(db, 0, columns * sizeof(float));
        int64_t end = rows * (part + 1) / threads;
        for (int64_t r = rows * part / threads; r < end; r += step) {
            int64_t count = end - r < step ? end - r : step, size = count * columns, at = r * columns;
            for (int64_t i = 0; i < size; i++) v[i] = widen(x[at + i]);
            for (int64_t i = 0; i < size; i++) g[i] = widen(dy[at + i]);
            BY_WIDTH(BACKWARD);
            for (int64_t i = 0; i < size; i++) dx[at + i] = narrow(g[i]);
        }
        memcpy(dweight + part * columns, dw, columns * sizeof(float));
        memcpy(dbias + part * columns, db, columns * sizeof(float));
    }
}

#define SIDE 64
#define PIXELS (SIDE * SIDE)
#define CHANNELS 3

void image_distance(const uint16_t *mean, const float *target, float focus, uint16_t *weighted, float *distance,
                    int64_t images, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t n = 0; n < images; n++) {
        const uint16_t *drawn = mean + n * PIXELS * CHANNELS;
        const float *image = target + n * PIXELS * CHANNELS;
        float d[PIXELS * CHANNELS], weights[PIXELS], sum = 0.0f, whole = 0.0f;
        for (int64_t y = 0; y < SIDE; y++)
            for (int64_t x = 0; x < SIDE / 2; x++, image += 2 * CHANNELS) {
                /* two pixels of a row; the tile they are in has two more, of the next or the last row */
                int64_t at = ((y / 2 * SIDE / 2 + x) * 2 + y % 2) * 2 * CHANNELS;
                for (int64_t c = 0; c < 2 * CHANNELS; c++) d[at + c] = widen(drawn[at + c]) - image[c];
            }
#pragma omp simd reduction(+ : sum)
        for (int64_t p = 0; p < PIXELS; p++) {
            const float *e = d + p * CHANNELS;
            weights[p] = e[0] * e[0] + e[1] * e[1] + e[2] * e[2];
            sum += weights[p];
        }
        distance[n] = sum;
        uint16_t *out = weighted + n * PIXELS * CHANNELS;
        if (focus == 0.0f) {
            for (int64_t i = 0; i < PIXELS * CHANNELS; i++) out[i] = narrow(d[i]);
            continue;
        }
        for (int64_t p = 0; p < PIXELS; p++) {
            float square = weights[p];
            if (focus != 2.0f) weights[p] = powf(square, focus / 2);
            whole += weights[p] * square;
        }
        float unit = sum / (whole > FLT_MIN || whole != whole ? whole : FLT_MIN);
        for (int64_t p = 0; p < PIXELS; p++)
            for (int64_t c = 0; c < CHANNELS; c++)
                out[p * CHANNELS + c] = narrow(d[p * CHANNELS + c] * (weights[p] * unit));
    }
}
