/* Sixteen values at once, and what the kernels on images have in common: the sums behind a norm, forward and backward.

Images lie channels last: G groups of M rows of C channels, where a group has a statistic of its own. C is a multiple of
16. `half` says that images are bfloat16 and not float32; everything of a channel is float32 in either case, and so are
all sums. Rows are summed in chunks of one size and the chunks in order, so no sum depends on the number of threads.

Channel c of group g becomes  scale[g, c] * (x - mean[g, c]) + beta[g, c];  sign bits lie as 16 of neighbouring values a
word, in the order of memory. Compiled by native.py. */

#ifndef BNSCALE_LANES
#define BNSCALE_LANES

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define LANES 16
typedef float lanes __attribute__((vector_size(LANES * 4)));
typedef int32_t words __attribute__((vector_size(LANES * 4)));
typedef uint32_t bits __attribute__((vector_size(LANES * 4)));
typedef uint16_t shorts __attribute__((vector_size(LANES * 2)));

#define INLINE static inline __attribute__((always_inline))

INLINE lanes load(const void *from, int64_t at, int half) {
    if (!half) {
        lanes value;
        memcpy(&value, (const float *)from + at, sizeof value);
        return value;
    }
    shorts raw;
    memcpy(&raw, (const uint16_t *)from + at, sizeof raw);
    return (lanes)(__builtin_convertvector(raw, bits) << 16);
}

/* float32 to bfloat16: to the nearest, ties to even, and a NaN stays one. */
#ifdef __AVX512BF16__
INLINE shorts narrow(lanes value) { return (shorts)_mm512_cvtneps_pbh((__m512)value); }
#else
INLINE shorts narrow(lanes value) {
    const bits raw = (bits)value, number = (bits)(value == value);
    const bits rounded = (raw + 0x7fff + ((raw >> 16) & 1)) >> 16; /* this could carry a NaN into the sign */
    return __builtin_convertvector((rounded & number) | (0x7fc0 & ~number), shorts);
}
#endif

INLINE void store(void *to, int64_t at, lanes value, int half) {
    if (!half) {
        memcpy((float *)to + at, &value, sizeof value);
    } else {
        const shorts packed = narrow(value);
        memcpy((uint16_t *)to + at, &packed, sizeof packed);
    }
}

INLINE lanes where(words which, lanes value) { return (lanes)((words)value & which); }

INLINE lanes channel(const float *values) {
    lanes value;
    memcpy(&value, values, sizeof value);
    return value;
}

INLINE void keep(float *values, lanes value) { memcpy(values, &value, sizeof value); }

#ifdef __AVX512F__
INLINE uint16_t pack(words which) { return _mm512_test_epi32_mask((__m512i)which, (__m512i)which); }
INLINE words unpack(uint16_t packed) { return (words)_mm512_maskz_set1_epi32(packed, -1); }
#else
INLINE uint16_t pack(words which) {
    uint16_t packed = 0;
    for (int i = 0; i < LANES; i++) packed |= (uint16_t)((which[i] & 1) << i);
    return packed;
}
INLINE words unpack(uint16_t packed) {
    static const words each = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768};
    return (each & (int32_t)packed) != 0;
}
#endif

/* What is done with one chunk: rows of one group, beginning at value `at`. Every argument in capitals is a constant where
these are used, so that each kind of images and each usual width has loops of its own. */

INLINE void moments_of(const void *x, int64_t at, int64_t rows, float *mean, float *square, int64_t C, int HALF) {
    for (int64_t c = 0; c < C; c += LANES) {
        lanes sum0 = {0}, sum1 = {0}, square0 = {0}, square1 = {0};
        int64_t r = 0;
        for (; r + 1 < rows; r += 2) {
            sum0 += load(x, at + r * C + c, HALF);
            sum1 += load(x, at + (r + 1) * C + c, HALF);
        }
        if (r < rows) sum0 += load(x, at + r * C + c, HALF);
        const lanes centre = (sum0 + sum1) / (float)rows;
        for (r = 0; r + 1 < rows; r += 2) {
            const lanes one = load(x, at + r * C + c, HALF) - centre, two = load(x, at + (r + 1) * C + c, HALF) - centre;
            square0 += one * one;
            square1 += two * two;
        }
        if (r < rows) {
            const lanes one = load(x, at + r * C + c, HALF) - centre;
            square0 += one * one;
        }
        keep(mean + c, centre);
        keep(square + c, square0 + square1);
    }
}

INLINE void apply_to(const void *x, const void *plus, int64_t at, int64_t rows, const float *mean, const float *scale,
                     const float *beta, void *y, uint16_t *signs, int64_t C, int HALF, int ADDS, int KEEPS) {
    for (int64_t c = 0; c < C; c += LANES) {
        const lanes centre = channel(mean + c), a = channel(scale + c), b = channel(beta + c);
        for (int64_t r = 0; r < rows; r++) {
            const int64_t here = at + r * C + c;
            lanes value = (load(x, here, HALF) - centre) * a + b; /* of a channel without variance, beta to the last bit */
            if (ADDS) value += load(plus, here, HALF);
            const words on = ~(value <= 0); /* a NaN goes on: whoever looks at the loss must see it */
            if (ADDS && KEEPS) signs[here / LANES] = pack(on);
            store(y, here, where(on, value), HALF);
        }
    }
}

/* The gradient that relu lets through. Without a sum the sign of its input follows from the image. */
INLINE lanes passed(const void *dy, lanes off, const uint16_t *signs, int64_t at, lanes a, lanes b, int HALF, int ADDS) {
    const words on = ADDS ? unpack(signs[at / LANES]) : ~(off * a + b <= 0);
    return where(on, load(dy, at, HALF));
}

INLINE void slopes_of(const void *dy, const void *x, const uint16_t *signs, int64_t at, int64_t rows, const float *mean,
                      const float *scale, const float *beta, float *of_beta, float *of_gamma, int64_t C, int HALF,
                      int ADDS) {
    for (int64_t c = 0; c < C; c += LANES) {
        const lanes centre = channel(mean + c), a = channel(scale + c), b = channel(beta + c);
        lanes beta0 = {0}, gamma0 = {0}, beta1 = {0}, gamma1 = {0};
        int64_t r = 0;
        for (; r + 1 < rows; r += 2) {
            const int64_t one = at + r * C + c, two = one + C;
            const lanes x1 = load(x, one, HALF) - centre, x2 = load(x, two, HALF) - centre;
            const lanes g1 = passed(dy, x1, signs, one, a, b, HALF, ADDS);
            const lanes g2 = passed(dy, x2, signs, two, a, b, HALF, ADDS);
            beta0 += g1;
            beta1 += g2;
            gamma0 += g1 * x1;
            gamma1 += g2 * x2;
        }
        if (r < rows) {
            const int64_t one = at + r * C + c;
            const lanes x1 = load(x, one, HALF) - centre, g1 = passed(dy, x1, signs, one, a, b, HALF, ADDS);
            beta0 += g1;
            gamma0 += g1 * x1;
        }
        keep(of_beta + c, beta0 + beta1);
        keep(of_gamma + c, gamma0 + gamma1);
    }
}

/* A call in which C, HALF and ADDS are constants; the widths written out are those of the CIFAR networks. */
#define FOR_WIDTH(call)                                          \
    switch (channels) {                                          \
        case 16: { enum { C = 16 }; call; break; }               \
        case 32: { enum { C = 32 }; call; break; }               \
        case 64: { enum { C = 64 }; call; break; }               \
        default: { const int64_t C = channels; call; }           \
    }
#define FOR_HALF(call)                                           \
    if (half) { enum { HALF = 1 }; FOR_WIDTH(call) }             \
    else { enum { HALF = 0 }; FOR_WIDTH(call) }
#define FOR_ADDS(adds, call)                                     \
    if (adds) { enum { ADDS = 1 }; FOR_HALF(call) }              \
    else { enum { ADDS = 0 }; FOR_HALF(call) }

/* Sums over the chunks of a group for 16 channels: in order, in double precision. */
INLINE void summed(const float *partial, int64_t each, int64_t channels, double *sum) {
    for (int l = 0; l < LANES; l++) sum[l] = 0;
    for (int64_t i = 0; i < each; i++)
        for (int l = 0; l < LANES; l++) sum[l] += partial[i * channels + l];
}

/* From the partial sums of `each` chunks of a group, all of `most` rows but the last, to its statistics; running ones move. */
INLINE void settle(int64_t groups, int64_t count, int64_t channels, int64_t each, int64_t most, const float *partial,
                   const float *gamma, float *running_mean, float *running_var, float momentum, float eps, float *mean,
                   float *inverse, float *scale) {
    const int64_t chunks = groups * each;
    for (int64_t k = 0; k < groups * channels; k += LANES) {
        const float *middle = partial + k / channels * each * channels + k % channels;
        double sum[LANES], square[LANES], centre[LANES];
        for (int l = 0; l < LANES; l++) sum[l] = 0;
        for (int64_t i = 0; i < each; i++) {
            const double rows = count - i * most < most ? count - i * most : most;
            for (int l = 0; l < LANES; l++) sum[l] += rows * middle[i * channels + l];
        }
        for (int l = 0; l < LANES; l++) centre[l] = sum[l] / count;
        summed(middle + chunks * channels, each, channels, square);
        for (int64_t i = 0; i < each; i++) {
            const double rows = count - i * most < most ? count - i * most : most;
            for (int l = 0; l < LANES; l++) {
                const double off = middle[i * channels + l] - centre[l];
                square[l] += rows * off * off;
            }
        }
        for (int l = 0; l < LANES; l++) {
            const double variance = square[l] / count;
            mean[k + l] = centre[l];
            inverse[k + l] = 1 / sqrt(variance + eps);
            scale[k + l] = gamma[k + l] * inverse[k + l];
            running_mean[k + l] += momentum * (mean[k + l] - running_mean[k + l]);
            running_var[k + l] += momentum * ((float)(square[l] / (count - 1)) - running_var[k + l]);
        }
    }
}

/* From the partial sums of `each` chunks of a group to the gradients of gamma and beta, and to what the gradient of x takes
from them, which is left over what has been read: through_mean first, through_size behind all chunks. */
INLINE void share_out(int64_t groups, int64_t count, int64_t channels, int64_t each, float *partial, const float *inverse,
                      const float *scale, float *dgamma, float *dbeta) {
    const int64_t chunks = groups * each;
    float *through_mean = partial, *through_size = partial + chunks * channels; /* over what has been read by then */
    for (int64_t k = 0; k < groups * channels; k += LANES) {
        const float *from = partial + k / channels * each * channels + k % channels;
        double of_beta[LANES], of_gamma[LANES];
        summed(from, each, channels, of_beta);
        summed(from + chunks * channels, each, channels, of_gamma);
        for (int l = 0; l < LANES; l++) {
            dbeta[k + l] = of_beta[l];
            dgamma[k + l] = of_gamma[l] * inverse[k + l];
            through_mean[k + l] = scale[k + l] * of_beta[l] / count;
            through_size[k + l] = scale[k + l] * of_gamma[l] * inverse[k + l] * inverse[k + l] / count;
        }
    }
}

#endif
