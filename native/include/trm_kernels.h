/* The recursion of a TRM in C: weights from a safetensors file, tensors as device pointers.
 *
 *   trm_create(path, prefix, variant, device, max_positions, &model, &error);
 *   trm_workspace_bytes(model, &call, &bytes, &error);
 *   trm_forward(model, &call, &error);
 *   trm_destroy(model);
 *
 * Which sizes of TRM there are was declared when the library was built: see trm_variant_at. The driver, libcuda,
 * is opened by trm_create; everything before it works on a machine without a GPU. The library keeps no state of
 * its own: models may be made on several devices, and one model may be called from several threads at once, each
 * with memory and a stream of its own. docs/native.md walks through an example. */
#ifndef TRM_KERNELS_H
#define TRM_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define TRM_API __attribute__((visibility("default")))
#else
#define TRM_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum trm_status {
    TRM_OK = 0,
    TRM_ERROR_ARGUMENT = 1, /* what the caller passed cannot be */
    TRM_ERROR_FILE = 2,     /* the file cannot be read, or is no sound safetensors file */
    TRM_ERROR_WEIGHTS = 3,  /* the file holds other weights than the variant has */
    TRM_ERROR_VARIANT = 4,  /* no such variant, or not for this GPU */
    TRM_ERROR_MEMORY = 5,   /* of this machine or of the GPU */
    TRM_ERROR_DRIVER = 6,   /* no CUDA driver, or none that has what is needed */
    TRM_ERROR_CUDA = 7      /* the driver refused; the message says what */
} trm_status;

/* Why a function did not return TRM_OK. Every function takes NULL where nobody wants to know. */
typedef struct trm_error {
    trm_status status;
    char message[256];
} trm_error;

typedef struct trm_variant {
    const char *name;
    const char *dtype; /* of x, y, z and the cache: "bfloat16", "float16" or "float32" */
    int64_t hidden_size;
    int64_t num_heads;
    int64_t num_key_value_heads;
    int64_t intermediate_size;
    int64_t num_layers;
    int64_t num_recursion_steps;
    int64_t num_cycles;
    int64_t evaluations; /* of a layer in one call: slabs of keys and of values in a cache */
    int causal;          /* 1: has a cache as well */
    double rope_theta;
    double eps;
} trm_variant;

/* Weights on one GPU, and the kernels for it. */
typedef struct trm_model trm_model;

/* One call: its sizes, and device memory that begins at multiples of 16 bytes. Zero what is not needed. */
typedef struct trm_call {
    int64_t batch;
    int64_t tokens;
    const void *x;          /* [batch, tokens, hidden_size] */
    const void *y, *z;      /* the state to go on from, as x; both NULL: the initial state */
    void *y_out, *z_out;    /* [batch, tokens, hidden_size] */
    void *cache;            /* trm_cache_bytes long, or NULL; with it, y and z are NULL */
    int64_t past;           /* tokens in the cache; these are added to them */
    int64_t capacity;       /* tokens the cache has room for */
    void *workspace;        /* trm_workspace_bytes long */
    size_t workspace_bytes;
    void *stream;           /* a CUstream or cudaStream_t; NULL: the default stream */
} trm_call;

/* "0.1.0" */
TRM_API const char *trm_version(void);

/* "TRM_OK" and so on */
TRM_API const char *trm_status_name(trm_status status);

TRM_API int trm_variant_count(void);

/* The variant with this number, from 0, or NULL. */
TRM_API const trm_variant *trm_variant_at(int index);

/* GPUs the library was built for: 80 for sm_80. From 0; 0 beyond the last. */
TRM_API int trm_arch_at(int index);

/* 1 where the library has the kernels of this variant for this GPU. */
TRM_API int trm_has_variant(const char *name, int arch);

/* Weights from `path` onto GPU number `device`. The names of the tensors are those of the Python module TRM after
 * `prefix` ("" where the file holds a TRM alone); other tensors in the file are left alone. Floating weights of
 * another dtype are cast. max_positions is how many tokens a sequence may have at most. */
TRM_API trm_status trm_create(const char *path, const char *prefix, const char *variant, int device,
                              int64_t max_positions, trm_model **model, trm_error *error);

TRM_API void trm_destroy(trm_model *model);

TRM_API const trm_variant *trm_model_variant(const trm_model *model);

/* Bytes of workspace for a call of these sizes; of its pointers only whether there is a cache or a y matters. */
TRM_API trm_status trm_workspace_bytes(const trm_model *model, const trm_call *call, size_t *bytes,
                                       trm_error *error);

/* Bytes of a cache: the variant's evaluations times keys and values [batch, capacity, key/value heads, head width]
 * of every token, first all keys, then all values. */
TRM_API trm_status trm_cache_bytes(const trm_variant *variant, int64_t batch, int64_t capacity, size_t *bytes,
                                   trm_error *error);

/* Puts the recursion on the stream and returns without waiting for it. With a cache, the keys and values of these
 * tokens are written behind those of `past` tokens. */
TRM_API trm_status trm_forward(const trm_model *model, const trm_call *call, trm_error *error);

/* The same for a call with a cache, which it insists on: one token a sequence, or several. */
TRM_API trm_status trm_decode(const trm_model *model, const trm_call *call, trm_error *error);

/* What a call would start on a GPU, without one: a line for each launch or copy, in order, to `write`. Of the
 * pointers in `call` only whether there is a cache or a y matters. */
TRM_API trm_status trm_list_launches(const char *variant, int arch, const trm_call *call,
                                     void (*write)(void *user, const char *line), void *user, trm_error *error);

#ifdef __cplusplus
}
#endif
#endif
