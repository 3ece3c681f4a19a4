#include "error.h"

#include <stdarg.h>
#include <stdio.h>

trm_status trm_fail(trm_error *error, trm_status status, const char *format, ...) {
    if (error) {
        va_list arguments;
        va_start(arguments, format);
        error->status = status;
        vsnprintf(error->message, sizeof error->message, format, arguments);
        va_end(arguments);
    }
    return status;
}

const char *trm_status_name(trm_status status) {
    switch (status) {
    case TRM_OK: return "TRM_OK";
    case TRM_ERROR_ARGUMENT: return "TRM_ERROR_ARGUMENT";
    case TRM_ERROR_FILE: return "TRM_ERROR_FILE";
    case TRM_ERROR_WEIGHTS: return "TRM_ERROR_WEIGHTS";
    case TRM_ERROR_VARIANT: return "TRM_ERROR_VARIANT";
    case TRM_ERROR_MEMORY: return "TRM_ERROR_MEMORY";
    case TRM_ERROR_DRIVER: return "TRM_ERROR_DRIVER";
    case TRM_ERROR_CUDA: return "TRM_ERROR_CUDA";
    }
    return "unknown";
}
