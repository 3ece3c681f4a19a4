/* Reads safetensors files that may come from anybody.
 *
 * A file is 8 bytes, the length of a JSON header, the header, and the tensors' bytes. Refused is whatever does not
 * hold together: a header longer than the file or than 100 MB, JSON that is not exactly what the format says,
 * names twice, shapes whose size is not the tensor's, tensors that overlap, leave holes or end beyond the file. */
#ifndef TRM_SAFETENSORS_H
#define TRM_SAFETENSORS_H

#include <stdio.h>

#include "trm_kernels.h"

#define TRM_MAX_DIMENSIONS 8

typedef struct trm_tensor {
    char *name;
    char dtype[12]; /* as the file says: "F32" */
    int num_dimensions;
    uint64_t shape[TRM_MAX_DIMENSIONS];
    uint64_t begin, end; /* bytes, from the first tensor */
} trm_tensor;

typedef struct trm_safetensors {
    FILE *file;
    uint64_t first; /* where the first tensor begins in the file */
    trm_tensor *tensors; /* sorted by name */
    size_t count;
} trm_safetensors;

/* After an error nothing is left open. */
trm_status trm_safetensors_open(trm_safetensors *opened, const char *path, trm_error *error);

void trm_safetensors_close(trm_safetensors *opened);

/* NULL where there is none. */
const trm_tensor *trm_safetensors_find(const trm_safetensors *opened, const char *name);

/* All bytes of a tensor into `bytes`, which has room for end - begin. */
trm_status trm_safetensors_read(const trm_safetensors *opened, const trm_tensor *tensor, void *bytes,
                                trm_error *error);

#endif
