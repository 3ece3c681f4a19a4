/* Plans as trm_kernels/export/native.py generates them from launch_plan.py beside it, which explains everything here. */
#ifndef TRM_PLAN_H
#define TRM_PLAN_H

#include "trm_kernels.h"

/* The sizes of a call, by number; a set of them is a mask of bits. */
enum { TRM_B, TRM_T, TRM_P, TRM_S, TRM_C, TRM_NUM_SIZES };

typedef struct trm_sizes {
    int64_t of[TRM_NUM_SIZES];
} trm_sizes;

/* constant * product of sizes * ceil(times * product of sizes / block) */
typedef struct trm_term {
    int64_t constant;
    int32_t times, block;
    uint8_t of, blocks_of;
} trm_term;

typedef enum trm_role {
    TRM_ROLE_X,
    TRM_ROLE_Y,
    TRM_ROLE_Z,
    TRM_ROLE_Y_OUT,
    TRM_ROLE_Z_OUT,
    TRM_ROLE_COS,
    TRM_ROLE_SIN,
    TRM_ROLE_WEIGHT,
    TRM_ROLE_KEYS,
    TRM_ROLE_VALUES,
    TRM_ROLE_WORK
} trm_role;

typedef enum trm_kind { TRM_POINTER, TRM_I32, TRM_I64, TRM_F32 } trm_kind;

/* An address (role, index and a term for the offset in bytes), a term, or a number. */
typedef struct trm_argument {
    uint8_t kind, role;
    uint16_t index, term;
    float number;
} trm_argument;

#define TRM_COPY 0xFFFF

/* A kernel, or a copy whose arguments are in the order of trm_copy_argument. */
typedef struct trm_step {
    uint16_t kernel;
    uint16_t num_arguments;
    uint32_t first_argument;
    uint16_t grid[3]; /* terms */
} trm_step;

enum trm_copy_argument {
    TRM_COPY_TARGET,
    TRM_COPY_SOURCE,
    TRM_COPY_WIDTH,
    TRM_COPY_HEIGHT,
    TRM_COPY_DEPTH,
    TRM_COPY_TARGET_PITCH,
    TRM_COPY_SOURCE_PITCH,
    TRM_COPY_TARGET_HEIGHT,
    TRM_COPY_SOURCE_HEIGHT,
    TRM_COPY_ARGUMENTS
};

#define TRM_MAX_ARGUMENTS 48

/* Of a call with up to max_rows rows, batch times tokens; those of one call follow each other by it. */
typedef struct trm_plan {
    const char *call;
    int64_t max_rows;
    const trm_step *steps;
    const uint16_t *work; /* a term for the bytes of each work buffer */
    uint32_t num_steps, num_work;
} trm_plan;

typedef struct trm_kernel {
    const char *name;
    const uint64_t *cubin;
    uint32_t threads, shared;
} trm_kernel;

typedef struct trm_weight {
    const char *name;
    int64_t rows, columns; /* columns 0: a vector */
} trm_weight;

/* A variant for one GPU. */
typedef struct trm_program {
    const trm_variant *variant;
    int arch;
    int64_t decode_keys; /* up to so many keys, one token is decoded by the call "decode" */
    const trm_kernel *kernels; /* of this GPU, for all variants */
    const trm_term *terms;
    const trm_argument *arguments;
    const trm_plan *plans;
    uint32_t num_plans;
    const trm_weight *weights;
    uint32_t num_weights;
    const uint16_t *uses; /* the kernels this program uses */
    uint32_t num_uses;
} trm_program;

/* Generated. */
extern const trm_variant *const trm_variants[];
extern const int trm_num_variants;
extern const int trm_archs[];
extern const int trm_num_archs;
extern const trm_program *const trm_programs[];
extern const int trm_num_programs;

/* A kernel or a copy with numbers in place of terms; what an address is counted from is left to the caller. */
typedef struct trm_started {
    const trm_kernel *kernel; /* NULL: a copy */
    const trm_argument *arguments;
    int64_t values[TRM_MAX_ARGUMENTS]; /* offsets and numbers; nothing for a float */
    int64_t grid[3];
    uint32_t num_arguments;
} trm_started;

const trm_variant *trm_find_variant(const char *name);

const trm_program *trm_find_program(const char *variant, int arch);

/* Checks the sizes of a call, and finds its plan. */
trm_status trm_choose_plan(const trm_program *program, const trm_call *call, const trm_plan **plan,
                           trm_sizes *sizes, trm_error *error);

/* Step number `index` at these sizes; an error where a number is larger than a kernel takes. */
trm_status trm_start(const trm_program *program, const trm_plan *plan, uint32_t index, const trm_sizes *sizes,
                     trm_started *started, trm_error *error);

/* Bytes of all work buffers; `places`, where wanted, has room for num_work: where each begins. */
trm_status trm_work_bytes(const trm_program *program, const trm_plan *plan, const trm_sizes *sizes,
                          size_t *bytes, size_t *places, trm_error *error);

#endif
