/* What the library says without a GPU: what it holds, and why it refuses. Its arguments are the GPUs it was built
 * for. */
#include <string.h>

#include "expect.h"
#include "trm_kernels.h"

static void every_variant_is_there_for_every_gpu(int count, char **archs) {
    for (int n = 0; n < count; n++) {
        expect(trm_arch_at(n) == atoi(archs[n]));
        for (int i = 0; i < trm_variant_count(); i++) {
            expect(trm_has_variant(trm_variant_at(i)->name, atoi(archs[n])));
        }
    }
    expect(count > 0 && trm_variant_count() > 0);
    expect(trm_arch_at(count) == 0 && trm_arch_at(-1) == 0);
    expect(!trm_variant_at(-1) && !trm_variant_at(trm_variant_count()));
    expect(!trm_has_variant("nobody", trm_arch_at(0)) && !trm_has_variant(NULL, 90));
    expect(!trm_has_variant(trm_variant_at(0)->name, 12));
}

static void count_line(void *user, const char *line) {
    expect(strlen(line) > 0);
    ++*(int *)user;
}

static int launches(const trm_variant *variant, const trm_call *call) {
    int count = 0;
    trm_error error;
    trm_status status = trm_list_launches(variant->name, trm_arch_at(0), call, count_line, &count, &error);
    if (status != TRM_OK) fprintf(stderr, "%s\n", error.message);
    expect(status == TRM_OK);
    return count;
}

static void every_call_has_a_plan(void) {
    static char somewhere[1];
    for (int i = 0; i < trm_variant_count(); i++) {
        const trm_variant *variant = trm_variant_at(i);
        trm_call call = {.batch = 2, .tokens = 33};
        int forward = launches(variant, &call);
        expect(forward >= 5 * variant->evaluations);
        call.y = call.z = somewhere;
        expect(launches(variant, &call) == forward);
        if (!variant->causal) continue;
        trm_call cached = {.batch = 2, .tokens = 33, .cache = somewhere, .past = 5, .capacity = 5000};
        expect(launches(variant, &cached) > forward);
        cached.tokens = 1;
        int decode = launches(variant, &cached);
        cached.past = 4000;
        expect(launches(variant, &cached) == decode + variant->evaluations); /* the parts are merged */
    }
}

static trm_status refused(trm_call call, const char *why) {
    trm_error error = {TRM_OK, ""};
    int count = 0;
    const char *name = trm_variant_at(0)->name;
    trm_status status = trm_list_launches(name, trm_arch_at(0), &call, count_line, &count, &error);
    expect(status == error.status);
    expect(strstr(error.message, why));
    return status;
}

static void calls_that_cannot_be_are_refused(void) {
    static char somewhere[1];
    const char *within = "within the capacity", *both = "both or neither";
    expect(refused((trm_call){.batch = 0, .tokens = 1}, "at least 1") == TRM_ERROR_ARGUMENT);
    expect(refused((trm_call){.batch = 1, .tokens = -1}, "at least 1") == TRM_ERROR_ARGUMENT);
    expect(refused((trm_call){.batch = 1, .tokens = INT64_MAX}, "at most") == TRM_ERROR_ARGUMENT);
    expect(refused((trm_call){.batch = 1, .tokens = 1, .past = -1}, within) == TRM_ERROR_ARGUMENT);
    expect(refused((trm_call){.batch = 1, .tokens = 1, .past = 1}, "a cache") == TRM_ERROR_ARGUMENT);
    expect(refused((trm_call){.batch = 1, .tokens = 1, .y = somewhere}, both) == TRM_ERROR_ARGUMENT);
    expect(refused((trm_call){.batch = 1 << 30, .tokens = 1 << 30}, "fewer tokens") == TRM_ERROR_ARGUMENT);
    trm_call full = {.batch = 1, .tokens = 2, .cache = somewhere, .past = 7, .capacity = 8};
    expect(refused(full, within) == TRM_ERROR_ARGUMENT);
}

static void a_cache_has_a_size(void) {
    size_t bytes = 0;
    trm_error error;
    expect(trm_cache_bytes(NULL, 1, 1, &bytes, &error) == TRM_ERROR_ARGUMENT);
    for (int i = 0; i < trm_variant_count(); i++) {
        const trm_variant *v = trm_variant_at(i);
        trm_status status = trm_cache_bytes(v, 3, 10, &bytes, &error);
        expect(status == (v->causal ? TRM_OK : TRM_ERROR_VARIANT));
        size_t element = strcmp(v->dtype, "float32") ? 2 : 4;
        size_t token = (size_t)(v->hidden_size / v->num_heads * v->num_key_value_heads) * element;
        expect(!v->causal || bytes == 2 * (size_t)v->evaluations * 30 * token);
        expect(trm_cache_bytes(v, INT64_MAX, 10, &bytes, NULL) != TRM_OK);
    }
}

static void models_that_cannot_be_are_refused(void) {
    trm_model *model = NULL;
    trm_error error;
    const char *name = trm_variant_at(0)->name;
    expect(trm_create(NULL, "", name, 0, 1, &model, &error) == TRM_ERROR_ARGUMENT);
    expect(trm_create("x", "", name, 0, 0, &model, &error) == TRM_ERROR_ARGUMENT);
    expect(trm_create("x", "", "nobody", 0, 1, &model, &error) == TRM_ERROR_VARIANT);
    expect(trm_create("/nowhere/x", "", name, 0, 1, &model, &error) == TRM_ERROR_FILE);
    expect(strstr(error.message, "/nowhere/x"));
    expect(!model);
    size_t bytes;
    trm_call call = {.batch = 1, .tokens = 1};
    expect(trm_workspace_bytes(NULL, &call, &bytes, &error) == TRM_ERROR_ARGUMENT);
    expect(trm_forward(NULL, &call, &error) == TRM_ERROR_ARGUMENT);
    expect(trm_decode(NULL, &call, NULL) == TRM_ERROR_ARGUMENT);
    trm_destroy(NULL);
}

int main(int count, char **arguments) {
    expect(strlen(trm_version()) >= 5);
    expect(!strcmp(trm_status_name(TRM_ERROR_FILE), "TRM_ERROR_FILE"));
    every_variant_is_there_for_every_gpu(count - 1, arguments + 1);
    every_call_has_a_plan();
    calls_that_cannot_be_are_refused();
    a_cache_has_a_size();
    models_that_cannot_be_are_refused();
    return 0;
}
