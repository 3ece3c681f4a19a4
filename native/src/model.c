/* A model on a GPU: made from a file, called, given back. */
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "convert.h"
#include "driver.h"
#include "error.h"
#include "plan.h"
#include "safetensors.h"

#define MAX_NAME 512

struct trm_model {
    trm_driver driver;
    CUdevice device;
    CUcontext context; /* the device's own, which the CUDA runtime uses too */
    const trm_program *program;
    int64_t max_positions;
    CUmodule *modules; /* one for each kernel of this GPU; those the program does not use are NULL */
    CUfunction *functions;
    CUdeviceptr *weights;
    CUdeviceptr cos, sin; /* [max_positions, head width / 2] float32 */
};

static trm_status check(const trm_model *model, CUresult result, const char *did, trm_error *error) {
    return trm_driver_check(&model->driver, result, did, error);
}

static void leave(const trm_model *model) {
    CUcontext ours;
    model->driver.context_pop(&ours);
}

static trm_status upload(const trm_model *model, const void *bytes, size_t count, CUdeviceptr *to,
                         trm_error *error) {
    trm_status status = check(model, model->driver.memory_allocate(to, count), "allocate memory", error);
    if (status != TRM_OK) {
        *to = 0;
        return status;
    }
    return check(model, model->driver.copy_to_device(*to, bytes, count), "copy weights to the GPU", error);
}

/* The tensor of a weight in the file, which has to have its shape. */
static trm_status find_weight(const trm_safetensors *file, const char *prefix, const trm_weight *weight,
                              const trm_tensor **found, trm_error *error) {
    char name[MAX_NAME];
    if ((size_t)snprintf(name, sizeof name, "%s%s", prefix, weight->name) >= sizeof name) {
        return trm_fail(error, TRM_ERROR_ARGUMENT, "trm_create: expected a prefix of fewer than %d characters",
                        MAX_NAME - 64);
    }
    const trm_tensor *tensor = *found = trm_safetensors_find(file, name);
    if (!tensor) return trm_fail(error, TRM_ERROR_WEIGHTS, "trm_create: no tensor %.180s in the file", name);
    int fits = weight->columns ? tensor->num_dimensions == 2 && tensor->shape[1] == (uint64_t)weight->columns
                               : tensor->num_dimensions == 1;
    if (!fits || tensor->shape[0] != (uint64_t)weight->rows) {
        return trm_fail(error, TRM_ERROR_WEIGHTS,
                        "trm_create: expected %.120s of shape [%" PRId64 ", %" PRId64 "], got another", name,
                        weight->rows, weight->columns);
    }
    if (trm_dtype_named(tensor->dtype) == TRM_NO_DTYPE) {
        return trm_fail(error, TRM_ERROR_WEIGHTS, "trm_create: expected %.120s in F32, F16 or BF16, got %s", name,
                        tensor->dtype);
    }
    return TRM_OK;
}

/* One weight, read, cast and copied; the two buffers hold any of them. */
static trm_status load_weight(trm_model *model, const trm_safetensors *file, const char *prefix, uint32_t index,
                              void *read, void *cast, trm_error *error) {
    const trm_weight *weight = &model->program->weights[index];
    const trm_tensor *tensor;
    trm_dtype dtype = trm_dtype_named(model->program->variant->dtype);
    size_t count = (size_t)(weight->rows * (weight->columns ? weight->columns : 1));
    trm_status status = find_weight(file, prefix, weight, &tensor, error);
    if (status == TRM_OK) status = trm_safetensors_read(file, tensor, read, error);
    if (status != TRM_OK) return status;
    trm_convert(cast, dtype, read, trm_dtype_named(tensor->dtype), count);
    return upload(model, cast, count * trm_dtype_size(dtype), &model->weights[index], error);
}

static size_t largest_weight(const trm_program *program) {
    int64_t largest = 1;
    for (uint32_t i = 0; i < program->num_weights; i++) {
        const trm_weight *weight = &program->weights[i];
        int64_t count = weight->rows * (weight->columns ? weight->columns : 1);
        if (count > largest) largest = count;
    }
    return (size_t)largest;
}

static trm_status load_weights(trm_model *model, const trm_safetensors *file, const char *prefix,
                               trm_error *error) {
    size_t room = 4 * largest_weight(model->program);
    void *read = malloc(room), *cast = malloc(room);
    trm_status status = TRM_OK;
    if (!read || !cast) status = trm_fail(error, TRM_ERROR_MEMORY, "trm_create: no memory to read weights into");
    for (uint32_t i = 0; status == TRM_OK && i < model->program->num_weights; i++) {
        status = load_weight(model, file, prefix, i, read, cast, error);
    }
    free(read);
    free(cast);
    return status;
}

/* RoPE's table, as rope_angles in trm_kernels/ops/attention/rope.py makes it: float32 angles. */
static trm_status load_angles(trm_model *model, trm_error *error) {
    const trm_variant *variant = model->program->variant;
    int64_t half = variant->hidden_size / variant->num_heads / 2;
    size_t count = (size_t)(model->max_positions * half);
    float *cosines = malloc(count * sizeof *cosines), *sines = malloc(count * sizeof *sines);
    trm_status status = TRM_OK;
    if (!cosines || !sines) status = trm_fail(error, TRM_ERROR_MEMORY, "trm_create: no memory for RoPE's table");
    for (int64_t j = 0; status == TRM_OK && j < half; j++) {
        float exponent = (float)(2 * j) / (float)(2 * half);
        float frequency = (float)pow(variant->rope_theta, -(double)exponent);
        for (int64_t p = 0; p < model->max_positions; p++) {
            float angle = (float)p * frequency;
            cosines[p * half + j] = (float)cos(angle);
            sines[p * half + j] = (float)sin(angle);
        }
    }
    if (status == TRM_OK) status = upload(model, cosines, count * sizeof *cosines, &model->cos, error);
    if (status == TRM_OK) status = upload(model, sines, count * sizeof *sines, &model->sin, error);
    free(cosines);
    free(sines);
    return status;
}

static trm_status load_kernel(trm_model *model, uint16_t index, trm_error *error) {
    const trm_driver *driver = &model->driver;
    const trm_kernel *kernel = &model->program->kernels[index];
    CUmodule *module = &model->modules[index];
    CUfunction *function = &model->functions[index];
    trm_status status = check(model, driver->module_load(module, kernel->cubin), "load a kernel", error);
    if (status != TRM_OK) {
        *module = NULL;
        return status;
    }
    status = check(model, driver->module_get_function(function, *module, kernel->name), "find a kernel", error);
    if (status != TRM_OK || kernel->shared <= 48 << 10) return status;
    CUresult result = driver->function_set_attribute(
        *function, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, (int)kernel->shared);
    return check(model, result, "reserve shared memory", error);
}

static uint32_t count_kernels(const trm_program *program) {
    uint32_t count = 0;
    for (uint32_t i = 0; i < program->num_uses; i++) {
        if (program->uses[i] >= count) count = program->uses[i] + 1u;
    }
    return count;
}

static trm_status load(trm_model *model, const trm_safetensors *file, const char *prefix, trm_error *error) {
    const trm_program *program = model->program;
    uint32_t kernels = count_kernels(program);
    model->modules = calloc(kernels, sizeof *model->modules);
    model->functions = calloc(kernels, sizeof *model->functions);
    model->weights = calloc(program->num_weights, sizeof *model->weights);
    if (!model->modules || !model->functions || !model->weights) {
        return trm_fail(error, TRM_ERROR_MEMORY, "trm_create: no memory for the model");
    }
    trm_status status = TRM_OK;
    for (uint32_t i = 0; status == TRM_OK && i < program->num_uses; i++) {
        status = load_kernel(model, program->uses[i], error);
    }
    if (status == TRM_OK) status = load_weights(model, file, prefix, error);
    return status == TRM_OK ? load_angles(model, error) : status;
}

/* The program for the device. A cubin runs on later GPUs of the same generation: sm_80's on sm_86. */
static trm_status find_program(trm_model *model, const char *variant, trm_error *error) {
    int major = 0, minor = 0;
    const trm_driver *driver = &model->driver;
    CUresult result =
        driver->device_get_attribute(&major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, model->device);
    if (result == CUDA_SUCCESS) {
        result = driver->device_get_attribute(&minor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, model->device);
    }
    trm_status status = check(model, result, "ask the GPU for its generation", error);
    for (int older = minor; status == TRM_OK && older >= 0 && !model->program; older--) {
        model->program = trm_find_program(variant, 10 * major + older);
    }
    if (status == TRM_OK && !model->program) {
        return trm_fail(error, TRM_ERROR_VARIANT, "trm_create: no variant %s for sm_%d%d in this library", variant,
                        major, minor);
    }
    return status;
}

static trm_status open_device(trm_model *model, int device, const char *variant, trm_error *error) {
    trm_status status = trm_driver_open(&model->driver, error);
    if (status != TRM_OK) return status;
    status = check(model, model->driver.device_get(&model->device, device), "find that device", error);
    if (status == TRM_OK) status = find_program(model, variant, error);
    if (status != TRM_OK) return status;
    CUcontext context;
    status = check(model, model->driver.primary_context_retain(&context, model->device), "use the GPU", error);
    if (status == TRM_OK) model->context = context;
    return status;
}

static trm_status make(trm_model *model, const trm_safetensors *file, const char *prefix, const char *variant,
                       int device, trm_error *error) {
    trm_status status = open_device(model, device, variant, error);
    if (status == TRM_OK) {
        status = check(model, model->driver.context_push(model->context), "use the GPU", error);
    }
    if (status != TRM_OK) return status;
    status = load(model, file, prefix, error);
    leave(model);
    return status;
}

/* Everything that can be said about the arguments without a GPU. */
static trm_status check_file(const trm_safetensors *file, const char *prefix, const char *variant,
                             trm_error *error) {
    const trm_program *program = NULL;
    for (int i = 0; i < trm_num_archs && !program; i++) program = trm_find_program(variant, trm_archs[i]);
    const trm_tensor *tensor;
    trm_status status = TRM_OK;
    for (uint32_t i = 0; program && status == TRM_OK && i < program->num_weights; i++) {
        status = find_weight(file, prefix, &program->weights[i], &tensor, error);
    }
    return status;
}

trm_status trm_create(const char *path, const char *prefix, const char *variant, int device,
                      int64_t max_positions, trm_model **model, trm_error *error) {
    trm_safetensors file;
    if (!path || !prefix || !variant || !model || max_positions < 1 || max_positions > 1 << 26) {
        return trm_fail(error, TRM_ERROR_ARGUMENT,
                        "trm_create: expected a path, a prefix, a variant, 1 to 2^26 positions and where to put "
                        "the model");
    }
    *model = NULL;
    if (!trm_find_variant(variant)) {
        return trm_fail(error, TRM_ERROR_VARIANT, "trm_create: no variant %.100s in this library", variant);
    }
    trm_status status = trm_safetensors_open(&file, path, error);
    if (status != TRM_OK) return status;
    trm_model *made = calloc(1, sizeof *made);
    if (!made) status = trm_fail(error, TRM_ERROR_MEMORY, "trm_create: no memory for the model");
    if (status == TRM_OK) status = check_file(&file, prefix, variant, error);
    if (status == TRM_OK) {
        made->max_positions = max_positions;
        status = make(made, &file, prefix, variant, device, error);
    }
    trm_safetensors_close(&file);
    if (status == TRM_OK) {
        *model = made;
    } else {
        trm_destroy(made);
    }
    return status;
}

static void free_device_memory(trm_model *model) {
    const trm_driver *driver = &model->driver;
    for (uint32_t i = 0; model->weights && i < model->program->num_weights; i++) {
        if (model->weights[i]) driver->memory_free(model->weights[i]);
    }
    if (model->cos) driver->memory_free(model->cos);
    if (model->sin) driver->memory_free(model->sin);
    for (uint32_t i = 0; model->modules && i < count_kernels(model->program); i++) {
        if (model->modules[i]) driver->module_unload(model->modules[i]);
    }
}

void trm_destroy(trm_model *model) {
    if (!model) return;
    if (model->context) {
        if (model->driver.context_push(model->context) == CUDA_SUCCESS) {
            free_device_memory(model);
            leave(model);
        }
        model->driver.primary_context_release(model->device);
    }
    trm_driver_close(&model->driver);
    free(model->modules);
    free(model->functions);
    free(model->weights);
    free(model);
}

const trm_variant *trm_model_variant(const trm_model *model) { return model ? model->program->variant : NULL; }

trm_status trm_workspace_bytes(const trm_model *model, const trm_call *call, size_t *bytes, trm_error *error) {
    const trm_plan *plan;
    trm_sizes sizes;
    if (!model || !call || !bytes) {
        return trm_fail(error, TRM_ERROR_ARGUMENT, "trm_workspace_bytes: expected a model and a call, got NULL");
    }
    trm_status status = trm_choose_plan(model->program, call, &plan, &sizes, error);
    return status == TRM_OK ? trm_work_bytes(model->program, plan, &sizes, bytes, NULL, error) : status;
}

/* Where the buffers of a call are. */
typedef struct bases {
    const trm_model *model;
    const trm_call *call;
    const size_t *work; /* where each work buffer begins in the workspace */
    size_t slab;        /* bytes of the keys, or of the values, of one evaluation */
} bases;

static CUdeviceptr place(const void *pointer) { return (CUdeviceptr)(uintptr_t)pointer; }

static CUdeviceptr base(const bases *b, const trm_argument *argument) {
    const trm_call *call = b->call;
    size_t index = argument->index;
    switch ((trm_role)argument->role) {
    case TRM_ROLE_X: return place(call->x);
    case TRM_ROLE_Y: return place(call->y);
    case TRM_ROLE_Z: return place(call->z);
    case TRM_ROLE_Y_OUT: return place(call->y_out);
    case TRM_ROLE_Z_OUT: return place(call->z_out);
    case TRM_ROLE_COS: return b->model->cos;
    case TRM_ROLE_SIN: return b->model->sin;
    case TRM_ROLE_WEIGHT: return b->model->weights[index];
    case TRM_ROLE_KEYS: return place(call->cache) + index * b->slab;
    case TRM_ROLE_VALUES: {
        size_t keys = (size_t)b->model->program->variant->evaluations * b->slab;
        return place(call->cache) + keys + index * b->slab;
    }
    case TRM_ROLE_WORK: return place(call->workspace) + b->work[index];
    }
    return 0;
}

static CUresult copy(const bases *b, const trm_started *s) {
    CUDA_MEMCPY3D how = {
        .srcMemoryType = CU_MEMORYTYPE_DEVICE,
        .dstMemoryType = CU_MEMORYTYPE_DEVICE,
        .dstDevice = base(b, &s->arguments[TRM_COPY_TARGET]) + (size_t)s->values[TRM_COPY_TARGET],
        .srcDevice = base(b, &s->arguments[TRM_COPY_SOURCE]) + (size_t)s->values[TRM_COPY_SOURCE],
        .WidthInBytes = (size_t)s->values[TRM_COPY_WIDTH],
        .Height = (size_t)s->values[TRM_COPY_HEIGHT],
        .Depth = (size_t)s->values[TRM_COPY_DEPTH],
        .dstPitch = (size_t)s->values[TRM_COPY_TARGET_PITCH],
        .srcPitch = (size_t)s->values[TRM_COPY_SOURCE_PITCH],
        .dstHeight = (size_t)s->values[TRM_COPY_TARGET_HEIGHT],
        .srcHeight = (size_t)s->values[TRM_COPY_SOURCE_HEIGHT],
    };
    return b->model->driver.copy_3d_async(&how, b->call->stream);
}

/* One argument as its bytes lie in memory: the driver reads as many as the kernel declared. */
typedef union slot {
    CUdeviceptr pointer;
    int64_t wide;
    int32_t narrow;
    float number;
} slot;

static void fill(slot *to, const bases *b, const trm_argument *argument, int64_t value) {
    switch ((trm_kind)argument->kind) {
    case TRM_POINTER: to->pointer = base(b, argument) + (CUdeviceptr)value; break;
    case TRM_I32: to->narrow = (int32_t)value; break;
    case TRM_I64: to->wide = value; break;
    case TRM_F32: to->number = argument->number; break;
    }
}

static CUresult start_kernel(const bases *b, const trm_started *s) {
    slot slots[TRM_MAX_ARGUMENTS + 2] = {{0}};
    void *pointers[TRM_MAX_ARGUMENTS + 2];
    uint32_t count = s->num_arguments;
    for (uint32_t i = 0; i < count; i++) fill(&slots[i], b, &s->arguments[i], s->values[i]);
    for (uint32_t i = 0; i < count + 2; i++) pointers[i] = &slots[i]; /* two NULLs: scratch, which Triton adds */
    const trm_model *model = b->model;
    CUfunction function = model->functions[s->kernel - model->program->kernels];
    return model->driver.launch(function, (unsigned)s->grid[0], (unsigned)s->grid[1], (unsigned)s->grid[2],
                                s->kernel->threads, 1, 1, s->kernel->shared, b->call->stream, pointers, NULL);
}

static trm_status run_plan(const bases *b, const trm_plan *plan, const trm_sizes *sizes, trm_error *error) {
    trm_status status = TRM_OK;
    for (uint32_t i = 0; status == TRM_OK && i < plan->num_steps; i++) {
        trm_started started;
        status = trm_start(b->model->program, plan, i, sizes, &started, error);
        if (status != TRM_OK) break;
        CUresult result = started.kernel ? start_kernel(b, &started) : copy(b, &started);
        status = check(b->model, result, started.kernel ? "start a kernel" : "start a copy", error);
    }
    return status;
}

static trm_status check_pointers(const trm_call *call, int64_t max_positions, size_t needed, trm_error *error) {
    const void *const pointers[] = {call->x, call->y_out, call->z_out, call->workspace, call->y, call->z,
                                    call->cache};
    for (size_t i = 0; i < sizeof pointers / sizeof *pointers; i++) {
        if (!pointers[i] && i < 4) {
            return trm_fail(error, TRM_ERROR_ARGUMENT, "trm: expected x, y_out, z_out and a workspace, got NULL");
        }
        if ((uintptr_t)pointers[i] % 16) {
            return trm_fail(error, TRM_ERROR_ARGUMENT, "trm: expected memory that begins at a multiple of 16 bytes");
        }
    }
    if (call->past + call->tokens > max_positions) {
        return trm_fail(error, TRM_ERROR_ARGUMENT,
                        "trm: expected at most the %" PRId64 " positions the model was made for, got %" PRId64,
                        max_positions, call->past + call->tokens);
    }
    if (call->workspace_bytes < needed) {
        return trm_fail(error, TRM_ERROR_ARGUMENT, "trm: expected a workspace of at least %zu bytes, got %zu",
                        needed, call->workspace_bytes);
    }
    return TRM_OK;
}

trm_status trm_forward(const trm_model *model, const trm_call *call, trm_error *error) {
    const trm_plan *plan;
    trm_sizes sizes;
    size_t needed;
    if (!model || !call) return trm_fail(error, TRM_ERROR_ARGUMENT, "trm_forward: expected a model, got NULL");
    trm_status status = trm_choose_plan(model->program, call, &plan, &sizes, error);
    if (status != TRM_OK) return status;
    size_t *work = malloc((plan->num_work + 1) * sizeof *work);
    if (!work) return trm_fail(error, TRM_ERROR_MEMORY, "trm_forward: no memory");
    status = trm_work_bytes(model->program, plan, &sizes, &needed, work, error);
    if (status == TRM_OK) status = check_pointers(call, model->max_positions, needed, error);
    const trm_variant *variant = model->program->variant;
    int64_t token = variant->hidden_size / variant->num_heads * variant->num_key_value_heads;
    size_t element = trm_dtype_size(trm_dtype_named(variant->dtype));
    bases b = {model, call, work, (size_t)(call->batch * call->capacity * token) * element};
    if (status == TRM_OK) status = check(model, model->driver.context_push(model->context), "use the GPU", error);
    if (status == TRM_OK) {
        status = run_plan(&b, plan, &sizes, error);
        leave(model);
    }
    free(work);
    return status;
}

trm_status trm_decode(const trm_model *model, const trm_call *call, trm_error *error) {
    if (!call || !call->cache) return trm_fail(error, TRM_ERROR_ARGUMENT, "trm_decode: expected a cache, got NULL");
    return trm_forward(model, call, error);
}
