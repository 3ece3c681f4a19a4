/* What can be asked without a GPU: what the library holds, and what it would start. */
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "error.h"
#include "plan.h"

const char *trm_version(void) { return TRM_VERSION; }

int trm_variant_count(void) { return trm_num_variants; }

const trm_variant *trm_variant_at(int index) {
    return index < 0 || index >= trm_num_variants ? NULL : trm_variants[index];
}

int trm_arch_at(int index) { return index < 0 || index >= trm_num_archs ? 0 : trm_archs[index]; }

int trm_has_variant(const char *name, int arch) { return trm_find_program(name, arch) != NULL; }

trm_status trm_cache_bytes(const trm_variant *variant, int64_t batch, int64_t capacity, size_t *bytes,
                           trm_error *error) {
    if (!variant || !bytes || batch < 1 || capacity < 1) {
        return trm_fail(error, TRM_ERROR_ARGUMENT,
                        "trm_cache_bytes: expected a variant, and batch and capacity of at least 1");
    }
    if (!variant->causal) {
        return trm_fail(error, TRM_ERROR_VARIANT, "trm_cache_bytes: the variant %s is not causal and has no cache",
                        variant->name);
    }
    int64_t token = variant->hidden_size / variant->num_heads * variant->num_key_value_heads;
    int64_t all = 2 * variant->evaluations * token * (strcmp(variant->dtype, "float32") ? 2 : 4);
    if (__builtin_mul_overflow(all, batch, &all) || __builtin_mul_overflow(all, capacity, &all)) {
        return trm_fail(error, TRM_ERROR_ARGUMENT, "trm_cache_bytes: the cache would be beyond 64 bits");
    }
    *bytes = (size_t)all;
    return TRM_OK;
}

static int print_argument(char *out, size_t room, const trm_argument *argument, int64_t value) {
    static const char *const roles[] = {"x",   "y",      "z",    "y_out",  "z_out", "cos",
                                        "sin", "weight", "keys", "values", "work"};
    switch (argument->kind) {
    case TRM_POINTER: return snprintf(out, room, " %s%d+%" PRId64, roles[argument->role], argument->index, value);
    case TRM_I32: return snprintf(out, room, " i32:%" PRId64, value);
    case TRM_I64: return snprintf(out, room, " i64:%" PRId64, value);
    default: return snprintf(out, room, " f32:%.9g", (double)argument->number);
    }
}

static void print_step(const trm_started *s, void (*write)(void *, const char *), void *user) {
    char line[2048];
    size_t used = 0;
    if (s->kernel) {
        used = (size_t)snprintf(line, sizeof line, "%s %" PRId64 " %" PRId64 " %" PRId64, s->kernel->name,
                                s->grid[0], s->grid[1], s->grid[2]);
    } else {
        used = (size_t)snprintf(line, sizeof line, "copy");
    }
    for (uint32_t i = 0; i < s->num_arguments && used < sizeof line; i++) {
        used += (size_t)print_argument(line + used, sizeof line - used, &s->arguments[i], s->values[i]);
    }
    write(user, line);
}

trm_status trm_list_launches(const char *variant, int arch, const trm_call *call,
                             void (*write)(void *user, const char *line), void *user, trm_error *error) {
    const trm_plan *plan;
    trm_sizes sizes;
    trm_started started;
    const trm_program *program = trm_find_program(variant, arch);
    if (!call || !write) return trm_fail(error, TRM_ERROR_ARGUMENT, "trm_list_launches: expected a call, got NULL");
    if (!program) {
        return trm_fail(error, TRM_ERROR_VARIANT, "trm_list_launches: no variant %s for sm_%d in this library",
                        variant ? variant : "NULL", arch);
    }
    trm_status status = trm_choose_plan(program, call, &plan, &sizes, error);
    for (uint32_t i = 0; status == TRM_OK && i < plan->num_steps; i++) {
        status = trm_start(program, plan, i, &sizes, &started, error);
        if (status == TRM_OK) print_step(&started, write, user);
    }
    return status;
}
