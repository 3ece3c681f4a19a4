/* A libcuda.so.1 without a GPU: memory is this machine's, copies are done, launches are looked at and dropped.
 * Copies run under the address sanitizer of the test that loads this. */
#include <cuda.h>
#include <stdlib.h>
#include <string.h>

#include "expect.h"

#undef cuDevicePrimaryCtxRelease
#undef cuCtxPushCurrent
#undef cuCtxPopCurrent
#undef cuMemAlloc
#undef cuMemFree
#undef cuMemcpyHtoD
#undef cuMemcpy3DAsync

/* What the test asks about and sets. */
__attribute__((visibility("default"))) int fake_allocations, fake_fails_after = -1, fake_depth, fake_modules,
    fake_launches, fake_copies, fake_contexts;

CUresult cuGetErrorString(CUresult error, const char **text) {
    *text = error == CUDA_ERROR_OUT_OF_MEMORY ? "out of memory" : "something else";
    return CUDA_SUCCESS;
}

CUresult cuInit(unsigned flags) { return flags ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS; }

CUresult cuDeviceGet(CUdevice *device, int ordinal) {
    *device = ordinal;
    return ordinal == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    int arch = atoi(getenv("FAKE_ARCH"));
    expect(device == 0);
    *value = attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR ? arch / 10 : arch % 10;
    return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    expect(device == 0);
    fake_contexts++;
    *context = (CUcontext)&fake_contexts;
    return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device) {
    expect(device == 0 && fake_contexts-- > 0);
    return CUDA_SUCCESS;
}

CUresult cuCtxPushCurrent_v2(CUcontext context) {
    expect(context == (CUcontext)&fake_contexts);
    fake_depth++;
    return CUDA_SUCCESS;
}

CUresult cuCtxPopCurrent_v2(CUcontext *context) {
    expect(fake_depth-- > 0);
    *context = (CUcontext)&fake_contexts;
    return CUDA_SUCCESS;
}

CUresult cuMemAlloc_v2(CUdeviceptr *pointer, size_t bytes) {
    expect(fake_depth > 0 && bytes > 0);
    if (fake_fails_after >= 0 && fake_fails_after-- == 0) return CUDA_ERROR_OUT_OF_MEMORY;
    *pointer = (CUdeviceptr)malloc(bytes);
    fake_allocations++;
    return CUDA_SUCCESS;
}

CUresult cuMemFree_v2(CUdeviceptr pointer) {
    expect(fake_depth > 0 && pointer);
    free((void *)pointer);
    fake_allocations--;
    return CUDA_SUCCESS;
}

CUresult cuMemcpyHtoD_v2(CUdeviceptr to, const void *from, size_t bytes) {
    expect(fake_depth > 0);
    memcpy((void *)to, from, bytes);
    return CUDA_SUCCESS;
}

CUresult cuMemcpy3DAsync_v2(const CUDA_MEMCPY3D *how, CUstream stream) {
    (void)stream;
    expect(fake_depth > 0);
    expect(how->srcMemoryType == CU_MEMORYTYPE_DEVICE && how->dstMemoryType == CU_MEMORYTYPE_DEVICE);
    expect(how->srcPitch >= how->WidthInBytes && how->dstPitch >= how->WidthInBytes);
    expect(how->srcHeight >= how->Height && how->dstHeight >= how->Height);
    for (size_t z = 0; z < how->Depth; z++) {
        for (size_t y = 0; y < how->Height; y++) {
            const char *from = (const char *)how->srcDevice + (z * how->srcHeight + y) * how->srcPitch;
            char *to = (char *)how->dstDevice + (z * how->dstHeight + y) * how->dstPitch;
            memcpy(to, from, how->WidthInBytes);
        }
    }
    fake_copies++;
    return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
    expect(!memcmp(image, "\177ELF", 4));
    fake_modules++;
    *module = calloc(1, 64); /* its kernel's name */
    return CUDA_SUCCESS;
}

CUresult cuModuleUnload(CUmodule module) {
    fake_modules--;
    free(module);
    return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
    expect(module && name[0] && strlen(name) < 64);
    strcpy((char *)module, name);
    *function = (CUfunction)module;
    return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
    expect(function && attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES && value > 48 << 10);
    return CUDA_SUCCESS;
}

CUresult cuLaunchKernel(CUfunction function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned ty,
                        unsigned tz, unsigned shared, CUstream stream, void **arguments, void **extra) {
    (void)stream;
    expect(fake_depth > 0 && function && x && y == 1 && z == 1 && ty == 1 && tz == 1 && !extra);
    expect(threads % 32 == 0 && threads <= 1024 && shared <= 227 << 10);
    expect(*(CUdeviceptr *)arguments[0]); /* every kernel's first argument is a tensor */
    if (!strcmp((char *)function, "_norm_add_fwd_kernel")) { /* eps comes last, as 4 bytes: with r eighth */
        float eps = *(float *)arguments[6], eps_after_r = *(float *)arguments[7];
        expect(eps == 1e-5f || eps_after_r == 1e-5f);
    }
    fake_launches++;
    return CUDA_SUCCESS;
}
