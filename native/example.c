/* Runs the TRM of a saved hybrid on one GPU: tokens in, one more token out of the cache.
 *
 *   trm_example model.safetensors llm_model.model.layers.15.trm.recursion. level1
 *
 * The prefix is what stands before "layers.0.mlp..." in the file; "" for a TRM alone. x is made up here; inside a
 * language model it is rms(h) W_in^T, with h the hidden state after the layer and W_in the tensor in_proj.weight
 * beside the recursion's. */
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "trm_kernels.h"

#define TOKENS 5
#define CAPACITY 64

/* Device memory comes from whoever the application uses; here from the CUDA driver, which trm_create opened. */
typedef struct memory {
    void *driver;
    int (*allocate)(uint64_t *, size_t);
    int (*free)(uint64_t);
    int (*to_device)(uint64_t, const void *, size_t);
    int (*to_host)(void *, uint64_t, size_t);
    int (*retain)(void **, int);
    int (*use)(void *);
} memory;

static void find(memory *m, void *function, const char *name) {
    void *found = dlsym(m->driver, name);
    memcpy(function, &found, sizeof found);
}

/* Uses the context that the library uses too, of GPU 0. */
static int open_memory(memory *m) {
    void *context;
    m->driver = dlopen("libcuda.so.1", RTLD_NOW);
    if (!m->driver) return 0;
    find(m, &m->allocate, "cuMemAlloc_v2");
    find(m, &m->free, "cuMemFree_v2");
    find(m, &m->to_device, "cuMemcpyHtoD_v2");
    find(m, &m->to_host, "cuMemcpyDtoH_v2");
    find(m, &m->retain, "cuDevicePrimaryCtxRetain");
    find(m, &m->use, "cuCtxSetCurrent");
    return m->retain(&context, 0) == 0 && m->use(context) == 0;
}

static void *allocate(memory *m, size_t bytes) {
    uint64_t pointer = 0;
    if (m->allocate(&pointer, bytes)) {
        fprintf(stderr, "no %zu bytes on the GPU\n", bytes);
        exit(1);
    }
    return (void *)(uintptr_t)pointer;
}

static int fail(const trm_error *error) {
    fprintf(stderr, "%s: %s\n", trm_status_name(error->status), error->message);
    return 1;
}

/* One call in a workspace of its own. */
static trm_status run(memory *m, const trm_model *model, trm_call *call, trm_error *error) {
    trm_status status = trm_workspace_bytes(model, call, &call->workspace_bytes, error);
    if (status != TRM_OK) return status;
    call->workspace = allocate(m, call->workspace_bytes);
    status = trm_decode(model, call, error);
    m->free((uint64_t)(uintptr_t)call->workspace); /* waits for the GPU */
    return status;
}

/* The first numbers of a token in bfloat16: the upper half of a float. */
static void print_token(memory *m, const void *y, int64_t token, int64_t width) {
    uint16_t numbers[4];
    const char *from = (const char *)y + 2 * token * width;
    m->to_host(numbers, (uint64_t)(uintptr_t)from, sizeof numbers);
    for (int i = 0; i < 4; i++) {
        uint32_t bits = (uint32_t)numbers[i] << 16;
        float number;
        memcpy(&number, &bits, sizeof number);
        printf(" %9.5f", (double)number);
    }
    printf(" ...\n");
}

static int decode(memory *m, const trm_model *model, trm_error *error) {
    const trm_variant *variant = trm_model_variant(model);
    int64_t width = variant->hidden_size;
    size_t bytes = (size_t)(2 * TOKENS * width), cache_bytes;
    uint16_t *x = malloc(bytes);
    for (int64_t i = 0; x && i < TOKENS * width; i++) x[i] = i % 3 ? 0x3F80 : 0xBF80; /* 1 and -1 */
    if (!x || trm_cache_bytes(variant, 1, CAPACITY, &cache_bytes, error) != TRM_OK) return fail(error);
    trm_call call = {.batch = 1, .tokens = TOKENS, .capacity = CAPACITY};
    void *x_there = allocate(m, bytes);
    call.x = x_there;
    call.y_out = allocate(m, bytes);
    call.z_out = allocate(m, bytes);
    call.cache = allocate(m, cache_bytes);
    m->to_device((uint64_t)(uintptr_t)x_there, x, bytes);
    free(x);

    if (run(m, model, &call, error) != TRM_OK) return fail(error);
    for (int64_t token = 0; token < TOKENS; token++) print_token(m, call.y_out, token, width);
    call.past = TOKENS; /* and one token more, which sees those before it through the cache */
    call.tokens = 1;
    if (run(m, model, &call, error) != TRM_OK) return fail(error);
    print_token(m, call.y_out, 0, width);
    return 0;
}

int main(int count, char **arguments) {
    trm_model *model;
    trm_error error;
    memory m;
    if (count != 4) {
        fprintf(stderr, "expected model.safetensors, a prefix and a variant; the variants are\n");
        for (int i = 0; i < trm_variant_count(); i++) fprintf(stderr, "  %s\n", trm_variant_at(i)->name);
        return 2;
    }
    if (trm_create(arguments[1], arguments[2], arguments[3], 0, CAPACITY, &model, &error) != TRM_OK) {
        return fail(&error);
    }
    if (strcmp(trm_model_variant(model)->dtype, "bfloat16") || !open_memory(&m)) {
        fprintf(stderr, "expected a variant in bfloat16, and a CUDA driver\n");
        trm_destroy(model);
        return 1;
    }
    int failed = decode(&m, model, &error);
    trm_destroy(model);
    return failed;
}
