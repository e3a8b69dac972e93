/* The loops over parameters for CPUs: the arithmetic of noise.py, torch_loops.py and bfloat16.py, which explain it, with
 * the same bits. Compiled on first use by native.py; a * b + c must not be contracted. */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define BLOCK 2048 /* elements whose noise is made at once: 12 KiB of stack, inside the first-level cache */
#define PARALLEL_FROM 32768 /* elements; below, waking threads takes longer than the work */
#define INDEX_FACTOR 0x9E3779B1u /* of noise.py's hash_bits; the multiple of the next index is a sum, not a product */

#ifdef __AVX512VPOPCNTDQ__ /* one instruction counts the bits of 16 numbers */
#define COUNTS_BITS 1
#else
#define COUNTS_BITS 0
#endif

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "halves of words are read as if the lower one came first"
#endif
typedef uint16_t __attribute__((may_alias)) half_t;

static inline uint32_t hash_bits(uint32_t multiple, uint32_t key0, uint32_t key1) {
    uint32_t bits = multiple ^ key0;
    bits = (bits ^ (bits >> 16)) * 0x7FEB352Du;
    bits = (bits ^ (bits >> 15)) + key1;
    bits *= 0x846CA68Bu;
    return bits ^ (bits >> 16);
}

/* In each half of a word the number of its bits that are set. */
static inline uint32_t counts_of_halves(uint32_t bits) {
    bits -= (bits >> 1) & 0x55555555u;
    bits = (bits & 0x33333333u) + ((bits >> 2) & 0x33333333u);
    bits = (bits + (bits >> 4)) & 0x0F0F0F0Fu;
    return (bits + (bits >> 8)) & 0x001F001Fu;
}

/* Writes, or adds to what is there, coefficient * code for elements 2 * pair, 2 * pair + 1, ...; if `curved`, adds
 * square * code * code to `change`. At most a block. Always inlined with constants for the last three arguments, so that
 * each loop vectorises: the first one over pairs, which are words, the second one over their halves, the elements. */
static inline __attribute__((always_inline)) void noise_of_query(float *restrict noise, float *restrict change,
                                                                 uint32_t pair, int64_t pairs,
                                                                 const int32_t *restrict key, float coefficient,
                                                                 float square, int rademacher, int add, int curved) {
    uint32_t words[BLOCK / 2], multiple = pair * INDEX_FACTOR;
    for (int64_t i = 0; i < pairs; i++, multiple += INDEX_FACTOR) {
        const uint32_t bits = hash_bits(multiple, (uint32_t)key[0], (uint32_t)key[1]);
        words[i] = rademacher ? (bits >> 14) & 0x00020002u : COUNTS_BITS ? bits : counts_of_halves(bits);
    }
    const half_t *halves = (const half_t *)words;
    for (int64_t j = 0; j < 2 * pairs; j++) {
        const int32_t half = halves[j];
        const int32_t code = rademacher ? 1 - half : (COUNTS_BITS ? __builtin_popcount(half) : half) - 8;
        /* Not 0 + x where nothing is there yet: a product of -0 keeps its sign. */
        noise[j] = add ? noise[j] + coefficient * (float)code : coefficient * (float)code;
        if (curved) change[j] += square * (float)(code * code);
    }
}

/* noise[j] = sum over queries of coefficient * code of element 2 * pair + j; writes a multiple of two elements. With
 * `squares`, change[j] = shift + sum over queries of square * code^2, too. Indices of elements wrap at 2^32, so those of
 * pairs at 2^31. */
static void noise_sum(float *restrict noise, float *restrict change, uint32_t pair, int64_t elements,
                      const int32_t *restrict keys, const float *restrict coefficients, const float *restrict squares,
                      float shift, int64_t queries, int rademacher) {
    pair &= 0x7FFFFFFFu;
    const int64_t before_wrap = 0x80000000 - (int64_t)pair;
    if ((elements + 1) / 2 > before_wrap) {
        noise_sum(noise + 2 * before_wrap, change + 2 * before_wrap, 0, elements - 2 * before_wrap, keys, coefficients,
                  squares, shift, queries, rademacher);
        elements = 2 * before_wrap;
    }
    const int64_t pairs = (elements + 1) / 2;
    if (squares)
        for (int64_t i = 0; i < 2 * pairs; i++) change[i] = shift;
#define QUERY(RADEMACHER, ADD, CURVED) \
    noise_of_query(noise, change, pair, pairs, key, coefficients[q], CURVED ? squares[q] : 0, RADEMACHER, ADD, CURVED)
    for (int64_t q = 0; q < queries; q++) {
        const int32_t *restrict key = keys + 2 * q;
        if (squares) {
            if (rademacher && q) QUERY(1, 1, 1);
            else if (rademacher) QUERY(1, 0, 1);
            else if (q) QUERY(0, 1, 1);
            else QUERY(0, 0, 1);
        } else {
            if (rademacher && q) QUERY(1, 1, 0);
            else if (rademacher) QUERY(1, 0, 0);
            else if (q) QUERY(0, 1, 0);
            else QUERY(0, 0, 0);
        }
    }
}

static inline float as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint32_t as_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline uint16_t to_bf16(float value) { /* to nearest, ties to even */
    const uint32_t bits = as_bits(value);
    return value == value ? (uint16_t)((bits + 0x7FFFu + ((bits >> 16) & 1)) >> 16) : 0x7FC0;
}

/* Runs the last argument for the elements of each block, with `j` counting them in the tensor and `noise[j - base]` their noise; with
 * SQUARES, `change[j - base]` is how their curvature changes. The tensor has `segments` segments of `elements`; the first
 * element of segment s has index rows[s] * elements, or `start` where there are no rows. First indices must be even. */
#define FOR_EACH_BLOCK_WITH(SQUARES, SHIFT, ...)                                                        \
    _Pragma("omp parallel for schedule(static) collapse(2) if (segments * elements > PARALLEL_FROM)")   \
    for (int64_t s = 0; s < segments; s++)                                                              \
        for (int64_t at = 0; at < elements; at += BLOCK) {                                              \
            float noise[BLOCK], change[BLOCK];                                                          \
            const int64_t size = elements - at < BLOCK ? elements - at : BLOCK;                         \
            const int64_t base = s * elements + at, first = rows ? rows[s] * elements : start;          \
            noise_sum(noise, change, (uint32_t)((first + at) / 2), size, keys, coefficients, SQUARES, SHIFT, queries, \
                      rademacher);                                                                      \
            for (int64_t j = base; j < base + size; j++) __VA_ARGS__                                    \
        }

#define FOR_EACH_BLOCK(...) FOR_EACH_BLOCK_WITH(NULL, 0, __VA_ARGS__)

#define NOISE_ARGS                                                                                           \
    int64_t segments, int64_t elements, int64_t start, const int64_t *restrict rows, const int32_t *restrict keys, \
        const float *restrict coefficients, int64_t queries, int rademacher

/* What noise becomes before it is added to a stored `value`: itself; over the root of the curvature; nothing where the
 * value is large, -0, which changes no number. */
#define PLAIN(value, noise) (noise)
#define SCALED(value, noise) ((noise) / sqrtf(curvature[j]))
#define MASKED(value, noise) (fabsf(value) <= threshold ? (noise) : -0.0f)
#define SHAPE_ARGS const float *restrict curvature, float threshold

/* Both signs of a single query: its negated noise has the bits of the noise of the negated coefficient. */
#define PERTURB(NAME, SHAPE, OUT, IN, WIDE, ROUNDED)                                                          \
    void perturb_##NAME(OUT *restrict out, const IN *restrict weight, SHAPE_ARGS, NOISE_ARGS) {               \
        FOR_EACH_BLOCK({                                                                                      \
            const float value = WIDE(weight[j]);                                                              \
            out[j] = ROUNDED(value + SHAPE(value, noise[j - base]));                                           \
        })                                                                                                    \
    }                                                                                                         \
    void perturb_both_##NAME(OUT *restrict plus, OUT *restrict minus, const IN *restrict weight, SHAPE_ARGS,  \
                             NOISE_ARGS) {                                                                    \
        FOR_EACH_BLOCK({                                                                                      \
            const float value = WIDE(weight[j]);                                                              \
            plus[j] = ROUNDED(value + SHAPE(value, noise[j - base]));                                         \
            minus[j] = ROUNDED(value + SHAPE(value, -noise[j - base]));                                       \
        })                                                                                                    \
    }

#define PERTURB_ALL(SUFFIX, SHAPE)                                                        \
    PERTURB(float32##SUFFIX, SHAPE, float, float, SAME, SAME)                             \
    PERTURB(float32_to_bfloat16##SUFFIX, SHAPE, uint16_t, float, SAME, to_bf16)           \
    PERTURB(bfloat16##SUFFIX, SHAPE, uint16_t, uint16_t, from_bf16, to_bf16)

#define SAME(value) (value)
#define from_bf16(bits) as_float((uint32_t)(bits) << 16)

PERTURB_ALL(, PLAIN)
PERTURB_ALL(_scaled, SCALED)
PERTURB_ALL(_masked, MASKED)

/* The fp32 number of a bf16 weight and what is kept of what bf16 rounds away, in units of fp32's last place. */
static inline float joined(uint16_t weight, int32_t extra_bits) {
    /* A zero that somebody has written since the last update has no extra bits below it, which would be a NaN. */
    return as_float(((uint32_t)weight << 16) + (uint32_t)(extra_bits < 0 && !(weight & 0x7FFF) ? 0 : extra_bits));
}

static inline uint32_t number_bits(float value) { /* other NaNs could be rounded to numbers */
    return value == value ? as_bits(value) : 0x7FC00000u;
}

static inline void add_low_word(uint16_t *restrict weight, int16_t *restrict low, float decay, float delta) {
    const uint32_t bits = number_bits(decay * joined(*weight, *low) + delta);
    const uint32_t high = (bits + 0x8000u) >> 16;
    *low = (int16_t)(bits - (high << 16));
    *weight = (uint16_t)high;
}

static inline void add_low_byte(uint16_t *restrict weight, int8_t *restrict low, float decay, float delta) {
    uint32_t bits = number_bits(decay * joined(*weight, *low * 256) + delta);
    bits = (bits + 0x7Fu + ((bits >> 8) & 1)) & ~0xFFu; /* to nearest with 24 bits, ties to even */
    const uint32_t high = (bits + 0x8000u) >> 16;
    *low = (int8_t)((int32_t)(bits - (high << 16)) >> 8);
    *weight = (uint16_t)high;
}

/* weight = decay * weight + noise: in the weight's dtype; in fp32, where `low` holds what bf16 rounds away; in 24 bits */
#define ADD_float32(DECAY, NOISE) (weight[j] = (DECAY) * weight[j] + (NOISE))
#define ADD_bfloat16(DECAY, NOISE) (weight[j] = to_bf16((DECAY) * from_bf16(weight[j]) + (NOISE)))
#define ADD_low_word(DECAY, NOISE) add_low_word(weight + j, low + j, DECAY, NOISE)
#define ADD_low_byte(DECAY, NOISE) add_low_byte(weight + j, low + j, DECAY, NOISE)

/* The curvature first, where it changes. */
static inline float changed(float curvature, float change, float floor, float ceiling) {
    const float moved = curvature + curvature * change;
    return moved < floor ? floor : moved > ceiling ? ceiling : moved;
}

#define CURVATURE_ARGS float *restrict curvature, float shift, const float *restrict squares, float floor, float ceiling

/* kernels/adam.py: both moments move, and what they make of a weight's gradient is returned. */
typedef struct {
    float keep_mean, take_mean, keep_square, take_square, mean_correction, square_correction, eps, scale;
} AdamStep;

static inline float adam(float *restrict mean, float *restrict square, float gradient, const AdamStep *step) {
    *mean = step->keep_mean * *mean + step->take_mean * gradient;
    *square = step->keep_square * *square + (step->take_square * gradient) * gradient;
    return step->scale * ((*mean / step->mean_correction) / (sqrtf(*square / step->square_correction) + step->eps));
}

#define ADD_ALL(NAME, ADD, WIDE, ...)                                                                          \
    void add_##NAME(__VA_ARGS__, float decay, NOISE_ARGS) {                                                    \
        FOR_EACH_BLOCK({ ADD(decay, noise[j - base]); })                                                       \
    }                                                                                                          \
    void add_##NAME##_masked(__VA_ARGS__, float decay, float threshold, NOISE_ARGS) {                          \
        FOR_EACH_BLOCK({                                                                                       \
            const float value = WIDE(weight[j]);                                                               \
            ADD(decay, MASKED(value, noise[j - base]));                                                        \
        })                                                                                                     \
    }                                                                                                          \
    void add_##NAME##_curved(__VA_ARGS__, float decay, CURVATURE_ARGS, NOISE_ARGS) {                           \
        FOR_EACH_BLOCK_WITH(squares, shift, {                                                                  \
            curvature[j] = changed(curvature[j], change[j - base], floor, ceiling);                            \
            ADD(decay, noise[j - base] / sqrtf(curvature[j]));                                                 \
        })                                                                                                     \
    }                                                                                                          \
    void add_##NAME##_adam(__VA_ARGS__, float decay, float *restrict mean, float *restrict square,             \
                           AdamStep step, NOISE_ARGS) {                                                        \
        FOR_EACH_BLOCK({                                                                                       \
            const float delta = adam(mean + j, square + j, noise[j - base], &step);                            \
            ADD(decay, delta);                                                                                 \
        })                                                                                                     \
    }

ADD_ALL(float32, ADD_float32, SAME, float *restrict weight)
ADD_ALL(bfloat16, ADD_bfloat16, from_bf16, uint16_t *restrict weight)
ADD_ALL(bfloat16_low_word, ADD_low_word, from_bf16, uint16_t *restrict weight, int16_t *restrict low)
ADD_ALL(bfloat16_low_byte, ADD_low_byte, from_bf16, uint16_t *restrict weight, int8_t *restrict low)

void curve(CURVATURE_ARGS, NOISE_ARGS) {
    FOR_EACH_BLOCK_WITH(squares, shift, {
        curvature[j] = changed(curvature[j], change[j - base], floor, ceiling);
    })
}

/* With scale * delta, for numbers at hand, in the place of noise. */
#define FOR_EACH(BODY)                                                                    \
    _Pragma("omp parallel for simd schedule(static) if (parallel: size > PARALLEL_FROM)") \
    for (int64_t j = 0; j < size; j++) BODY

#define DELTA_ARGS float decay, const float *restrict delta, float scale, int64_t size

void add_delta_float32(float *restrict weight, DELTA_ARGS) {
    FOR_EACH({ weight[j] = decay * weight[j] + scale * delta[j]; })
}

void add_delta_bfloat16(uint16_t *restrict weight, DELTA_ARGS) {
    FOR_EACH({ weight[j] = to_bf16(decay * as_float((uint32_t)weight[j] << 16) + scale * delta[j]); })
}

void add_delta_bfloat16_low_word(uint16_t *restrict weight, int16_t *restrict low, DELTA_ARGS) {
    FOR_EACH({ add_low_word(weight + j, low + j, decay, scale * delta[j]); })
}

void add_delta_bfloat16_low_byte(uint16_t *restrict weight, int8_t *restrict low, DELTA_ARGS) {
    FOR_EACH({ add_low_byte(weight + j, low + j, decay, scale * delta[j]); })
}
