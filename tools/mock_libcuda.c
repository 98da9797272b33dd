/* A libcuda of four devices that accepts every call and runs nothing. It records the launches. */
#include <cuda.h>
#include <stdlib.h>
#include <string.h>

#define DONE return CUDA_SUCCESS
#define OTHER { __atomic_fetch_add(&others, 1, __ATOMIC_SEQ_CST); DONE; }
enum { PARAMETERS = 128, KEPT = 1024, DEVICES = 4 };

typedef struct {
  char name[128];
  int count, size[PARAMETERS]; /* of the parameters, in bytes; none until they are set */
} Function;

typedef struct {
  Function *function;
  unsigned grid[3], threads, shared;
  CUstream stream;
  long context; /* of the thread */
  unsigned long long parameters[PARAMETERS];
} Launch;

unsigned long long launched = 0;
unsigned long long others = 0; /* number of calls that load, allocate or set something */
Launch launches[KEPT]; /* the last launches: number n is at n % KEPT */
static __thread long context = 0; /* 0: none; 1, 1 + DEVICES, ... are contexts of device 0 */

/* If set, this function runs the launches. */
CUresult (*runs)(const CUlaunchConfig *, CUfunction, void **) = 0;

CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction f, void **parameters, void **extra) {
  if (runs) return runs(c, f, parameters);
  Launch *to = &launches[__atomic_fetch_add(&launched, 1, __ATOMIC_SEQ_CST) % KEPT];
  Function *function = (Function *)f;
  *to = (Launch){function, {c->gridDimX, c->gridDimY, c->gridDimZ}, c->blockDimX, c->sharedMemBytes, c->hStream, context, {0}};
  for (int n = 0; n < function->count; ++n) memcpy(&to->parameters[n], parameters[n], function->size[n]);
  DONE;
}
CUresult cuModuleGetFunction(CUfunction *f, CUmodule m, const char *name) {
  Function *function = calloc(1, sizeof(Function));
  strncpy(function->name, name, sizeof(function->name) - 1);
  *f = (CUfunction)function;
  DONE;
}
CUresult cuModuleLoadData(CUmodule *m, const void *image) { *m = (CUmodule)1; OTHER; }
CUresult cuModuleUnload(CUmodule m) OTHER
CUresult cuFuncGetAttribute(int *v, CUfunction_attribute a, CUfunction f) {
  *v = a == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  DONE;
}
CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute a, int v) OTHER
CUresult cuFuncSetCacheConfig(CUfunction f, CUfunc_cache c) OTHER
CUresult cuOccupancyMaxActiveClusters(int *n, CUfunction f, const CUlaunchConfig *c) { *n = 1; DONE; }

CUresult cuInit(unsigned flags) { DONE; }
CUresult cuDriverGetVersion(int *v) { *v = 13000; DONE; }
CUresult cuDeviceGet(CUdevice *d, int number) {
  *d = number;
  return 0 <= number && number < DEVICES ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}
CUresult cuDeviceGetCount(int *n) { *n = DEVICES; DONE; }
CUresult cuDeviceGetAttribute(int *v, CUdevice_attribute a, CUdevice d) {
  *v = a == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR         ? 9
       : a == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR       ? 0
       : a == CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT           ? 132
       : a == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN ? 232448
                                                                 : 65536;
  DONE;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext *c, CUdevice d) { *c = (CUcontext)(d + 1L); DONE; }
CUresult cuCtxGetCurrent(CUcontext *c) { *c = (CUcontext)context; DONE; }
CUresult cuCtxSetCurrent(CUcontext c) { context = (long)c; DONE; }
CUresult cuCtxGetDevice(CUdevice *d) {
  *d = (context - 1) % DEVICES;
  return context ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT;
}
CUresult cuCtxGetLimit(size_t *v, CUlimit l) { *v = 0; DONE; }
CUresult cuCtxSetLimit(CUlimit l, size_t v) OTHER
CUresult cuStreamIsCapturing(CUstream s, CUstreamCaptureStatus *c) { *c = CU_STREAM_CAPTURE_STATUS_NONE; DONE; }
/* Accepts any address, so that tensors may be on the CPU. */
CUresult cuPointerGetAttribute(void *d, CUpointer_attribute a, CUdeviceptr p) { *(CUdeviceptr *)d = p; DONE; }
CUresult cuPointerGetAttributes(unsigned n, CUpointer_attribute *a, void **d, CUdeviceptr p) { DONE; }
CUresult cuGetErrorString(CUresult r, const char **text) { *text = r ? "refused by the mock driver" : "none"; DONE; }
