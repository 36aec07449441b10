#include "pagemap.h"

#include "bitmap.h"

#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

/* From include/uapi/linux/userfaultfd.h and fs.h; the headers of the oldest distribution built on lack the newer ones. */
struct range {
    uint64_t start, len;
};
struct api {
    uint64_t api, features, ioctls;
};
struct reg {
    struct range range;
    uint64_t mode, ioctls;
};
struct protect {
    struct range range;
    uint64_t mode;
};
struct scan {
    uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
    uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
};
struct region {
    uint64_t start, end, categories;
};

enum {
    API = 0xAA,
    FEATURE_PAGEFAULT_FLAG_WP = 1 << 0,
    FEATURE_WP_HUGETLBFS_SHMEM = 1 << 12,
    FEATURE_WP_UNPOPULATED = 1 << 13,
    FEATURE_WP_ASYNC = 1 << 15,
    REGISTER_MODE_WP = 1 << 1,
    WRITEPROTECT_MODE_WP = 1 << 0,
    USER_MODE_ONLY = 1,
    SCAN_WP_MATCHING = 1 << 0,
    SCAN_CHECK_WPASYNC = 1 << 1,
    PAGE_IS_WRITTEN = 1 << 1,
    REGIONS = 1024,             /* of one scan: 24 KiB of stack */
};
#define FEATURES (FEATURE_PAGEFAULT_FLAG_WP | FEATURE_WP_HUGETLBFS_SHMEM | FEATURE_WP_UNPOPULATED | FEATURE_WP_ASYNC)
#define UFFDIO_API _IOWR(0xAA, 0x3F, struct api)
#define UFFDIO_REGISTER _IOWR(0xAA, 0x00, struct reg)
#define UFFDIO_UNREGISTER _IOR(0xAA, 0x01, struct range)
#define UFFDIO_WRITEPROTECT _IOWR(0xAA, 0x06, struct protect)
#define PAGEMAP_SCAN _IOWR('f', 16, struct scan)

static int retry(int fd, unsigned long request, void *arg)
{
    int result;
    do
        result = ioctl(fd, request, arg);
    while (result < 0 && (errno == EINTR || errno == EAGAIN));
    return result < 0 ? -errno : result;
}

int writes_open(void)
{
    /* Without faults of the kernel's own accesses a user may do it without privilege; asynchronous mode has none. */
    int fd = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | USER_MODE_ONLY);
    if (fd < 0 && errno == EINVAL)
        fd = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    if (fd < 0)
        return -errno;
    struct api api = {.api = API, .features = FEATURES};
    int err = retry(fd, UFFDIO_API, &api);
    if (err < 0) {
        close(fd);
        return err == -EINVAL ? -EOPNOTSUPP : err;
    }
    return fd;
}

int writes_watch(int uffd, uint64_t vaddr, uint64_t size)
{
    struct reg reg = {.range = {vaddr, size}, .mode = REGISTER_MODE_WP};
    int err = retry(uffd, UFFDIO_REGISTER, &reg);
    if (err < 0)
        return err;
    struct protect protect = {.range = {vaddr, size}, .mode = WRITEPROTECT_MODE_WP};
    err = retry(uffd, UFFDIO_WRITEPROTECT, &protect);
    if (err < 0)
        writes_unwatch(uffd, vaddr, size);
    return err < 0 ? err : 0;
}

int writes_unwatch(int uffd, uint64_t vaddr, uint64_t size)
{
    struct range range = {vaddr, size};
    int err = retry(uffd, UFFDIO_UNREGISTER, &range);
    return err < 0 ? err : 0;
}

int writes_harvest(int pagemap, uint64_t vaddr, uint64_t size, uint64_t pgsize, uint64_t *words, uint64_t first,
                   uint64_t *found)
{
    struct region regions[REGIONS];
    struct scan scan = {
        .size = sizeof(scan), .flags = SCAN_WP_MATCHING | SCAN_CHECK_WPASYNC, .start = vaddr, .end = vaddr + size,
        .vec = (uint64_t)(uintptr_t)regions, .vec_len = REGIONS, .category_mask = PAGE_IS_WRITTEN,
        .return_mask = PAGE_IS_WRITTEN,
    };
    uint64_t next = 0;          /* bits below it are counted: several small pages may share one */
    *found = 0;
    while (scan.start < scan.end) {
        int n = retry(pagemap, PAGEMAP_SCAN, &scan);
        if (n < 0)
            return n == -ENOTTY ? -EOPNOTSUPP : n;
        for (int i = 0; i < n; i++) {
            uint64_t from = (regions[i].start - vaddr) / pgsize, end = (regions[i].end - 1 - vaddr) / pgsize + 1;
            bitmap_set(words, first + from, end - from);
            *found += end - (from < next ? next : from);
            next = end;
        }
        scan.start = scan.walk_end;
    }
    return 0;
}
