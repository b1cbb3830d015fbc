/* Convolutions whose weights are frozen, each with the norm before it and the sums of the norm behind it, image by image:
what a norm does to an image happens while it is copied to where the convolution reads it, and what is summed over an
image is summed while it is in the cache. chain.py says what the functions are for.

Convolutions are 3x3, of stride 1 and with a rim of zeros, from C channels to C. Images are of W pixels a row, a multiple
of 8. The chunk of a sum is `most` rows of one image. */

#include <omp.h>

#include "lanes.h"

#define UNROLL _Pragma("GCC unroll 32")

/* T pixels of one row and B blocks of 16 channels at a time stay in registers. Each value that comes in meets the three
columns of the kernel at once. Weights lie as fused blocks want them: (C / 16B, 3 rows, C, 3 columns, B, 16), and in
bfloat16 with two of the C beside each other, (C / 16B, 3, C / 2, 3, B, 16, 2). */
INLINE void tile(const void *room, int64_t from, int64_t row, const void *weights, int64_t w, void *y, int64_t to, int64_t C,
                 int HALF, int T, int B) {
    __m512 sum[16][2];
    UNROLL for (int t = 0; t < T; t++) UNROLL for (int b = 0; b < B; b++) sum[t][b] = _mm512_setzero_ps();
    _Pragma("GCC unroll 1") for (int64_t r = 0; r < 3; r++) {
        _Pragma("GCC unroll 1") for (int64_t c = 0; c < C; c += 1 + HALF, w += 48 * B * (1 + HALF)) {
            if (!HALF) {
                const float *in = (const float *)room + from + r * row + c, *each = (const float *)weights + w;
                __m512 weight[3][2];
                UNROLL for (int k = 0; k < 3; k++) UNROLL for (int b = 0; b < B; b++)
                    weight[k][b] = _mm512_loadu_ps(each + (k * B + b) * LANES);
                UNROLL for (int t = 0; t < T + 2; t++) {
                    const __m512 value = _mm512_set1_ps(in[t * C]);
                    UNROLL for (int k = 0; k < 3; k++) UNROLL for (int b = 0; b < B; b++)
                        if (t >= k && t - k < T) sum[t - k][b] = _mm512_fmadd_ps(value, weight[k][b], sum[t - k][b]);
                }
            } else {
#ifdef __AVX512BF16__
                const uint16_t *in = (const uint16_t *)room + from + r * row + c, *each = (const uint16_t *)weights + w;
                __m512bh weight[3][2];
                UNROLL for (int k = 0; k < 3; k++) UNROLL for (int b = 0; b < B; b++)
                    weight[k][b] = (__m512bh)_mm512_loadu_si512(each + (k * B + b) * 2 * LANES);
                UNROLL for (int t = 0; t < T + 2; t++) {
                    int32_t two;
                    memcpy(&two, in + t * C, sizeof two);
                    const __m512bh value = (__m512bh)_mm512_set1_epi32(two);
                    UNROLL for (int k = 0; k < 3; k++) UNROLL for (int b = 0; b < B; b++)
                        if (t >= k && t - k < T) sum[t - k][b] = _mm512_dpbf16_ps(sum[t - k][b], value, weight[k][b]);
                }
#endif
            }
        }
    }
    UNROLL for (int t = 0; t < T; t++) UNROLL for (int b = 0; b < B; b++)
        store(y, to + t * C + b * LANES, (lanes)sum[t][b], HALF);
}

/* An image from the room that has a rim to y. */
INLINE void convolve(const void *room, const void *weights, void *y, int64_t at, int64_t H, int64_t W, int64_t C, int HALF) {
    const int64_t row = (W + 2) * C;
    if (W % 16 == 0) {
        for (int64_t o = 0; o < C; o += LANES)
            for (int64_t r = 0; r < H; r++)
                for (int64_t c = 0; c < W; c += 16)
                    tile(room, r * row + c * C, row, weights, 9 * o * C, y, at + (r * W + c) * C + o, C, HALF, 16, 1);
    } else if (C % 32 == 0) {
        for (int64_t o = 0; o < C; o += 2 * LANES)
            for (int64_t r = 0; r < H; r++)
                for (int64_t c = 0; c < W; c += 8)
                    tile(room, r * row + c * C, row, weights, 9 * o * C, y, at + (r * W + c) * C + o, C, HALF, 8, 2);
    } else {
        for (int64_t o = 0; o < C; o += LANES)
            for (int64_t r = 0; r < H; r++)
                for (int64_t c = 0; c < W; c += 8)
                    tile(room, r * row + c * C, row, weights, 9 * o * C, y, at + (r * W + c) * C + o, C, HALF, 8, 1);
    }
}

/* The rim of zeros; nobody writes there again. */
INLINE void rim(void *room, int64_t H, int64_t W, int64_t C, int HALF) {
    const size_t size = HALF ? 2 : 4, row = (W + 2) * C * size, pixel = C * size;
    char *at = room;
    memset(at, 0, row);
    for (int64_t r = 1; r <= H; r++) {
        memset(at + r * row, 0, pixel);
        memset(at + (r + 1) * row - pixel, 0, pixel);
    }
    memset(at + (H + 1) * row, 0, row);
}

/* An image on its way into the room: as it is; or relu(scale * (x - mean) + beta + plus), which then is h as well. */
INLINE void come(const void *x, const void *plus, int64_t at, const float *mean, const float *scale, const float *beta,
                 void *room, void *h, uint16_t *signs, int64_t H, int64_t W, int64_t C, int HALF, int NORMS, int ADDS) {
    for (int64_t c = 0; c < C; c += LANES) {
        lanes centre = {0}, a = {0}, b = {0};
        if (NORMS) centre = channel(mean + c), a = channel(scale + c), b = channel(beta + c);
        for (int64_t r = 0; r < H; r++) {
            for (int64_t p = 0; p < W; p++) {
                const int64_t here = at + (r * W + p) * C + c;
                lanes value = load(x, here, HALF);
                if (NORMS) {
                    value = (value - centre) * a + b;
                    if (ADDS) value += load(plus, here, HALF);
                    const words on = ~(value <= 0);
                    value = where(on, value);
                    if (ADDS && signs) signs[here / LANES] = pack(on);
                    if (ADDS) store(h, here, value, HALF);
                }
                store(room, ((r + 1) * (W + 2) + p + 1) * C + c, value, HALF);
            }
        }
    }
}

/* A gradient on its way back into the room, through a norm and, where it RECTIFIES, the relu behind it. */
INLINE void return_(const void *dy, const void *x, int64_t at, const float *mean, const float *scale, const float *beta,
                    const float *through_size, const float *through_mean, void *room, int64_t H, int64_t W, int64_t C,
                    int HALF, int RECTIFIES) {
    for (int64_t c = 0; c < C; c += LANES) {
        const lanes centre = channel(mean + c), a = channel(scale + c), b = channel(beta + c);
        const lanes size = channel(through_size + c), level = channel(through_mean + c);
        for (int64_t r = 0; r < H; r++) {
            for (int64_t p = 0; p < W; p++) {
                const int64_t here = at + (r * W + p) * C + c;
                const lanes off = load(x, here, HALF) - centre;
                const lanes g = RECTIFIES ? passed(dy, off, 0, here, a, b, HALF, 0) : load(dy, here, HALF);
                store(room, ((r + 1) * (W + 2) + p + 1) * C + c, a * g - size * off - level, HALF);
            }
        }
    }
}

/* The gradient of a sum behind a relu: dy + plus where the signs let it through, into g, which may be dy. */
INLINE void meet(const void *dy, const void *plus, const uint16_t *signs, void *g, int64_t at, int64_t values, int HALF) {
    for (int64_t v = at; v < at + values; v += LANES) {
        lanes sum = load(dy, v, HALF);
        if (plus) sum += load(plus, v, HALF);
        if (signs) sum = where(unpack(signs[v / LANES]), sum);
        store(g, v, sum, HALF);
    }
}

/* Sums over one image of a gradient that relu has let through already. */
INLINE void slopes_behind(const void *dy, const void *x, int64_t at, int64_t rows, const float *mean, float *of_beta,
                          float *of_gamma, int64_t C, int HALF) {
    for (int64_t c = 0; c < C; c += LANES) {
        const lanes centre = channel(mean + c);
        lanes beta0 = {0}, gamma0 = {0}, beta1 = {0}, gamma1 = {0};
        int64_t r = 0;
        for (; r + 1 < rows; r += 2) {
            const int64_t one = at + r * C + c, two = one + C;
            const lanes g1 = load(dy, one, HALF), g2 = load(dy, two, HALF);
            beta0 += g1;
            beta1 += g2;
            gamma0 += g1 * (load(x, one, HALF) - centre);
            gamma1 += g2 * (load(x, two, HALF) - centre);
        }
        if (r < rows) {
            const int64_t one = at + r * C + c;
            const lanes g1 = load(dy, one, HALF);
            beta0 += g1;
            gamma0 += g1 * (load(x, one, HALF) - centre);
        }
        keep(of_beta + c, beta0 + beta1);
        keep(of_gamma + c, gamma0 + gamma1);
    }
}

/* Each image is one turn of a loop that threads share, each with a room of its own. */
#define PIECES_OF_IMAGES                                                                              \
    const int64_t whole = CHUNK / channels, most = whole && H * W % whole == 0 ? whole : H * W;       \
    const int64_t pieces = H * W / most, chunks = groups * share * pieces
#define IMAGES                                                                                        \
    PIECES_OF_IMAGES;                                                                                 \
    const size_t each_room = ((H + 2) * (W + 2) * channels * (half ? 2 : 4) + 63) / 64 * 64;          \
    _Pragma("omp parallel num_threads(threads)") {                                                    \
        void *room = (char *)rooms + omp_get_thread_num() * each_room;                                \
        FOR_HALF(rim(room, H, W, C, HALF))                                                            \
        _Pragma("omp for schedule(static)") for (int64_t i = 0; i < groups * share; i++) {            \
            const int64_t own = i / share * channels, at = i * H * W * channels;
#define END_OF_IMAGES }}
#define PIECES(call)                                                                                  \
    for (int64_t piece = 0; piece < pieces; piece++) {                                                \
        const int64_t from = at + piece * most * channels;                                            \
        float *first = partial + (i * pieces + piece) * channels, *second = first + chunks * channels; \
        call;                                                                                         \
    }

/* Whether bfloat16 can be convolved here. */
int bnscale_chain_half(void) {
#ifdef __AVX512BF16__
    return 1;
#else
    return 0;
#endif
}

/* y = conv(x), or conv(relu(scale * (x - mean) + beta + plus)) where there is a mean; where there is a plus, that is written
to h, too, which may be plus, and its signs, if they are kept. Then the statistics of the norm behind y, as in
bnscale_forward; none where partial is NULL. */
void bnscale_chain_forward(int64_t groups, int64_t share, int64_t H, int64_t W, int64_t channels, const void *x,
                           const void *plus, const float *mean, const float *scale, const float *beta, void *h,
                           uint16_t *signs, const void *weights, void *y, const float *gamma, float *running_mean,
                           float *running_var, float momentum, float eps, float *next_mean, float *next_inverse,
                           float *next_scale, float *partial, void *rooms, int half, int threads) {
    IMAGES
        if (!mean) {
            FOR_HALF(come(x, 0, at, 0, 0, 0, room, 0, 0, H, W, C, HALF, 0, 0))
        } else if (!plus) {
            FOR_HALF(come(x, 0, at, mean + own, scale + own, beta + own, room, 0, 0, H, W, C, HALF, 1, 0))
        } else {
            FOR_HALF(come(x, plus, at, mean + own, scale + own, beta + own, room, h, signs, H, W, C, HALF, 1, 1))
        }
        FOR_HALF(convolve(room, weights, y, at, H, W, C, HALF))
        if (partial) {
            PIECES(FOR_HALF(moments_of(y, from, most, first, second, C, HALF)))
        }
    END_OF_IMAGES
    if (partial)
        settle(groups, share * H * W, channels, share * pieces, most, partial, gamma, running_mean, running_var, momentum,
               eps, next_mean, next_inverse, next_scale);
}

/* Back through a norm, and the relu behind it where it `rectifies`, and through the convolution before it, of weights turned
round: from dy to dx, the gradient of what that convolution read. through_mean and through_size are as in lanes.h.

What it read was relu(norm(before) + ...): dx + plus is let through by `signs`, or where these are NULL by the norm itself,
and then the gradients of that norm's gamma and beta follow, and in partial what its own gradient takes from them. Where
before is NULL it was the first image of all, and dx + plus is its gradient. */
void bnscale_chain_backward(int64_t groups, int64_t share, int64_t H, int64_t W, int64_t channels, const void *dy,
                            const void *x, const float *mean, const float *scale, const float *beta,
                            const float *through_size, const float *through_mean, int rectifies, const void *weights,
                            void *dx, const void *plus, const uint16_t *signs, const void *before,
                            const float *before_mean, const float *before_inverse, const float *before_scale,
                            const float *before_beta, float *dgamma, float *dbeta, float *partial, void *rooms, int half,
                            int threads) {
    IMAGES
        if (rectifies) {
            FOR_HALF(return_(dy, x, at, mean + own, scale + own, beta + own, through_size + own, through_mean + own, room,
                             H, W, C, HALF, 1))
        } else {
            FOR_HALF(return_(dy, x, at, mean + own, scale + own, beta + own, through_size + own, through_mean + own, room,
                             H, W, C, HALF, 0))
        }
        FOR_HALF(convolve(room, weights, dx, at, H, W, C, HALF))
        if (plus) {
            FOR_HALF(meet(dx, plus, signs, dx, at, H * W * C, HALF))
        }
        if (before && plus) {
            PIECES(FOR_HALF(slopes_behind(dx, before, from, most, before_mean + own, first, second, C, HALF)))
        } else if (before) {
            PIECES(FOR_HALF(slopes_of(dx, before, 0, from, most, before_mean + own, before_scale + own, before_beta + own,
                                      first, second, C, HALF, 0)))
        }
    END_OF_IMAGES
    if (before)
        share_out(groups, share * H * W, channels, share * pieces, partial, before_inverse, before_scale, dgamma, dbeta);
}

/* Where a chain ends: g, the gradient of its output as far as the last relu lets it through, and the sums of the last norm. */
void bnscale_chain_end(int64_t groups, int64_t share, int64_t H, int64_t W, int64_t channels, const void *dy,
                       const uint16_t *signs, void *g, const void *x, const float *mean, const float *inverse,
                       const float *scale, float *dgamma, float *dbeta, float *partial, int half, int threads) {
    PIECES_OF_IMAGES;
    _Pragma("omp parallel for num_threads(threads) schedule(static)") for (int64_t i = 0; i < groups * share; i++) {
        const int64_t own = i / share * channels, at = i * H * W * channels;
        FOR_HALF(meet(dy, 0, signs, g, at, H * W * C, HALF))
        PIECES(FOR_HALF(slopes_behind(g, x, from, most, mean + own, first, second, C, HALF)))
    }
    share_out(groups, share * H * W, channels, share * pieces, partial, inverse, scale, dgamma, dbeta);
}

/* y = relu(scale * (x - mean) + beta + plus); y may be plus. */
void bnscale_chain_last(int64_t groups, int64_t share, int64_t H, int64_t W, int64_t channels, const void *x,
                        const void *plus, const float *mean, const float *scale, const float *beta, void *y,
                        uint16_t *signs, int half, int threads) {
    _Pragma("omp parallel for num_threads(threads) schedule(static)") for (int64_t i = 0; i < groups * share; i++) {
        const int64_t own = i / share * channels, at = i * H * W * channels;
        if (signs) {
            FOR_HALF(apply_to(x, plus, at, H * W, mean + own, scale + own, beta + own, y, signs, C, HALF, 1, 1))
        } else {
            FOR_HALF(apply_to(x, plus, at, H * W, mean + own, scale + own, beta + own, y, 0, C, HALF, 1, 0))
        }
    }
}
