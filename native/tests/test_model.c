/* A model's whole life, on fake_cuda.c: what is allocated is freed, what is launched is what is listed. */
#define _POSIX_C_SOURCE 200809L
#include <dlfcn.h>
#include <inttypes.h>
#include <string.h>
#include <unistd.h>

#include "expect.h"
#include "plan.h"

static char path[] = "trm-model-XXXXXX";
static int *allocations, *fails_after, *depth, *modules, *launches, *copies, *contexts;

static int *counter(void *library, const char *name) {
    int *found = dlsym(library, name);
    expect(found);
    return found;
}

static void find_counters(void) {
    void *library = dlopen("libcuda.so.1", RTLD_NOW);
    expect(library);
    allocations = counter(library, "fake_allocations");
    fails_after = counter(library, "fake_fails_after");
    depth = counter(library, "fake_depth");
    modules = counter(library, "fake_modules");
    launches = counter(library, "fake_launches");
    copies = counter(library, "fake_copies");
    contexts = counter(library, "fake_contexts");
}

static void expect_nothing_left(void) { expect(!*allocations && !*depth && !*modules && !*contexts); }

/* The smallest variant, which makes a small file; one with a cache where that is small too. */
static const trm_program *choose(void) {
    const trm_program *chosen = NULL;
    for (int i = 0; i < trm_num_programs; i++) {
        const trm_variant *v = trm_programs[i]->variant;
        if (!chosen || v->hidden_size < chosen->variant->hidden_size) chosen = trm_programs[i];
        if (v->causal && v->hidden_size == chosen->variant->hidden_size) chosen = trm_programs[i];
    }
    return chosen;
}

/* Zeros for every weight, in float16. */
static void write_weights(const trm_program *program) {
    static char header[1 << 16];
    int64_t end = 0;
    int used = 1;
    header[0] = '{';
    for (uint32_t i = 0; i < program->num_weights; i++) {
        const trm_weight *w = &program->weights[i];
        int64_t begin = end;
        char columns[32] = "";
        if (w->columns) snprintf(columns, sizeof columns, ",%" PRId64, w->columns);
        end += 2 * w->rows * (w->columns ? w->columns : 1);
        used += snprintf(header + used, sizeof header - (size_t)used,
                         "%s\"trm.%s\":{\"dtype\":\"F16\",\"shape\":[%" PRId64 "%s],\"data_offsets\":[%" PRId64
                         ",%" PRId64 "]}",
                         i ? "," : "", w->name, w->rows, columns, begin, end);
    }
    header[used++] = '}';
    uint64_t length = (uint64_t)used; /* these machines are little-endian, as GPUs are */
    FILE *file = fopen(path, "wb");
    expect(file && fwrite(&length, 8, 1, file) == 1 && fwrite(header, (size_t)used, 1, file) == 1);
    expect(!fflush(file) && !ftruncate(fileno(file), 8 + used + end));
    fclose(file);
}

static trm_status create(const trm_program *program, int device, trm_model **model, trm_error *error) {
    return trm_create(path, "trm.", program->variant->name, device, 100, model, error);
}

static void what_fails_leaves_nothing(const trm_program *program) {
    trm_model *model;
    trm_error error;
    expect(create(program, 7, &model, &error) == TRM_ERROR_CUDA && !model);
    expect(strstr(error.message, "something else"));
    for (int i = 0; i < (int)program->num_weights + 2; i++) { /* RoPE's two tables come last */
        *fails_after = i;
        expect(create(program, 0, &model, &error) == TRM_ERROR_MEMORY && !model);
        expect(strstr(error.message, "out of memory"));
        expect_nothing_left();
    }
    *fails_after = -1;
}

static void count_line(void *user, const char *line) {
    int *counts = user;
    counts[strncmp(line, "copy", 4) == 0]++;
}

/* A call on memory of exactly the sizes it may use, watched by the sanitizer. */
static void run(const trm_program *program, const trm_model *model, trm_call call) {
    trm_error error = {TRM_OK, ""};
    int listed[2] = {0, 0}, before[2] = {*launches, *copies};
    size_t x_bytes = 4 * (size_t)(call.batch * call.tokens * program->variant->hidden_size);
    call.x = malloc(x_bytes);
    call.y_out = malloc(x_bytes);
    call.z_out = malloc(x_bytes);
    expect(trm_workspace_bytes(model, &call, &call.workspace_bytes, &error) == TRM_OK);
    call.workspace = malloc(call.workspace_bytes);
    memset(call.workspace, 0, call.workspace_bytes);
    trm_status status = call.cache ? trm_decode(model, &call, &error) : trm_forward(model, &call, &error);
    if (status != TRM_OK) fprintf(stderr, "%s\n", error.message);
    expect(status == TRM_OK);
    const char *name = program->variant->name;
    expect(trm_list_launches(name, program->arch, &call, count_line, listed, &error) == TRM_OK);
    expect(*launches - before[0] == listed[0] && *copies - before[1] == listed[1]);
    free((void *)call.x);
    free(call.y_out);
    free(call.z_out);
    free(call.workspace);
}

static void refuse(const trm_model *model, trm_call call, const char *why) {
    trm_error error = {TRM_OK, ""};
    expect(trm_forward(model, &call, &error) == TRM_ERROR_ARGUMENT);
    expect(strstr(error.message, why));
}

static void calls_are_checked(const trm_model *model) {
    static _Alignas(16) char there[32];
    trm_call call = {.batch = 1, .tokens = 5, .x = there, .y_out = there, .z_out = there, .workspace = there};
    trm_call other = call;
    refuse(model, call, "workspace of at least");
    other.x = NULL;
    refuse(model, other, "got NULL");
    other.x = there + 8;
    refuse(model, other, "multiple of 16");
    call.tokens = 101;
    refuse(model, call, "100 positions");
}

static void decode(const trm_program *program, const trm_model *model) {
    const trm_variant *v = program->variant;
    size_t bytes;
    expect(trm_cache_bytes(v, 3, 40, &bytes, NULL) == TRM_OK);
    void *cache = malloc(bytes);
    trm_call call = {.batch = 3, .tokens = 36, .cache = cache, .capacity = 40};
    run(program, model, call);
    for (call.past = 36, call.tokens = 1; call.past < 40; call.past++) run(program, model, call);
    free(cache);
}

int main(void) {
    const trm_program *program = choose();
    trm_model *model;
    trm_error error;
    char arch[16];
    snprintf(arch, sizeof arch, "%d", program->arch);
    setenv("FAKE_ARCH", arch, 1);
    int file = mkstemp(path);
    expect(file >= 0);
    close(file);
    find_counters();
    write_weights(program);
    what_fails_leaves_nothing(program);
    expect(create(program, 0, &model, &error) == TRM_OK);
    expect(trm_model_variant(model) == program->variant);
    expect(*allocations == (int)program->num_weights + 2 && *modules == (int)program->num_uses);
    calls_are_checked(model);
    run(program, model, (trm_call){.batch = 2, .tokens = 37});
    if (program->variant->causal) decode(program, model);
    trm_destroy(model);
    expect_nothing_left();
    setenv("FAKE_ARCH", "300", 1);
    expect(create(program, 0, &model, &error) == TRM_ERROR_VARIANT);
    expect_nothing_left();
    unlink(path);
    return 0;
}
