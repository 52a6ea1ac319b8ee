/* A stand-in for libnvidia-ml.so.1: plays the GPUs that a state file describes.
 *
 * The file (LAUNCHER_TEST_NVML, else /run/nvml-stand-in/state) holds lines "key value"; it is read
 * again when it changes, so that faults come while a process runs. A key that is missing is a value
 * that the GPU does not support. Keys:
 *   gpus N · rc CODE (nvmlInit) · driver TEXT · cuda N
 *   gpu.I.NAME VALUE · gpu.I.rc CODE (every call) · gpu.I.rc.FUNCTION CODE · hang.FUNCTION 1
 * Beside it, `events` holds lines "INDEX XID"; each process gets those added after it registered.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { OK = 0, UNINITIALIZED = 1, INVALID = 2, NOT_SUPPORTED = 3, INSUFFICIENT = 7,
       DRIVER_NOT_LOADED = 9, TIMEOUT = 10, NOT_FOUND = 6 };
typedef unsigned long long ull;

static struct { char key[80]; char value[128]; } *rows;
static int count_rows;
static struct timespec read_at;
static ino_t read_inode;
static long events_seen;

static const char *folder_file(const char *name) {
    static char path[512];
    const char *state = getenv("LAUNCHER_TEST_NVML");
    if (!state) state = "/run/nvml-stand-in/state";
    snprintf(path, sizeof path, "%s", state);
    if (name) {
        char *slash = strrchr(path, '/');
        snprintf(slash + 1, sizeof path - (size_t)(slash + 1 - path), "%s", name);
    }
    return path;
}

static void load(void) {
    struct stat info;
    if (stat(folder_file(NULL), &info) != 0) { count_rows = 0; return; }
    if (info.st_ino == read_inode && info.st_mtim.tv_sec == read_at.tv_sec &&
        info.st_mtim.tv_nsec == read_at.tv_nsec) return;
    FILE *file = fopen(folder_file(NULL), "r");
    if (!file) { count_rows = 0; return; }
    read_at = info.st_mtim;
    read_inode = info.st_ino;
    count_rows = 0;
    char line[256];
    int room = 0;
    while (fgets(line, sizeof line, file)) {
        if (count_rows >= room) {
            room = room ? room * 2 : 1024;
            rows = realloc(rows, (size_t)room * sizeof *rows);
        }
        char *space = strchr(line, ' ');
        if (!space) continue;
        *space = 0;
        space[1 + strcspn(space + 1, "\n")] = 0;
        snprintf(rows[count_rows].key, sizeof rows[0].key, "%s", line);
        snprintf(rows[count_rows].value, sizeof rows[0].value, "%s", space + 1);
        count_rows++;
    }
    fclose(file);
}

static const char *find(const char *key) {
    for (int i = 0; i < count_rows; i++)
        if (!strcmp(rows[i].key, key)) return rows[i].value;
    return NULL;
}

static const char *of_gpu(void *handle, const char *name) {
    char key[128];
    snprintf(key, sizeof key, "gpu.%ld.%s", (long)handle - 1, name);
    return find(key);
}

/* What this call answers before it looks at a value: a hang, the GPU's fault, or OK. */
static int gate(void *handle, const char *function) {
    char key[128];
    load();
    snprintf(key, sizeof key, "hang.%s", function);
    if (find(key)) for (;;) pause();
    if (handle) {
        const char *code = of_gpu(handle, "rc");
        if (code) return atoi(code);
        snprintf(key, sizeof key, "rc.%s", function);
        if ((code = of_gpu(handle, key))) return atoi(code);
    }
    return OK;
}

static int number(void *handle, const char *function, const char *name, long long *out) {
    int code = gate(handle, function);
    if (code) return code;
    const char *text = of_gpu(handle, name);
    if (!text) return NOT_SUPPORTED;
    *out = strtoll(text, NULL, 0);
    return OK;
}

static int text_of(void *handle, const char *function, const char *name, char *out, unsigned size) {
    int code = gate(handle, function);
    if (code) return code;
    const char *text = of_gpu(handle, name);
    if (!text) return NOT_SUPPORTED;
    snprintf(out, size, "%s", text);
    return OK;
}

#define UINT(FUNCTION, NAME)                                   \
    int FUNCTION(void *h, unsigned *out) {                     \
        long long v;                                           \
        int code = number(h, #FUNCTION, NAME, &v);             \
        if (!code) *out = (unsigned)v;                         \
        return code;                                           \
    }
#define PAIR(FUNCTION, FIRST, SECOND)                          \
    int FUNCTION(void *h, unsigned *a, unsigned *b) {          \
        long long v, w;                                        \
        int code = number(h, #FUNCTION, FIRST, &v);            \
        if (!code) code = number(h, #FUNCTION, SECOND, &w);    \
        if (!code) { *a = (unsigned)v; *b = (unsigned)w; }     \
        return code;                                           \
    }
#define TEXT(FUNCTION, NAME)                                   \
    int FUNCTION(void *h, char *out, unsigned size) { return text_of(h, #FUNCTION, NAME, out, size); }

int nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    int code = gate(NULL, "nvmlInitWithFlags");
    if (code) return code;
    const char *broken = find("rc");
    if (broken) return atoi(broken);
    return find("gpus") ? OK : DRIVER_NOT_LOADED;
}
int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
int nvmlShutdown(void) { return OK; }
const char *nvmlErrorString(int code) {
    switch (code) {
        case 0: return "Success";
        case 3: return "Not Supported";
        case 9: return "Driver Not Loaded";
        case 10: return "Timeout";
        case 14: return "infoROM is corrupted";
        case 15: return "GPU is lost";
        case 16: return "GPU requires reset";
        case 18: return "Driver/library version mismatch";
        default: return "Unknown Error";
    }
}
static int system_text(const char *key, char *out, unsigned size) {
    load();
    const char *text = find(key);
    if (!text) return NOT_SUPPORTED;
    snprintf(out, size, "%s", text);
    return OK;
}
int nvmlSystemGetDriverVersion(char *out, unsigned size) { return system_text("driver", out, size); }
int nvmlSystemGetNVMLVersion(char *out, unsigned size) { return system_text("driver", out, size); }
int nvmlSystemGetCudaDriverVersion_v2(int *out) {
    load();
    const char *text = find("cuda");
    if (!text) return NOT_SUPPORTED;
    *out = atoi(text);
    return OK;
}
int nvmlSystemGetCudaDriverVersion(int *out) { return nvmlSystemGetCudaDriverVersion_v2(out); }
int nvmlDeviceGetCount_v2(unsigned *out) {
    int code = gate(NULL, "nvmlDeviceGetCount_v2");
    if (code) return code;
    const char *text = find("gpus");
    *out = text ? (unsigned)atoi(text) : 0;
    return OK;
}
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **out) {
    unsigned count = 0;
    nvmlDeviceGetCount_v2(&count);
    if (index >= count) return INVALID;
    *out = (void *)((long)index + 1);
    const char *code = of_gpu(*out, "rc.nvmlDeviceGetHandleByIndex_v2");
    return code ? atoi(code) : OK;
}

TEXT(nvmlDeviceGetUUID, "uuid")
TEXT(nvmlDeviceGetName, "name")
TEXT(nvmlDeviceGetSerial, "serial")
TEXT(nvmlDeviceGetVbiosVersion, "vbios")
PAIR(nvmlDeviceGetEccMode, "ecc", "ecc_pending")
PAIR(nvmlDeviceGetMigMode, "mig", "mig_pending")
UINT(nvmlDeviceGetComputeMode, "compute_mode")
UINT(nvmlDeviceGetPersistenceMode, "persistence")
UINT(nvmlDeviceGetCurrPcieLinkWidth, "pcie_width")
UINT(nvmlDeviceGetMaxPcieLinkWidth, "pcie_width_max")
UINT(nvmlDeviceGetMaxPcieLinkGeneration, "pcie_generation_max")
UINT(nvmlDeviceGetPcieReplayCounter, "pcie_replay")
UINT(nvmlDeviceGetEnforcedPowerLimit, "power_limit_mw")
UINT(nvmlDeviceGetPowerManagementDefaultLimit, "power_limit_default_mw")
UINT(nvmlDeviceGetRetiredPagesPendingStatus, "retired_pending")

int nvmlDeviceGetTemperature(void *h, int sensor, unsigned *out) {
    (void)sensor;
    long long v;
    int code = number(h, "nvmlDeviceGetTemperature", "temperature", &v);
    if (!code) *out = (unsigned)v;
    return code;
}
int nvmlDeviceGetCurrentClocksEventReasons(void *h, ull *out) {
    long long v;
    int code = number(h, "nvmlDeviceGetCurrentClocksEventReasons", "clock_events", &v);
    if (!code) *out = (ull)v;
    return code;
}
int nvmlDeviceGetTotalEccErrors(void *h, int type, int counter, ull *out) {
    static const char *names[2][2] = {{"ecc_corrected_volatile", "ecc_corrected_aggregate"},
                                      {"ecc_uncorrected_volatile", "ecc_uncorrected_aggregate"}};
    long long v;
    int code = number(h, "nvmlDeviceGetTotalEccErrors", names[type & 1][counter & 1], &v);
    if (!code) *out = (ull)v;
    return code;
}
int nvmlDeviceGetRemappedRows(void *h, unsigned *corrected, unsigned *uncorrected,
                              unsigned *pending, unsigned *failed) {
    const char *names[] = {"remap_corrected", "remap_uncorrected", "remap_pending", "remap_failed"};
    unsigned *out[] = {corrected, uncorrected, pending, failed};
    for (int i = 0; i < 4; i++) {
        long long v;
        int code = number(h, "nvmlDeviceGetRemappedRows", names[i], &v);
        if (code) return code;
        *out[i] = (unsigned)v;
    }
    return OK;
}
int nvmlDeviceGetRetiredPages(void *h, int cause, unsigned *count, ull *addresses) {
    long long v;
    int code = number(h, "nvmlDeviceGetRetiredPages", cause ? "retired_double" : "retired_single", &v);
    if (code) return code;
    if (*count < (unsigned)v) { *count = (unsigned)v; return INSUFFICIENT; }
    for (long long i = 0; addresses && i < v; i++) addresses[i] = (ull)i * 65536;
    *count = (unsigned)v;
    return OK;
}
int nvmlDeviceGetNvLinkState(void *h, unsigned link, unsigned *out) {
    char name[32];
    snprintf(name, sizeof name, "nvlink.%u", link);
    long long v;
    int code = number(h, "nvmlDeviceGetNvLinkState", name, &v);
    if (!code) *out = (unsigned)v;
    return code == NOT_SUPPORTED ? INVALID : code;
}
int nvmlDeviceGetNvLinkErrorCounter(void *h, unsigned link, int counter, ull *out) {
    static const char *kinds[] = {"replay", "recovery", "crc", "crc_data", "ecc_data"};
    char name[48];
    snprintf(name, sizeof name, "nvlink.%u.%s", link, kinds[counter % 5]);
    long long v;
    int code = number(h, "nvmlDeviceGetNvLinkErrorCounter", name, &v);
    *out = code == NOT_SUPPORTED ? 0 : (ull)v;
    return code == NOT_SUPPORTED ? OK : code;
}

typedef struct { char legacy[16]; unsigned domain, bus, device, id, subsystem; char bus_id[32]; } pci_t;
int nvmlDeviceGetPciInfo_v3(void *h, pci_t *out) {
    memset(out, 0, sizeof *out);
    return text_of(h, "nvmlDeviceGetPciInfo_v3", "bus_id", out->bus_id, sizeof out->bus_id);
}
typedef struct { ull total, free, used; } memory_t;
int nvmlDeviceGetMemoryInfo(void *h, memory_t *out) {
    long long total, used;
    int code = number(h, "nvmlDeviceGetMemoryInfo", "memory_total", &total);
    if (!code) code = number(h, "nvmlDeviceGetMemoryInfo", "memory_used", &used);
    if (!code) { out->total = (ull)total; out->used = (ull)used; out->free = (ull)(total - used); }
    return code;
}
typedef struct { unsigned version; ull total, reserved, free, used; } memory2_t;
int nvmlDeviceGetMemoryInfo_v2(void *h, memory2_t *out) {
    memory_t plain;
    int code = nvmlDeviceGetMemoryInfo(h, &plain);
    if (!code) { out->total = plain.total; out->reserved = 0; out->used = plain.used; out->free = plain.free; }
    return code;
}
typedef struct { unsigned pid; ull memory; unsigned gpu_instance, compute_instance; } process_t;
int nvmlDeviceGetComputeRunningProcesses_v3(void *h, unsigned *count, process_t *out) {
    int code = gate(h, "nvmlDeviceGetComputeRunningProcesses_v3");
    if (code) return code;
    const char *pid = of_gpu(h, "process");
    if (!pid) { *count = 0; return OK; }
    if (*count < 1) { *count = 1; return INSUFFICIENT; }
    *count = 1;
    const char *memory = of_gpu(h, "process_memory");
    out[0] = (process_t){(unsigned)atoi(pid), memory ? strtoull(memory, NULL, 0) : 0, ~0u, ~0u};
    return OK;
}
typedef struct { unsigned id, scope; long long at, latency; int type, rc; ull value; } field_t;
int nvmlDeviceGetFieldValues(void *h, int count, field_t *fields) {
    int code = gate(h, "nvmlDeviceGetFieldValues");
    if (code) return code;
    for (int i = 0; i < count; i++) {
        char name[32];
        snprintf(name, sizeof name, "field.%u", fields[i].id);
        const char *text = of_gpu(h, name);
        fields[i].rc = text ? OK : NOT_SUPPORTED;
        fields[i].value = text ? (ull)(unsigned)strtoll(text, NULL, 0) : 0;
    }
    return OK;
}
typedef struct { unsigned version; unsigned char cluster[16]; int status; unsigned clique;
                 unsigned char state; unsigned mask; unsigned char summary; } fabric_t;
int nvmlDeviceGetGpuFabricInfoV(void *h, fabric_t *out) {
    long long state, status = 0, clique = 0, summary = 1;
    int code = number(h, "nvmlDeviceGetGpuFabricInfoV", "fabric_state", &state);
    if (code) return code;
    number(h, "nvmlDeviceGetGpuFabricInfoV", "fabric_status", &status);
    number(h, "nvmlDeviceGetGpuFabricInfoV", "fabric_clique", &clique);
    number(h, "nvmlDeviceGetGpuFabricInfoV", "fabric_health", &summary);
    memset(out->cluster, 0, sizeof out->cluster);
    out->status = (int)status;
    out->clique = (unsigned)clique;
    out->state = (unsigned char)state;
    out->mask = 0;
    out->summary = (unsigned char)summary;
    return OK;
}
typedef struct { unsigned version; ull counters[11]; unsigned exceeded; } sram_t;
int nvmlDeviceGetSramEccErrorStatus(void *h, sram_t *out) {
    long long v;
    int code = number(h, "nvmlDeviceGetSramEccErrorStatus", "sram_exceeded", &v);
    if (!code) out->exceeded = (unsigned)v;
    return code;
}
typedef struct { unsigned version; int margin; } margin_t;
int nvmlDeviceGetMarginTemperature(void *h, margin_t *out) {
    long long v;
    int code = number(h, "nvmlDeviceGetMarginTemperature", "thermal_margin", &v);
    if (!code) out->margin = (int)v;
    return code;
}
typedef struct { unsigned version, channel, tpc; } repair_t;
int nvmlDeviceGetRepairStatus(void *h, repair_t *out) {
    long long v;
    int code = number(h, "nvmlDeviceGetRepairStatus", "repair_pending", &v);
    if (!code) { out->channel = (unsigned)v; out->tpc = 0; }
    return code;
}

typedef struct { void *device; ull type, data; unsigned gpu_instance, compute_instance; } event_t;
static long count_events(long skip, int *gpu, long *xid) {
    FILE *file = fopen(folder_file("events"), "r");
    if (!file) return 0;
    long seen = 0, code;
    int index;
    while (fscanf(file, "%d %ld", &index, &code) == 2)
        if (seen++ == skip) { *gpu = index; *xid = code; }
    fclose(file);
    return seen;
}
int nvmlEventSetCreate(void **out) {
    int gpu; long xid;
    *out = (void *)1;
    events_seen = count_events(-1, &gpu, &xid);
    return OK;
}
int nvmlDeviceRegisterEvents(void *h, ull types, void *set) {
    (void)types; (void)set;
    return gate(h, "nvmlDeviceRegisterEvents");
}
int nvmlEventSetWait_v2(void *set, event_t *out, unsigned timeout_ms) {
    (void)set;
    for (unsigned waited = 0; waited <= timeout_ms; waited += 100) {
        int gpu = 0; long xid = 0;
        if (count_events(events_seen, &gpu, &xid) > events_seen) {
            events_seen++;
            *out = (event_t){(void *)((long)gpu + 1), 8, (ull)xid, ~0u, ~0u};
            return OK;
        }
        usleep(100000);
    }
    return TIMEOUT;
}
int nvmlEventSetFree(void *set) { (void)set; return OK; }
