#include "memlock.h"

#include <fcntl.h>
#include <linux/capability.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#define PAGE 4096

static uint64_t charged, user_charged;

void memlock_charge(uint64_t pages)
{
    __atomic_fetch_add(&charged, pages, __ATOMIC_RELAXED);
}

void memlock_uncharge(uint64_t pages)
{
    __atomic_fetch_sub(&charged, pages, __ATOMIC_RELAXED);
}

uint64_t memlock_charged(void)
{
    return __atomic_load_n(&charged, __ATOMIC_RELAXED);
}

void memlock_forget(void)
{
    __atomic_store_n(&charged, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&user_charged, 0, __ATOMIC_RELAXED);
}

uint64_t memlock_vmlck(void)
{
    char text[4096];
    int fd = open("/proc/self/status", O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return 0;
    ssize_t n = read(fd, text, sizeof text - 1);
    close(fd);
    text[n > 0 ? n : 0] = 0;
    const char *line = strstr(text, "\nVmLck:");
    return line ? strtoull(line + 7, NULL, 10) * 1024 / PAGE : 0;
}

/* Pages of a limit that `used` leaves. */
static uint64_t pages_left(int64_t limit, uint64_t used)
{
    uint64_t bytes = (uint64_t)limit;
    if (limit == MEMLOCK_PROCESS) {
        struct rlimit now;
        if (getrlimit(RLIMIT_MEMLOCK, &now) || now.rlim_cur == RLIM_INFINITY)
            return UINT64_MAX;
        bytes = now.rlim_cur;
    }
    return bytes / PAGE > used ? bytes / PAGE - used : 0;
}

uint64_t memlock_allowed(int64_t limit, bool capable)
{
    if (capable || limit == MEMLOCK_UNLIMITED)
        return UINT64_MAX;
    return pages_left(limit, memlock_charged() + memlock_vmlck());
}

void memlock_user_charge(uint64_t pages)
{
    __atomic_fetch_add(&user_charged, pages, __ATOMIC_RELAXED);
}

void memlock_user_uncharge(uint64_t pages)
{
    __atomic_fetch_sub(&user_charged, pages, __ATOMIC_RELAXED);
}

uint64_t memlock_user_charged(void)
{
    return __atomic_load_n(&user_charged, __ATOMIC_RELAXED);
}

uint64_t memlock_user_allowed(int64_t limit)
{
    return limit == MEMLOCK_UNLIMITED ? UINT64_MAX : pages_left(limit, memlock_user_charged());
}

bool memlock_has_capability(int capability)
{
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct data[2];
    return !syscall(SYS_capget, &header, data) && (data[capability / 32].effective >> (capability % 32) & 1);
}

bool memlock_capable(void)
{
    return memlock_has_capability(CAP_IPC_LOCK);
}
