/* LayerNorm followed by SiLU over rows of values, forward and backward, in one pass over memory. kernels.py describes
   the arguments. */

#include <math.h>

#include "lanes.h"

#define GROUP LANES /* rows that are worked on at once, so that their sums across lanes are found together */

/* means and 1 / standard deviations of a group of rows */
INLINE void moments(const uint16_t *x, int64_t rows, int64_t columns, float eps, float *mean, float *scale) {
    lanes v[GROUP] = {0}, w[GROUP] = {0};
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < columns; c += LANES) v[r] += widen(x + r * columns + c);
    store(totals(v) / (float)columns, mean);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < columns; c += LANES) {
            lanes d = widen(x + r * columns + c) - mean[r];
            w[r] += d * d;
        }
    store(totals(w) / (float)columns, scale);
    for (int64_t r = 0; r < GROUP; r++) scale[r] = 1.0f / sqrtf(scale[r] + eps);
}

INLINE void forward_rows(const uint16_t *x, const float *weight, const float *bias, uint16_t *y, int64_t rows,
                         int64_t columns, float eps) {
    float mean[GROUP], scale[GROUP];
    moments(x, rows, columns, eps, mean, scale);
    for (int64_t c = 0; c < columns; c += LANES) {
        lanes w = load(weight + c), b = load(bias + c);
        for (int64_t r = 0; r < rows; r++) {
            lanes n = (widen(x + r * columns + c) - mean[r]) * scale[r] * w + b;
            narrow(n * sigmoid(n), y + r * columns + c);
        }
    }
}

INLINE void backward_rows(const uint16_t *x, const uint16_t *dy, const float *weight, const float *bias, uint16_t *dx,
                          float *dweight, float *dbias, int64_t rows, int64_t columns, float eps) {
    float mean[GROUP], scale[GROUP], g[GROUP * columns];
    lanes sum[GROUP] = {0}, product[GROUP] = {0};
    moments(x, rows, columns, eps, mean, scale);
    for (int64_t c = 0; c < columns; c += LANES) {
        lanes w = load(weight + c), b = load(bias + c), dw = load(dweight + c), db = load(dbias + c);
        for (int64_t r = 0; r < rows; r++) {
            lanes normed = (widen(x + r * columns + c) - mean[r]) * scale[r], n = normed * w + b, s = sigmoid(n);
            lanes dn = widen(dy + r * columns + c) * (s + n * s * (1.0f - s)), dnormed = dn * w;
            dw += dn * normed;
            db += dn;
            sum[r] += dnormed;
            product[r] += dnormed * normed;
            store(dnormed, g + r * columns + c);
        }
        store(dw, dweight + c);
        store(db, dbias + c);
    }
    float sums[GROUP], products[GROUP];
    store(totals(sum) / (float)columns, sums);
    store(totals(product) / (float)columns, products);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < columns; c += LANES) {
            lanes normed = (widen(x + r * columns + c) - mean[r]) * scale[r];
            narrow(scale[r] * (load(g + r * columns + c) - sums[r] - normed * products[r]), dx + r * columns + c);
        }
}

void norm_silu_forward(const uint16_t *x, const float *weight, const float *bias, uint16_t *y, int64_t rows,
                       int64_t columns, float eps, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; r += GROUP) {
        int64_t count = rows - r < GROUP ? rows - r : GROUP, at = r * columns;
        forward_rows(x + at, weight, bias, y + at, count, columns, eps);
    }
}

void norm_silu_backward(const uint16_t *x, const uint16_t *dy, const float *weight, const float *bias, uint16_t *dx,
                        float *dweight, float *dbias, int64_t rows, int64_t columns, float eps, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t part = 0; part < threads; part++) {
        float *dw = dweight + part * columns, *db = dbias + part * columns;
        memset(dw, 0, columns * sizeof(float));
        memset(db, 0, columns * sizeof(float));
        int64_t end = rows * (part + 1) / threads;
        for (int64_t r = rows * part / threads; r < end; r += GROUP) {
            int64_t count = end - r < GROUP ? end - r : GROUP, at = r * columns;
            backward_rows(x + at, dy + at, weight, bias, dx + at, dw, db, count, columns, eps);
        }
    }
}
