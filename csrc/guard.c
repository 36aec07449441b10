#include "guard.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "missing.h"

enum { FAULTS = 16 };

struct guard {
    pthread_t thread;
    pid_t owner;
    int uffd, pidfd, stop;
    const uint64_t *ranges;
    size_t nranges;
};

static void refuse(const struct guard *g, uint64_t address, uint64_t unit)
{
    address &= ~(unit - 1);
    int err = missing_poison(g->uffd, address, unit);
    if (err == -EEXIST || err == -EAGAIN || err == -ENOENT)     /* there, or memory is changing: look again */
        missing_wake(g->uffd, address, unit);
    else if (err)
        abort();
}

static void *watch(void *arg)
{
    const struct guard *g = arg;
    uint64_t addresses[FAULTS], unit = sysconf(_SC_PAGESIZE);
    struct pollfd ready[2] = {{.fd = g->stop, .events = POLLIN}, {.fd = g->pidfd, .events = POLLIN}};
    bool told = false;
    while (poll(ready, 2, -1) < 0 && errno == EINTR)
        ;
    if (ready[0].revents)
        return NULL;
    /* The other process may have heard of who waits: they ask again. */
    for (size_t i = 0; i < g->nranges; i++)
        missing_wake(g->uffd, g->ranges[2 * i], g->ranges[2 * i + 1]);
    ready[1].fd = g->uffd;
    while (poll(ready, 2, -1) >= 0 || errno == EINTR) {
        int n = ready[0].revents ? -1 : missing_next(g->uffd, addresses, FAULTS, 0);
        if (n < 0)
            break;
        if (n && !told)       /* before anybody dies of it */
            dprintf(STDERR_FILENO, "vfiodma: somebody touches the missing page at %#" PRIx64 ", and the helper process that "
                    "places pages is gone: the guest is lost here\n", addresses[0]);
        told |= n > 0;
        for (int i = 0; i < n; i++)
            refuse(g, addresses[i], unit);
    }
    return NULL;
}

int guard_start(struct guard **guard, int uffd, int pidfd, const uint64_t *ranges, size_t nranges)
{
    sigset_t all, before;
    struct guard *g = malloc(sizeof(*g));
    if (!g)
        return -ENOMEM;
    *g = (struct guard){.owner = getpid(), .uffd = uffd, .ranges = ranges, .nranges = nranges, .stop = -1};
    int err = 0;
    g->pidfd = fcntl(pidfd, F_DUPFD_CLOEXEC, 0);
    if (g->pidfd < 0 || (g->stop = eventfd(0, EFD_CLOEXEC)) < 0) {
        err = errno;
    } else {
        sigfillset(&all);       /* signals are for the other threads */
        pthread_sigmask(SIG_SETMASK, &all, &before);
        err = pthread_create(&g->thread, NULL, watch, g);
        pthread_sigmask(SIG_SETMASK, &before, NULL);
    }
    if (!err) {
        *guard = g;
        return 0;
    }
    if (g->pidfd >= 0)
        close(g->pidfd);
    if (g->stop >= 0)
        close(g->stop);
    free(g);
    return -err;
}

void guard_stop(struct guard *g)
{
    if (!g || g->owner != getpid())
        return;
    eventfd_write(g->stop, 1);
    pthread_join(g->thread, NULL);
    close(g->stop);
    close(g->pidfd);
    free(g);
}
