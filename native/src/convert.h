/* Weights from one floating dtype to another, through float, rounded to the nearest, ties to even. */
#ifndef TRM_CONVERT_H
#define TRM_CONVERT_H

#include <stddef.h>

typedef enum trm_dtype { TRM_FLOAT32, TRM_FLOAT16, TRM_BFLOAT16, TRM_NO_DTYPE } trm_dtype;

/* Of "F32" or "float32" and so on; TRM_NO_DTYPE for anything else. */
trm_dtype trm_dtype_named(const char *name);

size_t trm_dtype_size(trm_dtype dtype);

void trm_convert(void *to, trm_dtype to_dtype, const void *from, trm_dtype from_dtype, size_t count);

#endif
