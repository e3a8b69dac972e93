/* The loops over parameters for CPUs: the arithmetic of noise.py, torch_loops.py and bfloat16.py, which explain it, with
 * the same bits. Compiled on first use by native.py; a * b + c must not be contracted. */
#include <stdint.h>
#include <string.h>

#define BLOCK 2048 /* elements whose noise is made at once: 8 KiB of stack, inside the first-level cache */
#define PARALLEL_FROM 32768 /* elements; below, waking threads takes longer than the work */

static inline uint32_t hash_bits(uint32_t index, uint32_t key0, uint32_t key1) {
    uint32_t bits = (index * 0x9E3779B1u) ^ key0;
    bits = (bits ^ (bits >> 16)) * 0x7FEB352Du;
    bits = (bits ^ (bits >> 15)) + key1;
    bits *= 0x846CA68Bu;
    return bits ^ (bits >> 16);
}

/* Writes, or adds to what is there, coefficient * code for elements 2 * pair, 2 * pair + 1, ... Always inlined with
 * constants for the last two arguments, so that each loop vectorises. */
static inline __attribute__((always_inline)) void noise_of_query(float *restrict noise, uint32_t pair, int64_t pairs,
                                                                 const int32_t *restrict key, float coefficient,
                                                                 int rademacher, int add) {
    const uint32_t key0 = (uint32_t)key[0], key1 = (uint32_t)key[1];
    for (int64_t i = 0; i < pairs; i++) {
        uint32_t bits = hash_bits(pair + (uint32_t)i, key0, key1);
        int32_t even, odd;
        if (rademacher) {
            even = 1 - (int32_t)((bits >> 14) & 2);
            odd = 1 - (int32_t)((bits >> 30) & 2);
        } else {
            bits -= (bits >> 1) & 0x55555555u;
            bits = (bits & 0x33333333u) + ((bits >> 2) & 0x33333333u);
            bits = (bits + (bits >> 4)) & 0x0F0F0F0Fu;
            bits = (bits + (bits >> 8)) & 0x001F001Fu;
            even = (int32_t)(bits & 0xFFFF) - 8;
            odd = (int32_t)(bits >> 16) - 8;
        }
        /* Not 0 + x where nothing is there yet: a product of -0 keeps its sign. */
        noise[2 * i] = add ? noise[2 * i] + coefficient * (float)even : coefficient * (float)even;
        noise[2 * i + 1] = add ? noise[2 * i + 1] + coefficient * (float)odd : coefficient * (float)odd;
    }
}

/* noise[j] = sum over queries of coefficient * code of element 2 * pair + j; writes a multiple of two elements. */
static void noise_sum(float *restrict noise, uint32_t pair, int64_t elements, const int32_t *restrict keys,
                      const float *restrict coefficients, int64_t queries, int rademacher) {
    const int64_t pairs = (elements + 1) / 2;
    for (int64_t q = 0; q < queries; q++) {
        if (rademacher) {
            if (q) noise_of_query(noise, pair, pairs, keys + 2 * q, coefficients[q], 1, 1);
            else noise_of_query(noise, pair, pairs, keys, coefficients[0], 1, 0);
        } else {
            if (q) noise_of_query(noise, pair, pairs, keys + 2 * q, coefficients[q], 0, 1);
            else noise_of_query(noise, pair, pairs, keys, coefficients[0], 0, 0);
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

/* Runs BODY for the elements of each block, with `j` counting them in the tensor and `noise[j - base]` their noise.
 * The tensor has `segments` segments of `elements`; the first element of segment s has index rows[s] * elements, or
 * `start` where there are no rows. First indices must be even. */
#define FOR_EACH_BLOCK(BODY)                                                                            \
    _Pragma("omp parallel for schedule(static) collapse(2) if (segments * elements > PARALLEL_FROM)")   \
    for (int64_t s = 0; s < segments; s++)                                                              \
        for (int64_t at = 0; at < elements; at += BLOCK) {                                              \
            float noise[BLOCK];                                                                         \
            const int64_t size = elements - at < BLOCK ? elements - at : BLOCK;                         \
            const int64_t base = s * elements + at, first = rows ? rows[s] * elements : start;          \
            noise_sum(noise, (uint32_t)((first + at) / 2), size, keys, coefficients, queries, rademacher); \
            for (int64_t j = base; j < base + size; j++) BODY                                           \
        }

#define NOISE_ARGS                                                                                           \
    int64_t segments, int64_t elements, int64_t start, const int64_t *restrict rows, const int32_t *restrict keys, \
        const float *restrict coefficients, int64_t queries, int rademacher

void perturb_float32(float *restrict out, const float *restrict weight, NOISE_ARGS) {
    FOR_EACH_BLOCK({ out[j] = weight[j] + noise[j - base]; })
}

void perturb_float32_to_bfloat16(uint16_t *restrict out, const float *restrict weight, NOISE_ARGS) {
    FOR_EACH_BLOCK({ out[j] = to_bf16(weight[j] + noise[j - base]); })
}

void perturb_bfloat16(uint16_t *restrict out, const uint16_t *restrict weight, NOISE_ARGS) {
    FOR_EACH_BLOCK({ out[j] = to_bf16(as_float((uint32_t)weight[j] << 16) + noise[j - base]); })
}

/* Both signs of a single query, whose negated noise has the bits of the noise of the negated coefficient. */
void perturb_both_float32(float *restrict plus, float *restrict minus, const float *restrict weight, NOISE_ARGS) {
    FOR_EACH_BLOCK({
        plus[j] = weight[j] + noise[j - base];
        minus[j] = weight[j] - noise[j - base];
    })
}

void perturb_both_float32_to_bfloat16(uint16_t *restrict plus, uint16_t *restrict minus, const float *restrict weight,
                                      NOISE_ARGS) {
    FOR_EACH_BLOCK({
        plus[j] = to_bf16(weight[j] + noise[j - base]);
        minus[j] = to_bf16(weight[j] - noise[j - base]);
    })
}

void perturb_both_bfloat16(uint16_t *restrict plus, uint16_t *restrict minus, const uint16_t *restrict weight,
                           NOISE_ARGS) {
    FOR_EACH_BLOCK({
        const float wide = as_float((uint32_t)weight[j] << 16);
        plus[j] = to_bf16(wide + noise[j - base]);
        minus[j] = to_bf16(wide - noise[j - base]);
    })
}

/* weight = decay * weight + noise */
void add_float32(float *restrict weight, float decay, NOISE_ARGS) {
    FOR_EACH_BLOCK({ weight[j] = decay * weight[j] + noise[j - base]; })
}

void add_bfloat16(uint16_t *restrict weight, float decay, NOISE_ARGS) {
    FOR_EACH_BLOCK({ weight[j] = to_bf16(decay * as_float((uint32_t)weight[j] << 16) + noise[j - base]); })
}

/* The fp32 number of a bf16 weight and what is kept of what bf16 rounds away, in units of fp32's last place. */
static inline float joined(uint16_t weight, int32_t rest) {
    /* A zero that somebody has written since the last update has no rest below it, which would be a NaN. */
    return as_float(((uint32_t)weight << 16) + (uint32_t)(rest < 0 && !(weight & 0x7FFF) ? 0 : rest));
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

/* The same in fp32, where `low` holds what bf16 rounds away; or in 24 bits. */
void add_bfloat16_low_word(uint16_t *restrict weight, int16_t *restrict low, float decay, NOISE_ARGS) {
    FOR_EACH_BLOCK({ add_low_word(weight + j, low + j, decay, noise[j - base]); })
}

void add_bfloat16_low_byte(uint16_t *restrict weight, int8_t *restrict low, float decay, NOISE_ARGS) {
    FOR_EACH_BLOCK({ add_low_byte(weight + j, low + j, decay, noise[j - base]); })
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
