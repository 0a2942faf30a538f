/* A driver that has no GPU: it takes launches apart as cuda.h defines them and answers as FAKE_CUDA says.
   Memory of the "device" is the host's. A launch writes what it was given: word i of block i, by turns
   grid, block, shared bytes, cluster, attributes, the first word of the data, words in the tensor map's box. */
#include <cuda.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int is(const char *word) {
  const char *asked = getenv("FAKE_CUDA");
  return asked && strstr(asked, word) != NULL;
}

static int number(const char *name, int otherwise) {
  const char *value = getenv(name);
  return value ? atoi(value) : otherwise;
}

CUresult cuInit(unsigned flags) { return is("no-device") ? CUDA_ERROR_NO_DEVICE : CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { *device = ordinal; return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { *version = 13000; return CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return context ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT; }

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
  if (is("slow-context")) sleep(60);
  if (is("full")) return CUDA_ERROR_OUT_OF_MEMORY;
  *context = (CUcontext)malloc(1);
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = number("FAKE_MAJOR", 12); break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = number("FAKE_MINOR", 1); break;
    case CU_DEVICE_ATTRIBUTE_INTEGRATED: *value = number("FAKE_INTEGRATED", 1); break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = 101376; break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
    default: return CUDA_ERROR_INVALID_VALUE;
  }
  return CUDA_SUCCESS;
}

CUresult cuGetErrorName(CUresult error, const char **name) {
  switch (error) {
    case CUDA_ERROR_OUT_OF_MEMORY: *name = "CUDA_ERROR_OUT_OF_MEMORY"; break;
    case CUDA_ERROR_NO_DEVICE: *name = "CUDA_ERROR_NO_DEVICE"; break;
    case CUDA_ERROR_LAUNCH_FAILED: *name = "CUDA_ERROR_LAUNCH_FAILED"; break;
    case CUDA_ERROR_INVALID_CLUSTER_SIZE: *name = "CUDA_ERROR_INVALID_CLUSTER_SIZE"; break;
    default: *name = NULL;
  }
  return CUDA_SUCCESS;
}

CUresult cuMemGetInfo_v2(size_t *free, size_t *total) { *free = 3ull << 30; *total = 119ull << 30; return CUDA_SUCCESS; }
CUresult cuMemAlloc_v2(CUdeviceptr *address, size_t bytes) { *address = (CUdeviceptr)malloc(bytes); return CUDA_SUCCESS; }

CUresult cuMemsetD32_v2(CUdeviceptr address, unsigned value, size_t words) {
  for (size_t i = 0; i < words; i++) ((uint32_t *)address)[i] = value;
  return CUDA_SUCCESS;
}

CUresult cuMemcpyDtoH_v2(void *host, CUdeviceptr address, size_t bytes) {
  memcpy(host, (void *)address, bytes);
  return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  *module = (CUmodule)image;
  return memcmp(image, "cubin", 5) ? CUDA_ERROR_INVALID_IMAGE : CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  *function = (CUfunction)module;
  return strcmp(name, "probe") ? CUDA_ERROR_NOT_FOUND : CUDA_SUCCESS;
}

static int allowed = 48 * 1024;

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES || value > 101376) return CUDA_ERROR_INVALID_VALUE;
  allowed = value;
  return CUDA_SUCCESS;
}

CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                const cuuint64_t *dims, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  if ((uintptr_t)map % 64 || type != CU_TENSOR_MAP_DATA_TYPE_UINT32 || rank != 1 || steps[0] != 1 || interleave ||
      swizzle || promotion || fill || dims[0] < box[0])
    return CUDA_ERROR_INVALID_VALUE;
  ((uint64_t *)map)[0] = (uint64_t)address;
  ((uint64_t *)map)[1] = box[0];
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **parameters, void **extra) {
  uint32_t *out = *(uint32_t **)parameters[0], *data = *(uint32_t **)parameters[1];
  uint64_t *map = parameters[2];
  unsigned cluster = 1;
  for (unsigned i = 0; i < config->numAttrs; i++)
    if (config->attrs[i].id == CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION) cluster = config->attrs[i].value.clusterDim.x;
  if (config->sharedMemBytes > allowed || config->hStream || extra) return CUDA_ERROR_INVALID_VALUE;
  if (cluster > 1 && is("no-clusters")) return CUDA_ERROR_INVALID_CLUSTER_SIZE;
  uint32_t told[] = {config->gridDimX, config->blockDimX, config->sharedMemBytes, cluster, config->numAttrs,
                     data[1023], map[0] == (uint64_t)data ? map[1] : 0};
  for (unsigned i = 0; i < config->gridDimX; i++) out[i] = told[i % (sizeof told / sizeof *told)];
  return CUDA_SUCCESS;
}

CUresult cuCtxSynchronize(void) {
  if (is("hang")) sleep(60);
  if (is("crash")) raise(SIGSEGV);
  return is("trap") ? CUDA_ERROR_LAUNCH_FAILED : CUDA_SUCCESS;
}
