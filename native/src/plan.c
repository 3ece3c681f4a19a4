#include "plan.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "error.h"

#define MAX_TOKENS (1 << 30) /* of any size of a call: beyond every GPU's memory */

const trm_variant *trm_find_variant(const char *name) {
    for (int i = 0; name && i < trm_num_variants; i++) {
        if (!strcmp(trm_variants[i]->name, name)) return trm_variants[i];
    }
    return NULL;
}

const trm_program *trm_find_program(const char *variant, int arch) {
    for (int i = 0; variant && i < trm_num_programs; i++) {
        const trm_program *program = trm_programs[i];
        if (program->arch == arch && !strcmp(program->variant->name, variant)) return program;
    }
    return NULL;
}

/* Returns 0 where the value does not fit into 64 bits. */
static int evaluate(const trm_term *term, const trm_sizes *sizes, int64_t *value) {
    int64_t blocks = term->times;
    *value = term->constant;
    for (int i = 0; i < TRM_NUM_SIZES; i++) {
        if (term->of >> i & 1 && __builtin_mul_overflow(*value, sizes->of[i], value)) return 0;
        if (term->blocks_of >> i & 1 && __builtin_mul_overflow(blocks, sizes->of[i], &blocks)) return 0;
    }
    if (!term->blocks_of) return 1;
    blocks = blocks / term->block + (blocks % term->block != 0);
    return !__builtin_mul_overflow(*value, blocks, value);
}

static trm_status too_large(trm_error *error) {
    return trm_fail(error, TRM_ERROR_ARGUMENT, "trm: expected fewer tokens, got more than the kernels can count");
}

static trm_status check_sizes(const trm_call *call, trm_error *error) {
    int64_t capacity = call->cache ? call->capacity : call->past + call->tokens;
    if (call->batch < 1 || call->tokens < 1 || call->batch > MAX_TOKENS || call->tokens > MAX_TOKENS) {
        return trm_fail(error, TRM_ERROR_ARGUMENT,
                        "trm: expected batch and tokens of at least 1 (and at most %d), got %" PRId64 " and %" PRId64,
                        MAX_TOKENS, call->batch, call->tokens);
    }
    if (call->past < 0 || call->past > MAX_TOKENS || capacity > MAX_TOKENS || call->past + call->tokens > capacity) {
        return trm_fail(error, TRM_ERROR_ARGUMENT,
                        "trm: expected past + tokens within the capacity, got %" PRId64 " + %" PRId64 " and %" PRId64,
                        call->past, call->tokens, capacity);
    }
    if (!call->cache && call->past) {
        return trm_fail(error, TRM_ERROR_ARGUMENT, "trm: expected a cache where past is not 0, got NULL");
    }
    if (!call->y != !call->z || (call->y && call->cache)) {
        return trm_fail(error, TRM_ERROR_ARGUMENT,
                        "trm: expected y and z both or neither, and neither with a cache, got something else");
    }
    return TRM_OK;
}

static const char *name_of_call(const trm_program *program, const trm_call *call) {
    if (!call->cache) return call->y ? "resume" : "forward";
    if (call->tokens > 1) return "extend";
    return call->past + 1 > program->decode_keys ? "decode-long" : "decode";
}

trm_status trm_choose_plan(const trm_program *program, const trm_call *call, const trm_plan **plan,
                           trm_sizes *sizes, trm_error *error) {
    trm_status status = check_sizes(call, error);
    if (status != TRM_OK) return status;
    int64_t all = call->past + call->tokens;
    *sizes = (trm_sizes){{call->batch, call->tokens, call->past, all, call->cache ? call->capacity : all}};
    const char *name = name_of_call(program, call);
    for (uint32_t i = 0; i < program->num_plans; i++) {
        *plan = &program->plans[i];
        if (!strcmp((*plan)->call, name) && call->batch * call->tokens <= (*plan)->max_rows) return TRM_OK;
    }
    return trm_fail(error, TRM_ERROR_VARIANT, "trm: the variant %s is not causal and has no cache",
                    program->variant->name);
}

static int fits(const trm_argument *argument, int64_t value) {
    return argument->kind != TRM_I32 || value <= INT32_MAX;
}

trm_status trm_start(const trm_program *program, const trm_plan *plan, uint32_t index, const trm_sizes *sizes,
                     trm_started *started, trm_error *error) {
    static const int64_t limits[3] = {INT32_MAX, UINT16_MAX, UINT16_MAX};
    const trm_step *step = &plan->steps[index];
    started->kernel = step->kernel == TRM_COPY ? NULL : &program->kernels[step->kernel];
    started->arguments = &program->arguments[step->first_argument];
    started->num_arguments = step->num_arguments;
    for (uint32_t i = 0; i < step->num_arguments; i++) {
        const trm_argument *argument = &started->arguments[i];
        int64_t *value = &started->values[i];
        *value = 0;
        if (argument->kind == TRM_F32) continue;
        if (!evaluate(&program->terms[argument->term], sizes, value) || !fits(argument, *value)) {
            return too_large(error);
        }
    }
    for (int i = 0; i < 3; i++) {
        int64_t *programs = &started->grid[i];
        if (!evaluate(&program->terms[step->grid[i]], sizes, programs) || *programs > limits[i]) {
            return too_large(error);
        }
    }
    return TRM_OK;
}

trm_status trm_work_bytes(const trm_program *program, const trm_plan *plan, const trm_sizes *sizes,
                          size_t *bytes, size_t *places, trm_error *error) {
    int64_t total = 0;
    for (uint32_t i = 0; i < plan->num_work; i++) {
        int64_t size;
        if (places) places[i] = (size_t)total;
        if (!evaluate(&program->terms[plan->work[i]], sizes, &size) || size > INT64_MAX - 255 ||
            __builtin_add_overflow(total, (size + 255) / 256 * 256, &total)) {
            return too_large(error);
        }
    }
    *bytes = (size_t)total;
    return TRM_OK;
}
