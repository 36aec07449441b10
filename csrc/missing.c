#include "missing.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdbool.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

/* From include/uapi/linux/userfaultfd.h. */
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
struct copy {
    uint64_t dst, src, len, mode;
    int64_t copied;
};
struct zero {
    struct range range;
    uint64_t mode;
    int64_t zeroed;
};
struct poison {
    struct range range;
    uint64_t mode;
    int64_t updated;
};
struct msg {
    uint8_t event, reserved[7];
    uint64_t flags, address, ptid;
};

enum { API = 0xAA, EVENT_PAGEFAULT = 0x12, FEATURE_MISSING_SHMEM = 1 << 5, REGISTER_MODE_MISSING = 1, MESSAGES = 64 };
#define UFFDIO_API _IOWR(0xAA, 0x3F, struct api)
#define UFFDIO_REGISTER _IOWR(0xAA, 0x00, struct reg)
#define UFFDIO_UNREGISTER _IOR(0xAA, 0x01, struct range)
#define UFFDIO_WAKE _IOR(0xAA, 0x02, struct range)
#define UFFDIO_COPY _IOWR(0xAA, 0x03, struct copy)
#define UFFDIO_ZEROPAGE _IOWR(0xAA, 0x04, struct zero)
#define UFFDIO_POISON _IOWR(0xAA, 0x08, struct poison)
#define USERFAULTFD_IOC_NEW _IO(0xAA, 0x00)
#define NEEDED (1u << 3 | 1u << 4)      /* COPY and ZEROPAGE: hugetlb memory has no ZEROPAGE */

int missing_open(void)
{
    /* Not for user mode only: a system call that touches a missing page has to wait as well, not to fail. */
    int fd = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK), err = -errno;
    if (fd < 0 && err == -EPERM) {
        int node = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
        if (node >= 0) {
            fd = ioctl(node, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
            close(node);
        }
    }
    if (fd < 0)
        return err;
    struct api api = {.api = API, .features = FEATURE_MISSING_SHMEM};
    if (ioctl(fd, UFFDIO_API, &api)) {
        err = -errno;
        close(fd);
        return err == -EINVAL ? -EOPNOTSUPP : err;
    }
    return fd;
}

int missing_register(int uffd, uint64_t vaddr, uint64_t size)
{
    struct reg reg = {.range = {vaddr, size}, .mode = REGISTER_MODE_MISSING};
    if (ioctl(uffd, UFFDIO_REGISTER, &reg))
        return -errno;
    if ((reg.ioctls & NEEDED) == NEEDED)
        return 0;
    missing_unregister(uffd, vaddr, size);
    return -EOPNOTSUPP;
}

int missing_unregister(int uffd, uint64_t vaddr, uint64_t size)
{
    struct range range = {vaddr, size};
    return ioctl(uffd, UFFDIO_UNREGISTER, &range) ? -errno : 0;
}

int missing_next(int uffd, uint64_t *addresses, size_t max, int timeout)
{
    struct msg messages[MESSAGES];
    struct pollfd ready = {.fd = uffd, .events = POLLIN};
    int n = poll(&ready, 1, timeout);
    if (n <= 0)
        return n && errno != EINTR ? -errno : 0;
    if (ready.revents & (POLLNVAL | POLLERR))
        return -EBADF;
    ssize_t got = read(uffd, messages, sizeof(*messages) * (max < MESSAGES ? max : MESSAGES));
    if (got < 0)
        return errno == EAGAIN || errno == EINTR ? 0 : -errno;
    int found = 0;
    for (size_t i = 0; i < got / sizeof(*messages); i++)
        if (messages[i].event == EVENT_PAGEFAULT)
            addresses[found++] = messages[i].address;
    return found;
}

int missing_place(int uffd, uint64_t vaddr, const void *content, uint64_t size, uint64_t *placed)
{
    *placed = 0;
    while (*placed < size) {
        int64_t done;
        int failed;
        if (content) {
            struct copy copy = {vaddr + *placed, (uint64_t)(uintptr_t)content + *placed, size - *placed, 0, 0};
            failed = ioctl(uffd, UFFDIO_COPY, &copy);
            done = copy.copied;
        } else {
            struct zero zero = {{vaddr + *placed, size - *placed}, 0, 0};
            failed = ioctl(uffd, UFFDIO_ZEROPAGE, &zero);
            done = zero.zeroed;
        }
        int err = failed ? errno : 0;
        if (done > 0)
            *placed += done;
        /* EAGAIN: a part was placed, or the layout of memory is just being changed. */
        if (err && err != EAGAIN && err != EINTR)
            return -err;
    }
    return 0;
}

int missing_wake(int uffd, uint64_t vaddr, uint64_t size)
{
    struct range range = {vaddr, size};
    return ioctl(uffd, UFFDIO_WAKE, &range) ? -errno : 0;
}

int missing_fill(int uffd, uint64_t vaddr, uint64_t size)
{
    uint64_t placed;
    int err = missing_place(uffd, vaddr, NULL, size, &placed);
    /* Who waits may have been told of before the page came: nobody else wakes it then. */
    return err == -EEXIST ? missing_wake(uffd, vaddr, size) : err;
}

int missing_poison(int uffd, uint64_t vaddr, uint64_t size)
{
    struct poison poison = {{vaddr, size}, 0, 0};
    return ioctl(uffd, UFFDIO_POISON, &poison) ? -errno : 0;
}

static bool is_set(const uint64_t *words, uint64_t page)
{
    return words[page / 64] >> page % 64 & 1;
}

/* -EBUSY if any page of the kernel's is in memory or, for shared memory, in its file. */
static int check_gone(char *start, uint64_t size)
{
    unsigned char there[4096];
    uint64_t unit = sysconf(_SC_PAGESIZE), portion;
    for (uint64_t at = 0; at < size; at += portion) {
        portion = size - at < unit * sizeof(there) ? size - at : unit * sizeof(there);
        if (mincore(start + at, portion, there))
            return -errno;
        for (uint64_t i = 0; i < portion / unit; i++)
            if (there[i] & 1)
                return -EBUSY;
    }
    return 0;
}

int missing_discard(uint64_t vaddr, uint64_t pgsize, const uint64_t *words, uint64_t npages, int shared)
{
    uint64_t page = 0;
    while (page < npages) {
        uint64_t word = words[page / 64] >> page % 64;
        if (!word) {
            page = page / 64 * 64 + 64;
            continue;
        }
        page += __builtin_ctzll(word);
        uint64_t first = page;
        while (page < npages && is_set(words, page))
            page++;
        char *start = (char *)(uintptr_t)(vaddr + first * pgsize);
        uint64_t size = (page - first) * pgsize;
        int err = madvise(start, size, shared ? MADV_REMOVE : MADV_DONTNEED) ? -errno : check_gone(start, size);
        if (err)
            return err;
    }
    return 0;
}

int missing_keep_from_children(uint64_t vaddr, uint64_t size, int keep)
{
    return madvise((void *)(uintptr_t)vaddr, size, keep ? MADV_DONTFORK : MADV_DOFORK) ? -errno : 0;
}

void missing_unclaim(uint64_t *words, uint64_t first, uint64_t n)
{
    for (uint64_t page = first; page < first + n; page++)
        words[page / 64] |= UINT64_C(1) << page % 64;
}

int missing_claim(uint64_t *words, uint64_t npages, const uint64_t *runs, size_t n, uint64_t *total)
{
    *total = 0;
    for (size_t i = 0; i < n; i++) {
        uint64_t first = runs[2 * i], count = runs[2 * i + 1], page = first;
        if (count && first < npages && count <= npages - first) {
            for (; page < first + count && is_set(words, page); page++)
                words[page / 64] &= ~(UINT64_C(1) << page % 64);
            *total += count;
            if (page == first + count)
                continue;
        }
        missing_unclaim(words, first, page - first);
        while (i--)
            missing_unclaim(words, runs[2 * i], runs[2 * i + 1]);
        return -EPROTO;
    }
    return 0;
}
