#include "usercopy.h"

#include <errno.h>
#include <sys/uio.h>
#include <unistd.h>

/* x86-64 with 4-level page tables, and the usual 48-bit layout of others: the last page is never user memory. */
#define USER_END 0x7ffffffff000ull

bool user_range_ok(uint64_t address, uint64_t size)
{
    return size <= USER_END && address <= USER_END - size;
}

typedef ssize_t (*vm_copy)(pid_t, const struct iovec *, unsigned long, const struct iovec *, unsigned long, unsigned long);

static int copy(vm_copy move, void *local, uint64_t remote, size_t n)
{
    /* A copy of more than INT_MAX bytes is cut by the kernel without a fault. */
    while (n) {
        size_t part = n < (1u << 30) ? n : (1u << 30);
        struct iovec here = {local, part}, there = {(void *)(uintptr_t)remote, part};
        ssize_t done = move(getpid(), &here, 1, &there, 1, 0);
        if (done < 0 && errno == EINTR)
            continue;
        if (done != (ssize_t)part)
            return done < 0 && errno != EFAULT && errno != EINVAL ? -errno : -EFAULT;
        local = (char *)local + part;
        remote += part;
        n -= part;
    }
    return 0;
}

int user_read(void *dst, uint64_t src, size_t n)
{
    return user_range_ok(src, n) ? copy(process_vm_readv, dst, src, n) : -EFAULT;
}

int user_write(uint64_t dst, const void *src, size_t n)
{
    return user_range_ok(dst, n) ? copy(process_vm_writev, (void *)src, dst, n) : -EFAULT;
}
