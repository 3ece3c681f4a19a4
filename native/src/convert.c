#include "convert.h"

#include <math.h>
#include <stdint.h>
#include <string.h>

trm_dtype trm_dtype_named(const char *name) {
    static const char *const names[][2] = {{"F32", "float32"}, {"F16", "float16"}, {"BF16", "bfloat16"}};
    for (int i = 0; i < 3; i++) {
        if (!strcmp(name, names[i][0]) || !strcmp(name, names[i][1])) return (trm_dtype)i;
    }
    return TRM_NO_DTYPE;
}

size_t trm_dtype_size(trm_dtype dtype) { return dtype == TRM_FLOAT32 ? 4 : 2; }

static float from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static float from_half(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, exponent = half >> 10 & 31, fraction = half & 0x3FF;
    if (exponent == 31) return from_bits(sign | 0x7F800000 | fraction << 13);
    if (exponent) return from_bits(sign | (exponent + 112) << 23 | fraction << 13);
    float value = ldexpf((float)fraction, -24);
    return sign ? -value : value;
}

static uint16_t to_bfloat(float value) {
    uint32_t bits = bits_of(value);
    if (isnan(value)) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

static uint16_t to_half(float value) {
    uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000;
    float size = fabsf(value);
    if (isnan(value)) return (uint16_t)(sign | 0x7E00);
    if (size >= 65520.0f) return (uint16_t)(sign | 0x7C00);
    if (size < 0x1p-14f) return (uint16_t)(sign | (uint32_t)nearbyintf(ldexpf(size, 24))); /* may carry to 2^-14 */
    bits &= 0x7FFFFFFF;
    bits += 0xFFF + (bits >> 13 & 1); /* may carry into the exponent, as it should */
    return (uint16_t)(sign | ((bits >> 13) - (112 << 10)));
}

static float load(const char *from, trm_dtype dtype, size_t i) {
    uint16_t narrow;
    float value;
    if (dtype == TRM_FLOAT32) {
        memcpy(&value, from + 4 * i, 4);
        return value;
    }
    memcpy(&narrow, from + 2 * i, 2);
    return dtype == TRM_FLOAT16 ? from_half(narrow) : from_bits((uint32_t)narrow << 16);
}

static void store(char *to, trm_dtype dtype, size_t i, float value) {
    if (dtype == TRM_FLOAT32) {
        memcpy(to + 4 * i, &value, 4);
        return;
    }
    uint16_t narrow = dtype == TRM_FLOAT16 ? to_half(value) : to_bfloat(value);
    memcpy(to + 2 * i, &narrow, 2);
}

void trm_convert(void *to, trm_dtype to_dtype, const void *from, trm_dtype from_dtype, size_t count) {
    if (to_dtype == from_dtype) {
        memcpy(to, from, count * trm_dtype_size(to_dtype));
        return;
    }
    for (size_t i = 0; i < count; i++) store(to, to_dtype, i, load(from, from_dtype, i));
}
