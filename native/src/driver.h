/* The CUDA driver, opened at run time: a library that is linked against it does not load without a GPU. */
#ifndef TRM_DRIVER_H
#define TRM_DRIVER_H

#include <cuda.h>

#include "trm_kernels.h"

/* What is needed of it: name here, name there, arguments. The names there carry the version of the interface. */
#define TRM_DRIVER_FUNCTIONS(F)                                                                                  \
    F(get_error_string, "cuGetErrorString", (CUresult, const char **))                                           \
    F(init, "cuInit", (unsigned))                                                                                \
    F(device_get, "cuDeviceGet", (CUdevice *, int))                                                              \
    F(device_get_attribute, "cuDeviceGetAttribute", (int *, CUdevice_attribute, CUdevice))                       \
    F(primary_context_retain, "cuDevicePrimaryCtxRetain", (CUcontext *, CUdevice))                               \
    F(primary_context_release, "cuDevicePrimaryCtxRelease_v2", (CUdevice))                                       \
    F(context_push, "cuCtxPushCurrent_v2", (CUcontext))                                                          \
    F(context_pop, "cuCtxPopCurrent_v2", (CUcontext *))                                                          \
    F(memory_allocate, "cuMemAlloc_v2", (CUdeviceptr *, size_t))                                                 \
    F(memory_free, "cuMemFree_v2", (CUdeviceptr))                                                                \
    F(copy_to_device, "cuMemcpyHtoD_v2", (CUdeviceptr, const void *, size_t))                                    \
    F(copy_3d_async, "cuMemcpy3DAsync_v2", (const CUDA_MEMCPY3D *, CUstream))                                    \
    F(module_load, "cuModuleLoadData", (CUmodule *, const void *))                                               \
    F(module_unload, "cuModuleUnload", (CUmodule))                                                               \
    F(module_get_function, "cuModuleGetFunction", (CUfunction *, CUmodule, const char *))                        \
    F(function_set_attribute, "cuFuncSetAttribute", (CUfunction, CUfunction_attribute, int))                     \
    F(launch, "cuLaunchKernel",                                                                                  \
      (CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, CUstream, void **,      \
       void **))

typedef struct trm_driver {
    void *library;
#define TRM_DECLARE(here, there, arguments) CUresult(CUDAAPI *here) arguments;
    TRM_DRIVER_FUNCTIONS(TRM_DECLARE)
#undef TRM_DECLARE
} trm_driver;

trm_status trm_driver_open(trm_driver *driver, trm_error *error);

void trm_driver_close(trm_driver *driver);

/* TRM_OK for CUDA_SUCCESS; else the error in the driver's words. */
trm_status trm_driver_check(const trm_driver *driver, CUresult result, const char *did, trm_error *error);

#endif
