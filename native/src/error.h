/* How a function says what went wrong. */
#ifndef TRM_ERROR_H
#define TRM_ERROR_H

#include "trm_kernels.h"

/* Fills `error`, where there is one, and returns `status`. */
__attribute__((format(printf, 3, 4))) trm_status trm_fail(trm_error *error, trm_status status,
                                                          const char *format, ...);

#endif
