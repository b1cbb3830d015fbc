/* relu(gamma * normalised + beta + plus) and its gradient, one pass over the images for each thing that must wait for another.
fused.py says what the functions are for; CHUNK, how many values are summed at once, is said by native.py. */

#include "lanes.h"

INLINE void back_to(const void *dy, const void *x, const uint16_t *signs, int64_t at, int64_t rows, const float *mean,
                    const float *scale, const float *beta, const float *through_size, const float *through_mean, void *dx,
                    void *dplus, int64_t C, int HALF, int ADDS) {
    for (int64_t c = 0; c < C; c += LANES) {
        const lanes centre = channel(mean + c), a = channel(scale + c), b = channel(beta + c);
        const lanes size = channel(through_size + c), level = channel(through_mean + c);
        for (int64_t r = 0; r < rows; r++) {
            const int64_t here = at + r * C + c;
            const lanes off = load(x, here, HALF) - centre, g = passed(dy, off, signs, here, a, b, HALF, ADDS);
            if (ADDS) store(dplus, here, g, HALF);
            store(dx, here, a * g - size * off - level, HALF);
        }
    }
}

/* Each chunk of each group is one turn of a loop that threads share. The second look at the images goes backwards: the
last chunks of the first may still be in a cache. */
#define BACKWARDS                                                \
    _Pragma("omp parallel for num_threads(threads) schedule(static)") for (int64_t i = 0; i < chunks; i++)
#define CHUNKS                                                   \
    const int64_t most = CHUNK / channels ? CHUNK / channels : 1;\
    const int64_t each = (count + most - 1) / most;              \
    const int64_t chunks = groups * each;                        \
    BACKWARDS
#define CHUNK_AT(number)                                         \
    const int64_t row = (number) % each * most;                  \
    const int64_t rows = count - row < most ? count - row : most;\
    const int64_t own = (number) / each * channels; /* place of its group among what is of a channel */ \
    const int64_t at = ((number) / each * count + row) * channels

/* y = relu(gamma * (x - mean) / sqrt(variance + eps) + beta + plus), statistics of each group its own; running ones move.

Written beside y: mean, 1 / sqrt(variance + eps) and scale of each group's channels, and where something is added
the signs. partial is room for (2, chunks, C). */
void bnscale_forward(int64_t groups, int64_t count, int64_t channels, const void *x, const void *plus,
                     const float *gamma, const float *beta, float *running_mean, float *running_var, float momentum,
                     float eps, float *mean, float *inverse, float *scale, void *y, uint16_t *signs,
                     float *partial, int half, int threads) {
    CHUNKS {
        CHUNK_AT(i);
        (void)own;
        float *middle = partial + i * channels, *square = middle + chunks * channels;
        FOR_HALF(moments_of(x, at, rows, middle, square, C, HALF))
    }
    settle(groups, count, channels, each, most, partial, gamma, running_mean, running_var, momentum, eps, mean, inverse, scale);
    BACKWARDS {
        CHUNK_AT(chunks - 1 - i);
        FOR_ADDS(plus, apply_to(x, plus, at, rows, mean + own, scale + own, beta + own, y, signs, C, HALF, ADDS, 1))
    }
}

/* y = relu(gamma * (x - mean) / sqrt(variance + eps) + beta + plus) of statistics that are known, of each group its own.
y may be x. scale is room for (G, C). */
void bnscale_evaluate(int64_t groups, int64_t count, int64_t channels, const void *x, const void *plus,
                      const float *gamma, const float *beta, const float *mean, const float *variance, float eps,
                      float *scale, void *y, int half, int threads) {
    for (int64_t k = 0; k < groups * channels; k++) scale[k] = gamma[k] / sqrt((double)variance[k] + eps);
    CHUNKS {
        CHUNK_AT(i);
        FOR_ADDS(plus, apply_to(x, plus, at, rows, mean + own, scale + own, beta + own, y, 0, C, HALF, ADDS, 0))
    }
}

/* The gradients of gamma, beta, x and plus. dx may be NULL where nobody asks for it; then dplus is not written either. */
void bnscale_backward(int64_t groups, int64_t count, int64_t channels, const void *dy, const void *x,
                      const uint16_t *signs, const float *mean, const float *inverse, const float *scale,
                      const float *beta, float *dgamma, float *dbeta, void *dx, void *dplus, float *partial, int half,
                      int threads) {
    CHUNKS {
        CHUNK_AT(i);
        float *of_beta = partial + i * channels, *of_gamma = of_beta + chunks * channels;
        FOR_ADDS(signs, slopes_of(dy, x, signs, at, rows, mean + own, scale + own, beta + own, of_beta, of_gamma, C,
                                  HALF, ADDS))
    }
    share_out(groups, count, channels, each, partial, inverse, scale, dgamma, dbeta);
    const float *through_mean = partial, *through_size = partial + chunks * channels;
    if (!dx) return;
    BACKWARDS {
        CHUNK_AT(chunks - 1 - i);
        FOR_ADDS(signs, back_to(dy, x, signs, at, rows, mean + own, scale + own, beta + own, through_size + own,
                                through_mean + own, dx, dplus, C, HALF, ADDS))
    }
}
