#include "pagefile.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

int pagefile_write(int fd, uint64_t offset, const uint64_t *runs, size_t n, const void *content, uint64_t pgsize)
{
    const char *from = content;
    for (size_t i = 0; i < n; i++) {
        uint64_t at = offset + runs[2 * i] * pgsize, left = runs[2 * i + 1] * pgsize;
        while (left) {
            ssize_t done = pwrite(fd, from, left, at);
            if (done < 0 && errno == EINTR)
                continue;
            if (done <= 0)
                return done ? -errno : -EIO;
            from += done, at += done, left -= done;
        }
    }
    return 0;
}

int pagefile_read(int fd, uint64_t offset, const uint64_t *runs, size_t n, void *base, uint64_t pgsize)
{
    for (size_t i = 0; i < n; i++) {
        uint64_t at = runs[2 * i] * pgsize, left = runs[2 * i + 1] * pgsize;
        while (left) {
            ssize_t done = pread(fd, (char *)base + at, left, offset + at);
            if (done < 0 && errno == EINTR)
                continue;
            if (done <= 0)
                return done ? -errno : -ENODATA;
            at += done, left -= done;
        }
    }
    return 0;
}

int pagefile_map(int fd, uint64_t offset, const uint64_t *runs, size_t n, void *base, uint64_t pgsize)
{
    for (size_t i = 0; i < n; i++) {
        uint64_t at = runs[2 * i] * pgsize;
        if (mmap((char *)base + at, runs[2 * i + 1] * pgsize, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED, fd,
                 offset + at) == MAP_FAILED)
            return -errno;
    }
    return 0;
}

int pagefile_punch(int fd, uint64_t offset, const uint64_t *runs, size_t n, uint64_t pgsize)
{
    for (size_t i = 0; i < n; i++)
        while (fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset + runs[2 * i] * pgsize,
                         runs[2 * i + 1] * pgsize))
            if (errno != EINTR)
                return -errno;
    return 0;
}
