/* Runs scripts of system calls and records what each answered.
 *
 * One source, two uses: with -DGUEST a program that serves scripts to the kernel it runs on; else a library that calls
 * back for whatever touches VFIO, so that a model answers in place of the kernel.  The format is described in script.py.
 * Every script runs in a child of its own, with fresh descriptors and memory at the same addresses.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <glob.h>
#include <linux/capability.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

enum { PAGE = 4096, SLOTS = 12, MEMFD_SLOT = 10, NULL_SLOT = 11, FILLER = 0xaa, SECONDS = 30, BITMAP_BYTES = 8 * PAGE, RESULT_BYTES = 8 << 20 };
enum { OPEN, CLOSE, IOCTL, MMAP, MUNMAP, MPROTECT, TOUCH, MLOCK, MADVISE, RLIMIT, CAPABILITY, ENTRY_LIMIT };
enum { VALUE = 1, READONLY = 2, BITMAP = 4, DESCRIPTOR = 8, WORD_SHIFT = 4 };
enum { GET_DEVICE_FD = 0x3b6a };
#define ARG 0x200000000000ull
#define BITMAP_AREA (ARG + 0x100000)

struct step {
    uint8_t op, slot, flags, length;
    uint32_t request;
    uint64_t a, b;
    uint8_t bytes[72];
};

/* What VFIO is; each returns a result or -errno. */
struct system {
    long (*open)(long kind);
    long (*ioctl)(long fd, unsigned long request, unsigned long arg);
    long (*close)(long fd);
    long (*locked)(void);
    long (*entry_limit)(long value);
};

static const struct system *vfio;
static long fds[SLOTS];
static uint8_t *results;
static size_t used;

static long check(long value)
{
    return value < 0 ? -errno : value;
}

static void put(const void *data, size_t size)
{
    if (used + size > RESULT_BYTES)
        abort();
    memcpy(results + used, data, size);
    used += size;
}

/* The bytes of an area that are not `before` any more, as (offset, length, bytes); `base` keeps areas apart. */
static unsigned put_changes(const uint8_t *area, const uint8_t *before, size_t size, size_t base)
{
    unsigned runs = 0;
    for (size_t i = 0, end; i < size; i = end + 1) {
        for (; i < size && area[i] == before[i]; i++)
            ;
        for (end = i; end < size && area[end] != before[end]; end++)
            ;
        if (end == i)
            break;
        uint16_t head[2] = {base + i, end - i};
        put(head, sizeof head);
        put(area + i, end - i);
        runs++;
    }
    return runs;
}

static long do_map(const struct step *s)
{
    static const struct { int prot, flags, file_pages; } kinds[] = {
        {3, MAP_PRIVATE | MAP_ANONYMOUS, 0}, {1, MAP_PRIVATE | MAP_ANONYMOUS, 0}, {3, MAP_SHARED | MAP_ANONYMOUS, 0},
        {3, MAP_SHARED, 512}, {1, MAP_SHARED, 512}, {3, MAP_PRIVATE, 512}, {3, MAP_SHARED, 2}, {0, MAP_PRIVATE | MAP_ANONYMOUS, 0},
    };
    int fd = -1, pages = kinds[s->request].file_pages;
    if (pages) {
        fd = memfd_create("fuzz", 0);
        if (fd < 0 || ftruncate(fd, (off_t)pages * PAGE))
            return -errno;
    }
    void *at = mmap((void *)s->a, s->b, kinds[s->request].prot, kinds[s->request].flags | MAP_FIXED, fd, 0);
    long result = at == MAP_FAILED ? -errno : 0;
    if (!result)
        madvise(at, s->b, MADV_NOHUGEPAGE);
    if (fd >= 0)
        close(fd);
    return result;
}

/* Read or write a byte of every page; what can't be touched is passed over. */
static long do_touch(const struct step *s)
{
    char byte = 1;
    long done = 0;
    for (uint64_t at = s->a; at < s->a + s->b; at += PAGE) {
        struct iovec here = {&byte, 1}, there = {(void *)at, 1};
        done += (s->request ? process_vm_writev : process_vm_readv)(getpid(), &here, 1, &there, 1, 0) == 1;
    }
    return done;
}

static long set_capability(int capability, int on)
{
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct data[2];
    if (syscall(SYS_capget, &header, data))
        return -errno;
    uint32_t bit = 1u << capability;
    data[0].effective = on ? data[0].effective | bit : data[0].effective & ~bit;
    return check(syscall(SYS_capset, &header, data));
}

static long set_limit(uint64_t bytes)
{
    struct rlimit limit;
    getrlimit(RLIMIT_MEMLOCK, &limit);
    limit.rlim_cur = bytes;
    return check(setrlimit(RLIMIT_MEMLOCK, &limit));
}

static long call(const struct step *s)
{
    if (s->slot >= MEMFD_SLOT)
        return check(ioctl(fds[s->slot], s->request, s->a));
    return vfio->ioctl(fds[s->slot], s->request, s->a);
}

/* Returns the ioctl's result and appends what it wrote; *runs = how many pieces. */
static long do_ioctl(const struct step *s, uint16_t *runs)
{
    static uint8_t arg[PAGE], bitmap[BITMAP_BYTES];
    uint64_t offset = s->a - ARG;
    uint8_t bytes[sizeof s->bytes];
    long result;
    if (s->flags & VALUE)
        return call(s);
    memcpy(bytes, s->bytes, sizeof bytes);
    if (s->flags & DESCRIPTOR) {
        uint8_t *word = bytes + 4 * (s->flags >> WORD_SHIFT);
        int32_t fd = fds[*word];
        memcpy(word, &fd, sizeof fd);
    }
    memset(arg, FILLER, sizeof arg);
    if (offset < PAGE)
        memcpy(arg + offset, bytes, s->length < PAGE - offset ? s->length : PAGE - offset);
    memcpy((void *)ARG, arg, sizeof arg);
    if (s->flags & BITMAP) {
        memset(bitmap, s->b, sizeof bitmap);
        memset((void *)BITMAP_AREA, s->b, sizeof bitmap);
    }
    if (s->flags & READONLY)
        mprotect((void *)ARG, PAGE, PROT_READ);
    result = call(s);
    if (s->flags & READONLY)
        mprotect((void *)ARG, PAGE, PROT_READ | PROT_WRITE);
    if (s->request == GET_DEVICE_FD && result >= 0) {
        fds[s->b] = result;
        result = 0;
    }
    used += sizeof(int32_t) * 2 + sizeof *runs;         /* room for the outcome, which comes first */
    *runs = put_changes((void *)ARG, arg, sizeof arg, 0);
    if (s->flags & BITMAP)
        *runs += put_changes((void *)BITMAP_AREA, bitmap, sizeof bitmap, PAGE);
    return result;
}

static long do_open(const struct step *s)
{
    if (fds[s->slot] >= 0)
        return 0;
    long fd = vfio->open(s->a);
    fds[s->slot] = fd < 0 ? -1 : fd;
    return fd < 0 ? fd : 0;
}

static long do_close(int slot)
{
    long fd = fds[slot];
    fds[slot] = -1;
    return fd < 0 ? -EBADF : slot >= MEMFD_SLOT ? check(close(fd)) : vfio->close(fd);
}

static long do_step(const struct step *s, uint16_t *runs)
{
    switch (s->op) {
    case OPEN: return do_open(s);
    case CLOSE: return do_close(s->slot);
    case IOCTL: return do_ioctl(s, runs);
    case MMAP: return do_map(s);
    case MUNMAP: return check(munmap((void *)s->a, s->b));
    case MPROTECT: return check(mprotect((void *)s->a, s->b, s->request));
    case TOUCH: return do_touch(s);
    case MLOCK: return check(mlock((void *)s->a, s->b));
    case MADVISE: return check(madvise((void *)s->a, s->b, s->request));
    case RLIMIT: return set_limit(s->a);
    case CAPABILITY: return set_capability(CAP_IPC_LOCK, s->request);
    case ENTRY_LIMIT: return vfio->entry_limit(s->a);
    }
    abort();
}

static void run_child(const struct step *prelude, size_t nprelude, const struct step *steps, size_t nsteps)
{
    alarm(SECONDS);
    set_capability(CAP_SYS_RESOURCE, 0);        /* the host may be without it */
    for (int i = 0; i < SLOTS; i++)
        fds[i] = -1;
    fds[NULL_SLOT] = open("/dev/null", O_RDWR);
    fds[MEMFD_SLOT] = memfd_create("fuzz", 0);
    if (ftruncate(fds[MEMFD_SLOT], 512 * PAGE))
        _exit(3);
    for (size_t i = 0; i < nprelude; i++) {
        uint16_t runs = 0;
        long result = do_step(&prelude[i], &runs);
        if (result < 0) {
            fprintf(stderr, "prelude step %zu: %s\n", i, strerror(-result));
            _exit(2);
        }
    }
    long before = vfio->locked(), locked = before;
    for (size_t i = 0; i < nsteps + SLOTS; i++) {
        size_t start = used;
        uint16_t runs = 0;
        int32_t outcome[2];
        bool idle = i >= nsteps && fds[i - nsteps] < 0;
        /* After the script everything is closed. */
        outcome[0] = i < nsteps ? do_step(&steps[i], &runs) : do_close(i - nsteps);
        locked = idle ? locked : vfio->locked();
        outcome[1] = locked - before;
        if (used == start)
            used += sizeof outcome + sizeof runs;
        if (used > RESULT_BYTES)
            abort();
        memcpy(results + start, outcome, sizeof outcome);
        memcpy(results + start + sizeof outcome, &runs, sizeof runs);
        *(uint64_t *)(results - PAGE) = used;
    }
    _exit(0);
}

/* Run a file of scripts that is in memory, writing the records to `out`. */
int run_scripts(const struct system *system, const uint8_t *scripts, FILE *out)
{
    uint32_t counts[2];
    const struct step *prelude = (const struct step *)(scripts + sizeof counts);
    memcpy(counts, scripts, sizeof counts);
    vfio = system;
    uint8_t *shared = mmap(NULL, RESULT_BYTES + PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (shared == MAP_FAILED)
        return -errno;
    results = shared + PAGE;
    scripts = (const uint8_t *)(prelude + counts[0]);
    for (uint32_t i = 0; i < counts[1]; i++) {
        uint64_t nsteps;
        int status = 0;
        memcpy(&nsteps, scripts, sizeof nsteps);
        const struct step *steps = (const struct step *)(scripts + sizeof nsteps);
        scripts = (const uint8_t *)(steps + nsteps);
        *(uint64_t *)shared = used = 0;
        pid_t pid = fork();
        if (!pid)
            run_child(prelude, counts[0], steps, nsteps);
        if (pid < 0 || waitpid(pid, &status, 0) != pid)
            return -errno;
        for (size_t n = 0; n < nsteps; n++)
            if (steps[n].op == ENTRY_LIMIT) {
                vfio->entry_limit(65535);
                break;
            }
        uint32_t head[2] = {*(uint64_t *)shared, status};
        fwrite(head, sizeof head, 1, out);
        fwrite(results, head[0], 1, out);
    }
    munmap(shared, RESULT_BYTES + PAGE);
    return fflush(out) ? -errno : 0;
}

/* The same for the library: from a buffer into a file. */
int run_file(const struct system *system, const uint8_t *scripts, const char *path)
{
    FILE *out = fopen(path, "we");
    if (!out)
        return -errno;
    int err = run_scripts(system, scripts, out);
    fclose(out);
    return err;
}

#ifdef GUEST
/* By kind: the container, three groups, /dev/iommu, the nodes of four devices. */
static char paths[9][64] = {"/dev/vfio/vfio", [4] = "/dev/iommu"};

static long guest_open(long kind)
{
    return check(open(paths[kind], O_RDWR | O_CLOEXEC));
}

static long guest_ioctl(long fd, unsigned long request, unsigned long arg)
{
    return check(ioctl(fd, request, arg));
}

static long guest_close(long fd)
{
    return check(close(fd));
}

static long guest_locked(void)
{
    char text[4096];
    static int fd = -1;         /* of the child that asks first */
    if (fd < 0)
        fd = open("/proc/self/status", O_RDONLY);
    ssize_t n = pread(fd, text, sizeof text - 1, 0);
    text[n > 0 ? n : 0] = 0;
    const char *line = strstr(text, "\nVmLck:");
    return line ? strtol(line + 7, NULL, 10) * 1024 / PAGE : -1;
}

static long guest_entry_limit(long value)
{
    FILE *file = fopen("/sys/module/vfio_iommu_type1/parameters/dma_entry_limit", "w");
    if (!file)
        return -errno;
    int bad = fprintf(file, "%ld\n", value) < 0;
    return fclose(file) || bad ? -EIO : 0;
}

/* Answer DIR/N.in with DIR/N.out, N = 0, 1, ... until there is a DIR/stop. */
int main(int argc, char **argv)
{
    static const struct system kernel = {guest_open, guest_ioctl, guest_close, guest_locked, guest_entry_limit};
    static const char *const devices[] = {"0000:00:10.0", "0000:00:11.0", "0000:01:01.0", "0000:01:02.0"};
    char path[512], target[256];
    if (argc != 2 || chdir(argv[1]))
        return 2;
    for (int i = 0; i < 3; i++) {
        snprintf(path, sizeof path, "/sys/bus/pci/devices/%s/iommu_group", devices[i]);
        ssize_t n = readlink(path, target, sizeof target - 1);
        if (n < 0)
            return 3;
        target[n] = 0;
        snprintf(paths[i + 1], sizeof paths[0], "/dev/vfio/%s", strrchr(target, '/') + 1);
    }
    for (int i = 0; i < 4; i++) {
        snprintf(path, sizeof path, "/sys/bus/pci/devices/%s/vfio-dev/vfio*", devices[i]);
        glob_t found;
        if (!glob(path, 0, NULL, &found))
            snprintf(paths[5 + i], sizeof paths[0], "/dev/vfio/devices/%s", strrchr(found.gl_pathv[0], '/') + 1);
        globfree(&found);
    }
    for (unsigned n = 0;; n++) {
        struct stat info;
        snprintf(path, sizeof path, "%u.in", n);
        while (stat(path, &info)) {
            if (!access("stop", F_OK))
                return 0;
            usleep(20000);
        }
        uint8_t *scripts = malloc(info.st_size);
        FILE *in = fopen(path, "r"), *out = fopen("working", "w");
        if (!scripts || !in || !out || fread(scripts, info.st_size, 1, in) != 1)
            return 4;
        int err = run_scripts(&kernel, scripts, out);
        if (err || fclose(out) || fclose(in))
            return 5;
        free(scripts);
        snprintf(target, sizeof target, "%u.out", n);
        if (rename("working", target))
            return 6;
    }
}
#endif
