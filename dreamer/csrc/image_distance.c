/* The squared error of images in one pass over memory; see ImageDistance. */

#include <float.h>
#include <math.h>

#include "lanes.h"

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
        for (int64_t i = 0; i < PIXELS * CHANNELS; i += LANES) store(widen(drawn + i), d + i);
        for (int64_t y = 0; y < SIDE; y++)
            for (int64_t x = 0; x < SIDE / 2; x++, image += 2 * CHANNELS) {
                /* two pixels of a row; the tile they are in has two more, of the next or the last row */
                int64_t at = ((y / 2 * SIDE / 2 + x) * 2 + y % 2) * 2 * CHANNELS;
                for (int64_t c = 0; c < 2 * CHANNELS; c++) d[at + c] -= image[c];
            }
#pragma omp simd reduction(+ : sum)
        for (int64_t p = 0; p < PIXELS; p++) {
            const float *e = d + p * CHANNELS;
            weights[p] = e[0] * e[0] + e[1] * e[1] + e[2] * e[2];
            sum += weights[p];
        }
        distance[n] = sum;
        uint16_t *out = weighted + n * PIXELS * CHANNELS;
        if (focus != 0.0f) {
            for (int64_t p = 0; p < PIXELS; p++) {
                float square = weights[p];
                if (focus != 2.0f) weights[p] = powf(square, focus / 2);
                whole += weights[p] * square;
            }
            float unit = sum / (whole > FLT_MIN || whole != whole ? whole : FLT_MIN);
            for (int64_t p = 0; p < PIXELS; p++)
                for (int64_t c = 0; c < CHANNELS; c++) d[p * CHANNELS + c] *= weights[p] * unit;
        }
        for (int64_t i = 0; i < PIXELS * CHANNELS; i += LANES) narrow(load(d + i), out + i);
    }
}
