/* NVIDIA's management library for a machine that the environment describes: FAKE_NVML is a status of nvmlInit, or -1
   where it hangs and -2 where it aborts; the other variables name the GPU. With BARE it has no other function. A GB10 answers "not supported" (3) where it is asked for a memory of its own. */
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { NOT_SUPPORTED = 3 };

static long number(const char *name, long otherwise) {
  const char *value = getenv(name);
  return value ? atol(value) : otherwise;
}

int nvmlInit_v2(void) {
  long status = number("FAKE_NVML", 0);
  if (status == -1) sleep(60);
  if (status == -2) abort();
  return (int)status;
}

#ifndef BARE
int nvmlShutdown(void) { return 0; }

const char *nvmlErrorString(int status) {
  switch (status) {
    case 4: return "Insufficient Permissions";
    case 9: return "Driver Not Loaded";
    case 18: return "Driver/library version mismatch";
    default: return "Unknown Error";
  }
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) { *handle = (void *)1; return index ? 2 : 0; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 1; return 0; }
int nvmlSystemGetDriverVersion(char *text, unsigned length) { strncpy(text, "580.95.05", length); return 0; }
int nvmlSystemGetCudaDriverVersion_v2(int *version) { *version = 13000; return 0; }

int nvmlDeviceGetName(void *handle, char *name, unsigned length) {
  const char *asked = getenv("FAKE_GPU");
  strncpy(name, asked ? asked : "NVIDIA GB10", length);
  return 0;
}

int nvmlDeviceGetCudaComputeCapability(void *handle, int *major, int *minor) {
  *major = (int)number("FAKE_MAJOR", 12);
  *minor = (int)number("FAKE_MINOR", 1);
  return 0;
}

int nvmlDeviceGetMemoryInfo(void *handle, unsigned long long *memory) {
  long total = number("FAKE_MEMORY", 0), used = number("FAKE_USED", 0);
  if (!total) return NOT_SUPPORTED;
  memory[0] = total, memory[1] = total - used, memory[2] = used;
  return 0;
}

int nvmlDeviceGetClockInfo(void *handle, int kind, unsigned *mhz) { *mhz = kind == 1 ? 2418 : 8533; return 0; }
int nvmlDeviceGetMaxClockInfo(void *handle, int kind, unsigned *mhz) { *mhz = 3003; return 0; }
int nvmlDeviceGetPowerUsage(void *handle, unsigned *milliwatts) { *milliwatts = 12500; return 0; }
int nvmlDeviceGetTemperature(void *handle, int sensor, unsigned *celsius) { *celsius = 48; return 0; }

int nvmlDeviceGetUtilizationRates(void *handle, unsigned *per_cent) {
  per_cent[0] = (unsigned)number("FAKE_BUSY", 0), per_cent[1] = 1;
  return 0;
}

int nvmlDeviceGetEnforcedPowerLimit(void *handle, unsigned *milliwatts) {
  *milliwatts = (unsigned)number("FAKE_LIMIT", 0);
  return *milliwatts ? 0 : NOT_SUPPORTED;
}

int nvmlDeviceGetPowerManagementDefaultLimit(void *handle, unsigned *milliwatts) {
  *milliwatts = 700000;
  return number("FAKE_LIMIT", 0) ? 0 : NOT_SUPPORTED;
}

int nvmlDeviceGetCurrentClocksThrottleReasons(void *handle, unsigned long long *reasons) {
  *reasons = (unsigned long long)number("FAKE_THROTTLE", 1);
  return 0;
}

struct process { unsigned pid; unsigned long long bytes; unsigned instance, compute; };

int nvmlDeviceGetComputeRunningProcesses_v3(void *handle, unsigned *count, struct process *found) {
  long held = number("FAKE_HELD", 0);
  *count = held ? 1 : 0;
  if (held) found[0] = (struct process){4711, (unsigned long long)held, 0, 0};
  return 0;
}
#endif
