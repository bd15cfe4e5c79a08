/* A CUDA driver that executes nothing. It writes down each launch, so that bench.launchers can look at it.

   Triton's launchers find these functions by name. Types are those of cuda.h, written out: every handle is a pointer. */

#include <stdint.h>
#include <string.h>

#define MOST 32

typedef struct {
    uint64_t function, stream, launches;
    uint64_t grid[3], block[3];
    uint64_t parameters[MOST];
} Record;

static Record last;
static int wanted; /* how many parameters are written down */
static uint64_t loaded;

Record *recorder_last(void) { return &last; }
void recorder_want(int n) { wanted = n < MOST ? n : MOST; }

static int put(void *function, void *stream, const unsigned *sizes, void **parameters) {
    last.function = (uint64_t)function;
    last.stream = (uint64_t)stream;
    last.launches++;
    for (int i = 0; i < 3; i++) {
        last.grid[i] = sizes[i];
        last.block[i] = sizes[3 + i];
    }
    memset(last.parameters, 0, sizeof last.parameters);
    for (int i = 0; i < wanted; i++)
        memcpy(&last.parameters[i], parameters[i], sizeof(uint64_t));
    return 0;
}

int cuLaunchKernel(void *f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared,
                   void *stream, void **parameters, void **extra) {
    unsigned sizes[6] = {gx, gy, gz, bx, by, bz};
    return put(f, stream, sizes, parameters);
}

/* CUlaunchConfig: six sizes, bytes of shared memory, then the stream at byte 32. */
int cuLaunchKernelEx(const unsigned *config, void *f, void **parameters, void **extra) {
    void *stream;
    memcpy(&stream, (const char *)config + 32, sizeof stream);
    return put(f, stream, config, parameters);
}

int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *out) { return *out = 13000, 0; }
int cuDeviceGetCount(int *out) { return *out = 1, 0; }
int cuGetErrorString(int error, const char **out) { return *out = "no error", 0; }
int cuCtxGetCurrent(void **out) { return *out = (void *)1, 0; }
int cuCtxSetCurrent(void *context) { return 0; }
int cuCtxGetDevice(int *out) { return *out = 0, 0; }
int cuCtxGetLimit(uint64_t *out, int limit) { return *out = 0, 0; }
int cuCtxSetLimit(int limit, uint64_t value) { return 0; }
int cuDeviceGet(int *out, int i) { return *out = i, 0; }
int cuDevicePrimaryCtxRetain(void **out, int device) { return *out = (void *)1, 0; }
int cuDeviceGetAttribute(int *out, int attribute, int device) {
    switch (attribute) {
    case 8: *out = 49152; break;   /* shared memory of a block */
    case 10: *out = 32; break;     /* threads of a warp */
    case 12: *out = 65536; break;  /* registers of a block */
    case 16: *out = 132; break;    /* multiprocessors */
    case 75: *out = 9; break;      /* compute capability */
    case 76: *out = 0; break;
    case 97: *out = 232448; break; /* shared memory that a block may ask for */
    default: *out = 1;
    }
    return 0;
}
int cuFuncGetAttribute(int *out, int attribute, void *f) { return *out = attribute == 0 ? 1024 : 0, 0; }
int cuFuncSetAttribute(void *f, int attribute, int value) { return 0; }
int cuFuncSetCacheConfig(void *f, int config) { return 0; }
int cuModuleLoadData(void **out, const void *image) { return *out = (void *)(0x1000 + ++loaded), 0; }
int cuModuleUnload(void *module) { return 0; }
int cuModuleGetFunction(void **out, void *module, const char *name) { return *out = (char *)module + 0x100000, 0; }
int cuOccupancyMaxActiveClusters(int *out, void *f, const void *config) { return *out = 1, 0; }
int cuPointerGetAttribute(void *out, int attribute, uint64_t pointer) { return memcpy(out, &pointer, 8), 0; }
int cuPointerGetAttributes(unsigned n, const int *attributes, void **out, uint64_t pointer) {
    for (unsigned i = 0; i < n; i++)
        memcpy(out[i], &pointer, 8);
    return 0;
}
int cuStreamIsCapturing(void *stream, int *out) { return *out = 0, 0; }
int cuTensorMapEncodeTiled(void) { return 1; }
int cuTensorMapEncodeIm2col(void) { return 1; }
