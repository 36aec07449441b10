#include "pin.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <linux/magic.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "usercopy.h"

#define PAGE 4096ull
#define BATCH (PAGE / 8)        /* pages */

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#define MADV_POPULATE_WRITE 23
#endif
#ifndef F_GET_SEALS
#define F_GET_SEALS 1034
#endif
#define SEAL_SHRINK 2

/* Aliases, and the descriptor that finds a VMA; the lock is held for look-ups only, never while memory is populated. */
static struct {
    pthread_mutex_t lock;
    struct alias *aliases;
    int maps;                   /* /proc/self/maps, -1 = not open */
    bool no_query;
} state = {.lock = PTHREAD_MUTEX_INITIALIZER, .maps = -1};

/* ---- the process's own mappings */

typedef struct {
    uint64_t start, end, offset, inode;
    dev_t dev;
    bool readable, writable, shared;
} vma;

/* PROCMAP_QUERY of /proc/self/maps (Linux 6.11); older kernels: read the text. */
struct procmap_query {
    uint64_t size, query_flags, query_addr, vma_start, vma_end, vma_flags, vma_page_size, vma_offset, inode;
    uint32_t dev_major, dev_minor, vma_name_size, build_id_size;
    uint64_t vma_name_addr, build_id_addr;
};
#define PROCMAP_QUERY_IOCTL _IOWR('f', 17, struct procmap_query)

/* 1 found, 0 nothing there, -1 this kernel can't say. */
static int query_vma(uint64_t address, vma *out)
{
    struct procmap_query q = {.size = sizeof q, .query_addr = address};
    if (state.maps < 0)
        state.maps = open("/proc/self/maps", O_RDONLY | O_CLOEXEC);
    if (ioctl(state.maps, PROCMAP_QUERY_IOCTL, &q))
        return errno == ENOENT ? 0 : -1;
    *out = (vma){q.vma_start, q.vma_end, q.vma_offset, q.inode, makedev(q.dev_major, q.dev_minor),
                 q.vma_flags & 1, q.vma_flags & 2, q.vma_flags & 8};
    return 1;
}

static bool read_vma(uint64_t address, vma *out)
{
    FILE *maps = fopen("/proc/self/maps", "re");
    char line[512], perms[5];
    bool found = false;
    while (maps && !found && fgets(line, sizeof line, maps)) {
        unsigned long start, end, offset, inode;
        unsigned major_number, minor_number;
        if (sscanf(line, "%lx-%lx %4s %lx %x:%x %lu", &start, &end, perms, &offset, &major_number, &minor_number, &inode) != 7)
            continue;           /* the tail of a line longer than the buffer */
        if (start > address)
            break;
        if (address >= end)
            continue;
        *out = (vma){start, end, offset, inode, makedev(major_number, minor_number),
                     perms[0] == 'r', perms[1] == 'w', perms[3] == 's'};
        found = true;
    }
    if (maps)
        fclose(maps);
    return found;
}

static bool find_vma(uint64_t address, vma *out)
{
    pthread_mutex_lock(&state.lock);
    int found = state.no_query ? -1 : query_vma(address, out);
    state.no_query = found < 0;
    pthread_mutex_unlock(&state.lock);
    return found < 0 ? read_vma(address, out) : found;
}

/* ---- aliases: the IOMMU's own mappings of shared memory */

struct alias {
    struct alias *next;
    dev_t dev;
    uint64_t inode, offset, size;       /* the part of the file that is mapped */
    char *address;
    bool direct, writable, writeback;
    size_t refs;
};

/* A descriptor of the file that is open here, or -1. */
static int descriptor_of(const vma *area)
{
    int found = -1;
    DIR *folder = opendir("/proc/self/fd");
    struct dirent *entry;
    while (folder && found < 0 && (entry = readdir(folder))) {
        struct stat info;
        int fd = atoi(entry->d_name);
        if (entry->d_name[0] != '.' && !fstat(fd, &info) && info.st_dev == area->dev && info.st_ino == area->inode)
            found = fd;
    }
    if (folder)
        closedir(folder);
    return found;
}

/* Only a descriptor can tell that a file never shrinks under a mapping. */
static bool cannot_shrink(int fd)
{
    int seals = fd < 0 ? -1 : fcntl(fd, F_GET_SEALS);
    return seals >= 0 && seals & SEAL_SHRINK;
}

/* Without a descriptor, the mount table tells the kind of a device's filesystem; memfd and shared anonymous memory live
 * on mounts that are not listed. */
static bool listed_with_writeback(dev_t dev)
{
    FILE *mounts = fopen("/proc/self/mountinfo", "re");
    char line[4096], type[64];
    bool needs = false;
    while (mounts && fgets(line, sizeof line, mounts)) {
        unsigned major_number, minor_number;
        char *tail = strstr(line, " - ");
        if (!tail || sscanf(line, "%*d %*d %u:%u", &major_number, &minor_number) != 2 ||
            makedev(major_number, minor_number) != dev || sscanf(tail, " - %63s", type) != 1)
            continue;
        needs = strcmp(type, "tmpfs") && strcmp(type, "devtmpfs") && strcmp(type, "hugetlbfs") && strcmp(type, "ramfs");
        break;
    }
    if (mounts)
        fclose(mounts);
    return needs;
}

/* Do shared pages of this file need write-back?  Those of memory-backed filesystems do not. */
static bool needs_writeback(const vma *area, int fd)
{
    struct statfs info;
    if (!area->inode || fd < 0 || fstatfs(fd, &info))
        return area->inode && listed_with_writeback(area->dev);
    unsigned long kind = (unsigned long)info.f_type & 0xffffffff;
    return kind != TMPFS_MAGIC && kind != HUGETLBFS_MAGIC && kind != RAMFS_MAGIC;
}

static struct alias *alias_make(const vma *area)
{
    uint64_t size = area->end - area->start;
    struct alias *a = calloc(1, sizeof *a);
    if (!a)
        return NULL;
    /* An old size of 0 duplicates a shared mapping instead of moving it. */
    char *address = mremap((void *)(uintptr_t)area->start, 0, size, MREMAP_MAYMOVE);
    if (address == MAP_FAILED) {
        free(a);
        return NULL;
    }
    madvise(address, size, MADV_DONTFORK);
    munlock(address, size);     /* a copy of locked memory is locked, and would count once more */
    bool writable = !mprotect(address, size, PROT_READ | PROT_WRITE);
    int fd = descriptor_of(area);
    *a = (struct alias){.dev = area->dev, .inode = area->inode, .offset = area->offset, .size = size, .address = address,
                        .direct = cannot_shrink(fd), .writable = writable, .writeback = needs_writeback(area, fd)};
    return a;
}

static struct alias *alias_get(const vma *area, bool write)
{
    uint64_t file_end = area->offset + (area->end - area->start);
    struct alias *a;
    pthread_mutex_lock(&state.lock);
    for (a = state.aliases; a; a = a->next)
        if (a->dev == area->dev && a->inode == area->inode && a->offset <= area->offset && a->offset + a->size >= file_end &&
            (a->writable || !write))
            break;
    if (!a && (a = alias_make(area))) {
        a->next = state.aliases;
        state.aliases = a;
    }
    if (a)
        a->refs++;
    pthread_mutex_unlock(&state.lock);
    return a;
}

static void alias_put(struct alias *a)
{
    pthread_mutex_lock(&state.lock);
    if (!--a->refs) {
        struct alias **link = &state.aliases;
        while (*link != a)
            link = &(*link)->next;
        *link = a->next;
        munmap(a->address, a->size);
        free(a);
    }
    pthread_mutex_unlock(&state.lock);
}

static void before_fork(void)
{
    pthread_mutex_lock(&state.lock);
}

static void after_fork_parent(void)
{
    pthread_mutex_unlock(&state.lock);
}

/* The aliases are not in the child (MADV_DONTFORK), and the open maps file is the parent's. */
static void after_fork_child(void)
{
    state.aliases = NULL;
    if (state.maps >= 0)
        close(state.maps);
    state.maps = -1;
    pthread_mutex_init(&state.lock, NULL);
}

__attribute__((constructor)) static void watch_forks(void)
{
    pthread_atfork(before_fork, after_fork_parent, after_fork_child);
}

/* ---- populating */

static int populate(uint64_t address, uint64_t size, bool write)
{
    while (madvise((void *)(uintptr_t)address, size, write ? MADV_POPULATE_WRITE : MADV_POPULATE_READ))
        if (errno != EAGAIN && errno != EINTR)
            return -errno;
    return 0;
}

/* ---- pins */

typedef struct {
    uint64_t offset, size;      /* of the pinned range */
    uint64_t vaddr;             /* in the alias, or of the process */
    struct alias *alias;        /* or NULL */
    bool direct, mmio;
} segment;

struct pin {
    uint64_t size;
    uint64_t *zero;             /* bit a page: it is the shared zero page; NULL when none is */
    size_t nsegments;
    segment segments[];
};

/* Which populated pages of [address, address + size) are the shared zero page?  Sets bits from `first`; returns how many. */
static uint64_t find_zero_pages(uint64_t address, uint64_t size, uint64_t *bits, uint64_t first)
{
    struct { uint64_t start, end, categories; } regions[64];
    struct {
        uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
        uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
    } scan = {.size = sizeof scan, .start = address, .end = address + size, .vec = (uint64_t)(uintptr_t)regions, .vec_len = 64,
              .category_mask = 1 << 5, .return_mask = 1 << 5};          /* PAGE_IS_PFNZERO */
    uint64_t found = 0;
    int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    while (fd >= 0 && scan.start < scan.end) {
        int n = ioctl(fd, _IOWR('f', 16, scan), &scan);                 /* PAGEMAP_SCAN, Linux 6.7 */
        if (n < 0)
            break;
        for (int i = 0; i < n; i++)
            for (uint64_t at = regions[i].start; at < regions[i].end; at += PAGE, found++) {
                uint64_t page = first + (at - address) / PAGE;
                bits[page / 64] |= 1ull << (page % 64);
            }
        if (scan.walk_end <= scan.start)
            break;
        scan.start = scan.walk_end;
    }
    if (fd >= 0)
        close(fd);
    return found;
}

static int pin_errno(int err)
{
    return err == -ENOMEM || err == -EINTR ? err : -EFAULT;
}

/* Pin one VMA's part as segment s; adds to *counted. */
static int pin_part(const vma *area, pin *p, segment *s, unsigned rules, uint64_t allowed, uint64_t *counted)
{
    bool write = rules & PIN_WRITE;
    bool zero_free = rules & PIN_ZERO_PAGE_FREE && !write && !area->shared && !area->inode;
    uint64_t at = s->vaddr, room = allowed - *counted, pages = s->size / PAGE;

    if (write ? !area->writable : !area->readable)
        return -EFAULT;
    if (area->shared && (s->alias = alias_get(area, write))) {
        if (rules & PIN_NO_WRITEBACK && write && s->alias->writeback)
            return -EFAULT;
        s->direct = s->alias->direct;
        s->vaddr = (uint64_t)(uintptr_t)s->alias->address + (area->offset - s->alias->offset) + (at - area->start);
    }
    /* Pages are counted as they are pinned: a limit that is reached before a fault wins. */
    if (!zero_free && pages > room) {
        int err = populate(at, (room + 1) * PAGE, write);
        if (!err && rules & PIN_IN_BATCHES) {
            uint64_t end = ((s->offset / PAGE + room) / BATCH + 1) * BATCH * PAGE;
            populate(at, (end < p->size ? end : p->size) - s->offset, write);
        }
        if (err != -EINVAL)
            return err ? pin_errno(err) : -ENOMEM;
    }
    int err = populate(at, s->size, write);
    if (err == -EINVAL) {
        s->mmio = true;         /* the permissions are right, so it is VM_IO or VM_PFNMAP */
        pages = 0;
    } else if (err) {
        return pin_errno(err);
    }
    if (zero_free) {
        if (!p->zero && !(p->zero = calloc((p->size / PAGE + 63) / 64, 8)))
            return -ENOMEM;
        pages -= find_zero_pages(at, s->size, p->zero, s->offset / PAGE);
        if (pages > room)
            return -ENOMEM;
    }
    *counted += pages;
    return 0;
}

static int pin_parts(uint64_t vaddr, uint64_t size, unsigned rules, uint64_t allowed, pin **p, uint64_t *counted)
{
    for (uint64_t done = 0, part; done < size; done += part) {
        vma area;
        if (!user_range_ok(vaddr + done, 1) || !find_vma(vaddr + done, &area))
            return -EFAULT;
        part = area.end - (vaddr + done);
        part = part < size - done ? part : size - done;
        pin *grown = realloc(*p, sizeof **p + ((*p)->nsegments + 1) * sizeof(segment));
        if (!grown)
            return -ENOMEM;
        *p = grown;
        segment *s = &grown->segments[grown->nsegments++];
        *s = (segment){.offset = done, .size = part, .vaddr = vaddr + done};
        int err = pin_part(&area, grown, s, rules, allowed, counted);
        if (err)
            return err;
    }
    return 0;
}

int pin_memory(uint64_t vaddr, uint64_t size, unsigned rules, uint64_t allowed, pin **out, uint64_t *counted)
{
    pin *p = calloc(1, sizeof *p);
    int err = -ENOMEM;

    *counted = 0;
    if (p) {
        p->size = size;
        err = pin_parts(vaddr, size, rules, allowed, &p, counted);
    }
    if (err) {
        pin_release(p);
        *counted = 0;
        return err;
    }
    *out = p;
    return 0;
}

void pin_release(pin *p)
{
    if (!p)
        return;
    for (size_t i = 0; i < p->nsegments; i++)
        if (p->segments[i].alias)
            alias_put(p->segments[i].alias);
    free(p->zero);
    free(p);
}

/* ---- device access */

static const segment *segment_at(const pin *p, uint64_t offset)
{
    size_t low = 0, high = p->nsegments;
    while (high - low > 1) {
        size_t middle = (low + high) / 2;
        if (p->segments[middle].offset <= offset)
            low = middle;
        else
            high = middle;
    }
    return &p->segments[low];
}

static bool is_zero_page(const pin *p, uint64_t page)
{
    return p->zero[page / 64] >> (page % 64) & 1;
}

static int read_segment(const pin *p, const segment *s, uint64_t offset, char *dst, uint64_t n)
{
    uint64_t from = s->vaddr + (offset - s->offset);
    if (s->mmio)
        return -EFAULT;
    if (s->direct) {
        memcpy(dst, (const void *)(uintptr_t)from, n);
        return 0;
    }
    if (!p->zero)
        return user_read(dst, from, n);
    for (uint64_t done = 0, part; done < n; done += part) {
        part = PAGE - (offset + done) % PAGE;
        part = part < n - done ? part : n - done;
        if (is_zero_page(p, (offset + done) / PAGE))
            memset(dst + done, 0, part);
        else if (user_read(dst + done, from + done, part))
            return -EFAULT;
    }
    return 0;
}

int pin_read(const pin *p, uint64_t offset, void *dst, uint64_t n)
{
    for (char *to = dst; n;) {
        const segment *s = segment_at(p, offset);
        uint64_t part = s->offset + s->size - offset;
        part = part < n ? part : n;
        if (read_segment(p, s, offset, to, part))
            return -EFAULT;
        offset += part;
        to += part;
        n -= part;
    }
    return 0;
}

int pin_write(const pin *p, uint64_t offset, const void *src, uint64_t n)
{
    for (const char *from = src; n;) {
        const segment *s = segment_at(p, offset);
        uint64_t part = s->offset + s->size - offset, to = s->vaddr + (offset - s->offset);
        part = part < n ? part : n;
        if (s->mmio)
            return -EFAULT;
        if (s->direct)
            memcpy((void *)(uintptr_t)to, from, part);
        else if (user_write(to, from, part))
            return -EFAULT;
        offset += part;
        from += part;
        n -= part;
    }
    return 0;
}

uint64_t *pin_page(const pin *p, uint64_t offset)
{
    const segment *s = segment_at(p, offset);
    return s->direct && !s->mmio ? (uint64_t *)(uintptr_t)(s->vaddr + (offset - s->offset)) : NULL;
}

/* OR bits 10:0 into a word, at once, and without a signal where it is gone: the nearest to an exchange that the kernel
 * does for us. */
static int set_low_bits(uint64_t word, uint32_t bits)
{
    uint32_t or = (uint32_t)FUTEX_OP(FUTEX_OP_OR, bits, FUTEX_OP_CMP_EQ, 0);
    return syscall(SYS_futex, word, FUTEX_WAKE_OP_PRIVATE, 0, NULL, word, or) < 0 ? -EFAULT : 0;
}

int pin_swap(const pin *p, uint64_t offset, uint64_t seen, uint64_t wanted)
{
    const segment *s = segment_at(p, offset);
    uint64_t now;
    if (s->direct && !s->mmio) {
        uint64_t *word = (uint64_t *)(uintptr_t)(s->vaddr + (offset - s->offset));
        return __atomic_compare_exchange_n(word, &seen, wanted, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST) ? 0 : -EAGAIN;
    }
    if (pin_read(p, offset, &now, sizeof now))
        return -EFAULT;
    if (now != seen)
        return -EAGAIN;
    /* Whoever stores into the word right now must not have that undone. */
    if ((wanted & seen) == seen && (wanted & ~seen) < 1u << 11 && !s->mmio)
        return set_low_bits(s->vaddr + (offset - s->offset), wanted & ~seen);
    return pin_write(p, offset, &wanted, sizeof wanted);
}
