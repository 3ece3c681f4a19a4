#include "driver.h"

#include <dlfcn.h>
#include <string.h>

#include "error.h"

/* POSIX promises that a function's address comes through a void pointer unharmed; C does not. */
static int find(void *library, const char *name, void *function) {
    void *found = dlsym(library, name);
    memcpy(function, &found, sizeof found);
    return found != NULL;
}

trm_status trm_driver_open(trm_driver *driver, trm_error *error) {
    memset(driver, 0, sizeof *driver);
    driver->library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!driver->library) {
        return trm_fail(error, TRM_ERROR_DRIVER, "trm_create: no CUDA driver: libcuda.so.1 cannot be opened");
    }
#define TRM_FIND(here, there, arguments)                                                                         \
    if (!find(driver->library, there, &driver->here)) {                                                          \
        trm_driver_close(driver);                                                                                \
        return trm_fail(error, TRM_ERROR_DRIVER, "trm_create: the CUDA driver has no " there);                   \
    }
    TRM_DRIVER_FUNCTIONS(TRM_FIND)
#undef TRM_FIND
    trm_status status = trm_driver_check(driver, driver->init(0), "start the CUDA driver", error);
    if (status != TRM_OK) trm_driver_close(driver);
    return status;
}

void trm_driver_close(trm_driver *driver) {
    if (driver->library) dlclose(driver->library);
    driver->library = NULL;
}

trm_status trm_driver_check(const trm_driver *driver, CUresult result, const char *did, trm_error *error) {
    const char *why = NULL;
    if (result == CUDA_SUCCESS) return TRM_OK;
    driver->get_error_string(result, &why);
    trm_status status = result == CUDA_ERROR_OUT_OF_MEMORY ? TRM_ERROR_MEMORY : TRM_ERROR_CUDA;
    return trm_fail(error, status, "trm: could not %s: %s", did, why ? why : "an error without a name");
}
