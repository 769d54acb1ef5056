/* The RSSM step after step: along sequences (observe, with its gradient) and in imagination, where the policy decides.

   A step is a dozen small operations, which cost torch more to start than to do. Products are of bfloat16 with matrix
   registers (tiles.h), everything else is float32. Where there are no such registers there is nothing here. */

#include "tiles.h"

#ifdef TILES

#include <math.h>
#include <sys/syscall.h>
#include <unistd.h>

int has_tiles(void) { return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */) == 0; }

typedef struct {
    const float *scale, *shift;
} Norm;

/* mean, and 1 / standard deviation */
typedef struct {
    float mean, scale;
} Moments;

INLINE Moments moments(const float *x, int64_t size, float eps) {
    lanes sum = {0}, squares = {0};
    for (int64_t i = 0; i < size; i += LANES) sum += load(x + i);
    float mean = total(sum) / (float)size;
    for (int64_t i = 0; i < size; i += LANES) {
        lanes d = load(x + i) - mean;
        squares += d * d;
    }
    return (Moments){mean, 1.0f / sqrtf(total(squares) / (float)size + eps)};
}

INLINE lanes normed(const float *x, int64_t i, Moments m) { return (load(x + i) - m.mean) * m.scale; }

INLINE lanes affine(lanes v, Norm norm, int64_t i) { return v * load(norm.scale + i) + load(norm.shift + i); }

/* silu(layer_norm(x)) */
INLINE void norm_silu(const float *x, Norm norm, int64_t size, float eps, uint16_t *y) {
    Moments m = moments(x, size, eps);
    for (int64_t i = 0; i < size; i += LANES) {
        lanes n = affine(normed(x, i, m), norm, i);
        narrow(n * sigmoid(n), y + i);
    }
}

/* A LayerNorm's gradient: g, of what it gives, becomes that of x; dscale and dshift are added to. */
INLINE void norm_back(const float *x, Norm norm, Moments m, int64_t size, float *g, float *dscale, float *dshift) {
    lanes sum = {0}, along = {0};
    for (int64_t i = 0; i < size; i += LANES) {
        lanes n = normed(x, i, m), d = load(g + i);
        store(load(dscale + i) + d * n, dscale + i);
        store(load(dshift + i) + d, dshift + i);
        d *= load(norm.scale + i);
        store(d, g + i);
        sum += d;
        along += d * n;
    }
    float s = total(sum) / (float)size, a = total(along) / (float)size;
    for (int64_t i = 0; i < size; i += LANES) store(m.scale * (load(g + i) - s - normed(x, i, m) * a), g + i);
}

/* g, of norm_silu's result, becomes that of x. */
INLINE void norm_silu_back(const float *x, Norm norm, int64_t size, float eps, float *g, float *dscale, float *dshift) {
    Moments m = moments(x, size, eps);
    for (int64_t i = 0; i < size; i += LANES) {
        lanes n = affine(normed(x, i, m), norm, i), s = sigmoid(n);
        store(load(g + i) * (s + n * s * (1.0f - s)), g + i);
    }
    norm_back(x, norm, m, size, g, dscale, dshift);
}

/* The GRU's three gates (reset, candidate, update), from their products: what h becomes. */
typedef struct {
    lanes reset, candidate, raw, update;
} Gates;

INLINE Gates gates_at(const float *gates, Norm norm, Moments m, int64_t deter, int64_t i) {
    lanes reset = sigmoid(affine(normed(gates, i, m), norm, i));
    lanes raw = affine(normed(gates, deter + i, m), norm, deter + i);
    lanes update = sigmoid(affine(normed(gates, 2 * deter + i, m), norm, 2 * deter + i) - 1.0f);
    return (Gates){reset, 2.0f * sigmoid(2.0f * reset * raw) - 1.0f, raw, update};
}

INLINE void gru(const float *gates, Norm norm, int64_t deter, float eps, const float *before, float *h) {
    Moments m = moments(gates, 3 * deter, eps);
    for (int64_t i = 0; i < deter; i += LANES) {
        Gates g = gates_at(gates, norm, m, deter, i);
        lanes old = load(before + i);
        store(old + g.update * (g.candidate - old), h + i);
    }
}

/* dh becomes the gradient of h before, as far as it is kept; dgates (3 deter) those of the products. */
INLINE void gru_back(const float *gates, Norm norm, int64_t deter, float eps, const float *before, float *dh,
                     float *dgates, float *dscale, float *dshift) {
    Moments m = moments(gates, 3 * deter, eps);
    for (int64_t i = 0; i < deter; i += LANES) {
        Gates g = gates_at(gates, norm, m, deter, i);
        lanes d = load(dh + i), inner = d * g.update * (1.0f - g.candidate * g.candidate);
        store(inner * g.raw * g.reset * (1.0f - g.reset), dgates + i);
        store(inner * g.reset, dgates + deter + i);
        store(d * (g.candidate - load(before + i)) * g.update * (1.0f - g.update), dgates + 2 * deter + i);
        store(d * (1.0f - g.update), dh + i);
    }
    norm_back(gates, norm, m, 3 * deter, dgates, dscale, dshift);
}

/* Rounds to bfloat16 where it is and to `half`, as what the backward pass will see. */
INLINE void round_row(float *row, int64_t size, uint16_t *half) {
    for (int64_t i = 0; i < size; i += LANES) {
        narrow(load(row + i), half + i);
        store(widen(half + i), row + i);
    }
}

INLINE void narrow_row(const float *row, int64_t size, uint16_t *half) {
    for (int64_t i = 0; i < size; i += LANES) narrow(load(row + i), half + i);
}

INLINE void widen_row(const uint16_t *half, int64_t size, float *row) {
    for (int64_t i = 0; i < size; i += LANES) store(widen(half + i), row + i);
}

INLINE void add_row(float *row, const float *other, int64_t size) {
    for (int64_t i = 0; i < size; i += LANES) store(load(row + i) + load(other + i), row + i);
}

/* The rows of a table that classes choose, added up. */
INLINE void add_chosen(float *row, const float *table, const int64_t *index, int64_t stoch, int64_t classes,
                       int64_t size) {
    for (int64_t i = 0; i < size; i += LANES) {
        lanes sum = load(row + i);
        for (int64_t s = 0; s < stoch; s++) sum += load(table + (s * classes + index[s]) * size + i);
        store(sum, row + i);
    }
}

/* lane k: the sum of v's lanes up to k */
INLINE lanes running(lanes v) {
    const lanes none = {0};
#define STEP(S, ...) v += SHUFFLE(none, v, __VA_ARGS__);
    STEP(1, 0, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30)
    STEP(2, 0, 0, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29)
    STEP(4, 0, 0, 0, 0, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27)
    STEP(8, 0, 0, 0, 0, 0, 0, 0, 0, 16, 17, 18, 19, 20, 21, 22, 23)
#undef STEP
    return v;
}

/* One categorical's probabilities, mixed with chance, and the class that a uniform variate draws; see OneHot. Logits
   and probs have room for whole lanes. */
INLINE int64_t draw(const float *logits, int64_t classes, float unimix, float uniform, float *probs) {
    float highest = logits[0], sum = 0.0f, below = 0.0f;
    for (int64_t k = 0; k < classes; k += LANES) {
        __mmask16 in = in_use(classes - k);
        float most = _mm512_mask_reduce_max_ps(in, (__m512)load(logits + k));
        highest = most > highest ? most : highest;
    }
    for (int64_t k = 0; k < classes; k += LANES) {
        __mmask16 in = in_use(classes - k);
        lanes p = (lanes)_mm512_maskz_mov_ps(in, (__m512)exponential(load(logits + k) - highest));
        store(p, probs + k);
        sum += total(p);
    }
    float share = (1.0f - unimix) / sum, chance = unimix / (float)classes;
    int64_t index = 0;
    for (int64_t k = 0; k < classes; k += LANES) {
        __mmask16 in = in_use(classes - k);
        lanes p = load(probs + k) * share + chance, up_to = running(p) + below;
        store(p, probs + k);
        below = up_to[LANES - 1];
        index += __builtin_popcount(_mm512_mask_cmp_ps_mask(in, (__m512)up_to, _mm512_set1_ps(uniform), _CMP_LE_OQ));
    }
    return index < classes - 1 ? index : classes - 1;
}

INLINE void draw_all(const float *logits, int64_t stoch, int64_t classes, float unimix, const float *uniform,
                     float *probs, int64_t *index) {
    for (int64_t s = 0; s < stoch; s++)
        index[s] = draw(logits + s * classes, classes, unimix, uniform[s], probs + s * classes);
}

/* For observing: x (hidden), of z and the last action, by `table`. */
typedef struct {
    int64_t batch, steps, stoch, classes, deter, hidden;
    float unimix, eps;
    const float *table; /* (stoch * classes, hidden) */
    Norm input_norm;
    const float *gates; /* (3 deter, hidden + deter) */
    Norm gates_norm;
    const float *post; /* (hidden, deter) */
    Norm post_norm;
    const float *out, *bias;        /* (stoch * classes, hidden) */
    const float *first_x, *first_h; /* of the initial state */
    /* each (batch, ...) */
    const uint8_t *is_first;     /* (steps) */
    const int64_t *index_before; /* (stoch) */
    const float *deter_before;   /* (deter) */
} Observe;

/* What a pass forward finds, (batch, steps, ...), and the way back starts from. */
typedef struct {
    int64_t *index;                                        /* (stoch) */
    float *deter, *probs;                                  /* (deter), (stoch * classes) */
    uint16_t *logits, *x, *xh, *products, *h, *pre, *post; /* (stoch * classes), (hidden), (hidden + deter), (3 deter),
                                                              (deter), (hidden), (hidden) */
} Observed;

/* h that step t goes on from */
INLINE const float *deter_before(const Observe *o, const Observed *found, int64_t b, int64_t t) {
    int64_t at = b * o->steps + t;
    if (o->is_first[at]) return o->first_h;
    return t ? found->deter + (at - 1) * o->deter : o->deter_before + b * o->deter;
}

void observe(const Observe *o, const uint16_t *known_x, const uint16_t *known_post, const float *uniform,
             const Observed *found, int threads) {
    int64_t deter = o->deter, hidden = o->hidden, wide = hidden + deter, logits = o->stoch * o->classes;
    Packed gates = pack_turned(o->gates, wide, 3 * deter), post = pack_turned(o->post, deter, hidden);
    Packed out = pack_turned(o->out, hidden, logits);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t first = 0; first < o->batch; first += TILE) {
        configure_tiles();
        int64_t count = least(TILE, o->batch - first), room = most(most(3 * deter, logits), hidden);
        int64_t xhs = spread(wide), hs = spread(deter), ps = spread(hidden);
        uint16_t *xh = zeros(TILE * xhs, 2), *h = zeros(TILE * hs, 2), *normal = zeros(TILE * ps, 2);
        float *made = zeros(TILE * room, 4), *x = zeros(hidden, 4);
        for (int64_t t = 0; t < o->steps; t++) {
            for (int64_t r = 0; r < count; r++) {
                int64_t b = first + r, at = b * o->steps + t;
                int begins = o->is_first[at];
                const float *before = deter_before(o, found, b, t);
                if (begins)
                    memcpy(x, o->first_x, 4 * hidden);
                else {
                    widen_row(known_x + at * hidden, hidden, x);
                    const int64_t *index = t ? found->index + (at - 1) * o->stoch : o->index_before + b * o->stoch;
                    add_chosen(x, o->table, index, o->stoch, o->classes, hidden);
                }
                round_row(x, hidden, found->x + at * hidden);
                norm_silu(x, o->input_norm, hidden, o->eps, xh + r * xhs);
                narrow_row(before, deter, xh + r * xhs + hidden);
                memcpy(found->xh + at * wide, xh + r * xhs, 2 * wide);
            }
            product(xh, xhs, TILE, gates, made, room);
            for (int64_t r = 0; r < count; r++) {
                int64_t b = first + r, at = b * o->steps + t;
                const float *before = deter_before(o, found, b, t);
                round_row(made + r * room, 3 * deter, found->products + at * 3 * deter);
                gru(made + r * room, o->gates_norm, deter, o->eps, before, found->deter + at * deter);
                narrow_row(found->deter + at * deter, deter, h + r * hs);
                memcpy(found->h + at * deter, h + r * hs, 2 * deter);
            }
            product(h, hs, TILE, post, made, room);
            for (int64_t r = 0; r < count; r++) {
                int64_t at = (first + r) * o->steps + t;
                widen_row(known_post + at * hidden, hidden, x);
                add_row(x, made + r * room, hidden);
                round_row(x, hidden, found->pre + at * hidden);
                norm_silu(x, o->post_norm, hidden, o->eps, normal + r * ps);
                memcpy(found->post + at * hidden, normal + r * ps, 2 * hidden);
            }
            product(normal, ps, TILE, out, made, room);
            for (int64_t r = 0; r < count; r++) {
                int64_t at = (first + r) * o->steps + t;
                add_row(made + r * room, o->bias, logits);
                round_row(made + r * room, logits, found->logits + at * logits);
                draw_all(made + r * room, o->stoch, o->classes, o->unimix, uniform + at * o->stoch,
                         found->probs + at * logits, found->index + at * o->stoch);
            }
        }
        free(xh), free(h), free(normal), free(made), free(x);
        _tile_release();
    }
    free(gates.values), free(post.values), free(out.values);
}

/* Gradients of what each product gives, (batch, steps, ...), with which the caller finds those of the weights; and, for
   every 16 rows of the batch, of the norms and the first h. */
typedef struct {
    uint16_t *logits, *pre, *products, *x;
    float *input_norm, *gates_norm, *post_norm; /* (rows / 16, 2, ...) */
    float *first_h;                             /* (rows / 16, deter) */
} Gradient;

/* dlogits, dprobs (batch, steps, stoch * classes) and dh (batch, steps, deter), of what `observe` found */
void observe_back(const Observe *o, const Observed *found, const float *dlogits, const float *dprobs, const float *dh,
                  const Gradient *gradient, int threads) {
    int64_t deter = o->deter, hidden = o->hidden, wide = hidden + deter, logits = o->stoch * o->classes;
    Packed gates = pack(o->gates, 3 * deter, wide), post = pack(o->post, hidden, deter);
    Packed out = pack(o->out, logits, hidden), table = pack_turned(o->table, hidden, logits);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t first = 0; first < o->batch; first += TILE) {
        configure_tiles();
        int64_t count = least(TILE, o->batch - first), part = first / TILE;
        int64_t ls = spread(logits), hs = spread(hidden), gs = spread(3 * deter);
        int64_t room = most(wide, logits);
        uint16_t *dl = zeros(TILE * ls, 2), *dpre = zeros(TILE * hs, 2), *dg = zeros(TILE * gs, 2),
                 *dx = zeros(TILE * hs, 2);
        float *made = zeros(TILE * room, 4), *to_h = zeros(TILE * deter, 4), *to_z = zeros(TILE * logits, 4);
        float *values = zeros(most(3 * deter, hidden), 4), *other = zeros(3 * deter, 4);
        float *in = gradient->input_norm + part * 2 * hidden, *mid = gradient->gates_norm + part * 6 * deter;
        float *last = gradient->post_norm + part * 2 * hidden;
        for (int64_t t = o->steps - 1; t >= 0; t--) {
            for (int64_t r = 0; r < count; r++) {
                int64_t at = (first + r) * o->steps + t;
                for (int64_t s = 0; s < logits; s += o->classes) {
                    const float *p = found->probs + at * logits + s, *g = dprobs + at * logits + s;
                    const float *carried = to_z + r * logits + s, *own = dlogits + at * logits + s;
                    float chance = o->unimix / (float)o->classes;
                    lanes sum = {0};
                    for (int64_t k = 0; k < o->classes; k += LANES)
                        sum += (load(p + k) - chance) * (load(g + k) + load(carried + k));
                    float mean = total(sum) / (1.0f - o->unimix);
                    for (int64_t k = 0; k < o->classes; k += LANES)
                        narrow(load(own + k) + (load(p + k) - chance) * (load(g + k) + load(carried + k) - mean),
                               dl + r * ls + s + k);
                }
                memcpy(gradient->logits + at * logits, dl + r * ls, 2 * logits);
            }
            product(dl, ls, TILE, out, made, room);
            for (int64_t r = 0; r < count; r++) {
                int64_t at = (first + r) * o->steps + t;
                widen_row(found->pre + at * hidden, hidden, values);
                norm_silu_back(values, o->post_norm, hidden, o->eps, made + r * room, last, last + hidden);
                narrow_row(made + r * room, hidden, dpre + r * hs);
                memcpy(gradient->pre + at * hidden, dpre + r * hs, 2 * hidden);
            }
            product(dpre, hs, TILE, post, made, room);
            for (int64_t r = 0; r < count; r++) {
                int64_t b = first + r, at = b * o->steps + t;
                const float *before = deter_before(o, found, b, t);
                float *d = to_h + r * deter;
                add_row(d, dh + at * deter, deter);
                add_row(d, made + r * room, deter);
                widen_row(found->products + at * 3 * deter, 3 * deter, values);
                gru_back(values, o->gates_norm, deter, o->eps, before, d, other, mid, mid + 3 * deter);
                narrow_row(other, 3 * deter, dg + r * gs);
                memcpy(gradient->products + at * 3 * deter, dg + r * gs, 6 * deter);
            }
            product(dg, gs, TILE, gates, made, room);
            for (int64_t r = 0; r < count; r++) {
                int64_t at = (first + r) * o->steps + t;
                float *g = made + r * room;
                add_row(to_h + r * deter, g + hidden, deter);
                widen_row(found->x + at * hidden, hidden, values);
                norm_silu_back(values, o->input_norm, hidden, o->eps, g, in, in + hidden);
                narrow_row(g, hidden, dx + r * hs);
                memcpy(gradient->x + at * hidden, dx + r * hs, 2 * hidden);
                if (o->is_first[at]) {
                    add_row(gradient->first_h + part * deter, to_h + r * deter, deter);
                    memset(to_h + r * deter, 0, 4 * deter);
                    memset(dx + r * hs, 0, 2 * hidden);
                }
            }
            if (t) product(dx, hs, TILE, table, to_z, logits);
        }
        free(dl), free(dpre), free(dg), free(dx), free(made), free(to_h), free(to_z), free(values), free(other);
        _tile_release();
    }
    free(gates.values), free(post.values), free(out.values), free(table.values);
}

typedef struct {
    const float *weight;
    Norm norm;
} Layer;

typedef struct {
    int64_t starts, steps, stoch, classes, deter, hidden, actions, units, layers;
    float unimix, policy_unimix, eps;
    const float *table, *of_action; /* (stoch * classes, hidden), (actions, hidden) */
    Norm input_norm;
    const float *gates; /* (3 deter, hidden + deter) */
    Norm gates_norm;
    Layer prior;                           /* (hidden, deter) */
    const float *out, *bias;               /* (stoch * classes, hidden) */
    const float *policy_table;             /* (stoch * classes, units) */
    Layer policy[8];                       /* (units, deter), then (units, units) */
    const float *policy_out, *policy_bias; /* (actions, units) */
} Imagine;

#define BLOCK 64 /* starts whose imagination is worked on at a time */

/* index (steps + 1, starts, stoch) and h (steps + 1, starts, deter), of which the first are given, action (steps,
   starts) and the variates to draw with, uniform_action (starts, steps) and uniform (starts, steps, stoch) */
void imagine(const Imagine *m, const float *uniform_action, const float *uniform, int64_t *index, uint16_t *h,
             int64_t *action, int threads) {
    int64_t deter = m->deter, hidden = m->hidden, units = m->units, wide = hidden + deter,
            logits = m->stoch * m->classes;
    Packed gates = pack_turned(m->gates, wide, 3 * deter), prior = pack_turned(m->prior.weight, deter, hidden);
    Packed out = pack_turned(m->out, hidden, logits), policy[8], decide = pack_turned(m->policy_out, units, m->actions);
    for (int64_t l = 0; l < m->layers; l++) policy[l] = pack_turned(m->policy[l].weight, l ? units : deter, units);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t first = 0; first < m->starts; first += BLOCK) {
        configure_tiles();
        int64_t count = least(BLOCK, m->starts - first), rows = rounded(count, TILE);
        int64_t broad = most(units, hidden),
                room = most(most(3 * deter, logits), most(broad, rounded(m->actions, TILE)));
        int64_t xhs = spread(wide), ys = spread(broad);
        uint16_t *xh = zeros(BLOCK * xhs, 2), *y = zeros(BLOCK * ys, 2);
        float *made = zeros(BLOCK * room, 4), *state = zeros(BLOCK * deter, 4), *probs = zeros(logits + m->actions, 4);
        for (int64_t r = 0; r < count; r++) {
            widen_row(h + (first + r) * deter, deter, state + r * deter);
            memcpy(xh + r * xhs + hidden, h + (first + r) * deter, 2 * deter);
        }
        for (int64_t t = 0; t < m->steps; t++) {
            int64_t from = t * m->starts + first, to = from + m->starts;
            for (int64_t l = 0; l < m->layers; l++) {
                if (l)
                    product(y, ys, rows, policy[l], made, room);
                else
                    product(xh + hidden, xhs, rows, policy[l], made, room);
                for (int64_t r = 0; r < count; r++) {
                    float *x = made + r * room;
                    if (!l) add_chosen(x, m->policy_table, index + (from + r) * m->stoch, m->stoch, m->classes, units);
                    norm_silu(x, m->policy[l].norm, units, m->eps, y + r * ys);
                }
            }
            product(y, ys, rows, decide, made, room);
            for (int64_t r = 0; r < count; r++) {
                float *x = made + r * room;
                for (int64_t a = 0; a < m->actions; a++) x[a] += m->policy_bias[a];
                int64_t chosen =
                    draw(x, m->actions, m->policy_unimix, uniform_action[(first + r) * m->steps + t], probs);
                action[from + r] = chosen;
                memcpy(x, m->of_action + chosen * hidden, 4 * hidden);
                add_chosen(x, m->table, index + (from + r) * m->stoch, m->stoch, m->classes, hidden);
                norm_silu(x, m->input_norm, hidden, m->eps, xh + r * xhs);
            }
            product(xh, xhs, rows, gates, made, room);
            for (int64_t r = 0; r < count; r++) {
                gru(made + r * room, m->gates_norm, deter, m->eps, state + r * deter, state + r * deter);
                narrow_row(state + r * deter, deter, xh + r * xhs + hidden);
                memcpy(h + (to + r) * deter, xh + r * xhs + hidden, 2 * deter);
            }
            product(xh + hidden, xhs, rows, prior, made, room);
            for (int64_t r = 0; r < count; r++) norm_silu(made + r * room, m->prior.norm, hidden, m->eps, y + r * ys);
            product(y, ys, rows, out, made, room);
            for (int64_t r = 0; r < count; r++) {
                add_row(made + r * room, m->bias, logits);
                draw_all(made + r * room, m->stoch, m->classes, m->unimix,
                         uniform + ((first + r) * m->steps + t) * m->stoch, probs, index + (to + r) * m->stoch);
            }
        }
        free(xh), free(y), free(made), free(state), free(probs);
        _tile_release();
    }
    free(gates.values), free(prior.values), free(out.values), free(decide.values);
    for (int64_t l = 0; l < m->layers; l++) free(policy[l].values);
}

#else

int has_tiles(void) { return 0; }

#endif
