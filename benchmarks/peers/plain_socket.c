/* Memory through a socket with nothing else done: both sides of the plainest program, 1 MiB a call. */
#include <errno.h>
#include <stddef.h>
#include <unistd.h>

enum { CHUNK = 1 << 20 };

int plain_send(int fd, const char *memory, size_t size)
{
    for (size_t at = 0; at < size;) {
        ssize_t n = write(fd, memory + at, size - at < CHUNK ? size - at : CHUNK);
        if (n < 0 && errno != EINTR)
            return -errno;
        at += n > 0 ? (size_t)n : 0;
    }
    return 0;
}

int plain_receive(int fd, char *memory, size_t size)
{
    for (size_t at = 0; at < size;) {
        ssize_t n = read(fd, memory + at, size - at < CHUNK ? size - at : CHUNK);
        if (!n || (n < 0 && errno != EINTR))
            return n ? -errno : -EPIPE;
        at += n > 0 ? (size_t)n : 0;
    }
    return 0;
}
