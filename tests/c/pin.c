/* Pinned memory: errno of each kind of memory, accounting, access after the owner has changed its mappings. */
#include "pin.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "memlock.h"
#include "usercopy.h"

#define PAGE 4096ull
#define NO_LIMIT UINT64_MAX

static int passed, failed;
#define CHECK(what) \
    do { \
        if (what) \
            passed++; \
        else { \
            failed++; \
            printf("line %d: %s\n", __LINE__, #what); \
        } \
    } while (0)

static char *map(uint64_t size, int prot, int flags, int fd)
{
    return mmap(NULL, size, prot, flags, fd, 0);
}

static char *private(uint64_t pages)
{
    return map(pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
}

static int memfd(uint64_t pages)
{
    int fd = memfd_create("pin", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    return fd < 0 || ftruncate(fd, (off_t)(pages * PAGE)) ? -1 : fd;
}

static int pin_at(const void *at, uint64_t pages, unsigned rules, uint64_t allowed, uint64_t *counted)
{
    pin *p = NULL;
    int err = pin_memory((uint64_t)(uintptr_t)at, pages * PAGE, rules, allowed, &p, counted);
    pin_release(p);
    return err;
}

static void errno_of_each_kind_of_memory(void)
{
    uint64_t counted;
    char *memory = private(8);
    CHECK(pin_at(memory, 8, PIN_WRITE, NO_LIMIT, &counted) == 0 && counted == 8);
    mprotect(memory + 2 * PAGE, PAGE, PROT_READ);
    CHECK(pin_at(memory, 8, PIN_WRITE, NO_LIMIT, &counted) == -EFAULT && counted == 0);
    CHECK(pin_at(memory, 8, 0, NO_LIMIT, &counted) == 0 && counted == 8);
    munmap(memory + 5 * PAGE, PAGE);
    CHECK(pin_at(memory, 8, 0, NO_LIMIT, &counted) == -EFAULT);
    CHECK(pin_at(memory, 5, 0, NO_LIMIT, &counted) == 0);
    mprotect(memory, PAGE, PROT_NONE);
    CHECK(pin_at(memory, 1, 0, NO_LIMIT, &counted) == -EFAULT);
    CHECK(pin_at(NULL, 1, 0, NO_LIMIT, &counted) == -EFAULT);
    CHECK(pin_at((void *)(1ull << 63), 1, 0, NO_LIMIT, &counted) == -EFAULT);
    CHECK(pin_at((void *)0x7ffffffff000ull, 1, 0, NO_LIMIT, &counted) == -EFAULT);
    int fd = memfd(1);
    char *file = map(4 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd);
    CHECK(pin_at(file, 4, PIN_WRITE, NO_LIMIT, &counted) == -EFAULT);       /* beyond the end of the file */
    CHECK(pin_at(file, 1, PIN_WRITE, NO_LIMIT, &counted) == 0 && counted == 1);
    close(fd);
}

static void a_limit_wins_over_a_fault_behind_it_only(void)
{
    uint64_t counted;
    char *memory = private(8);
    munmap(memory + 6 * PAGE, PAGE);
    CHECK(pin_at(memory, 8, PIN_WRITE, 4, &counted) == -ENOMEM);
    CHECK(pin_at(memory, 8, PIN_WRITE, 6, &counted) == -EFAULT);
    CHECK(pin_at(memory, 8, PIN_WRITE, 5, &counted) == -ENOMEM);
    CHECK(pin_at(memory, 6, PIN_WRITE, 6, &counted) == 0 && counted == 6);
    CHECK(pin_at(memory, 6, PIN_WRITE, 0, &counted) == -ENOMEM);
}

static void access_reaches_shared_memory_when_its_address_is_gone(void)
{
    int fd = memfd(8);
    char *memory = map(8 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd), back[16];
    uint64_t counted;
    pin *p, *q;
    CHECK(!pin_memory((uint64_t)(uintptr_t)memory + PAGE, 4 * PAGE, PIN_WRITE, NO_LIMIT, &p, &counted));
    CHECK(!pin_memory((uint64_t)(uintptr_t)memory, 8 * PAGE, 0, NO_LIMIT, &q, &counted));
    munmap(memory, 8 * PAGE);
    CHECK(!pin_write(p, PAGE - 4, "crossing", 8));
    CHECK(!pin_read(q, 2 * PAGE - 4, back, 8) && !memcmp(back, "crossing", 8));
    CHECK(!ftruncate(fd, PAGE));
    CHECK(pin_read(p, 0, back, 8) == -EFAULT && pin_write(p, 0, back, 8) == -EFAULT);
    CHECK(!pin_read(q, 0, back, 8));
    pin_release(p);
    pin_release(q);
    close(fd);
}

static void sealed_memory_is_reached_directly_and_over_several_vmas(void)
{
    int fd = memfd(4);
    fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK);
    char *memory = map(4 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd), data[4 * PAGE], back[4 * PAGE];
    uint64_t counted;
    pin *p;
    mmap(memory + PAGE, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    CHECK(!pin_memory((uint64_t)(uintptr_t)memory, 4 * PAGE, PIN_WRITE, NO_LIMIT, &p, &counted) && counted == 4);
    for (size_t i = 0; i < sizeof data; i++)
        data[i] = (char)(i * 31);
    CHECK(!pin_write(p, 0, data, sizeof data) && !memcmp(memory, data, sizeof data));
    CHECK(!pin_read(p, 0, back, sizeof back) && !memcmp(back, data, sizeof data));
    munmap(memory + PAGE, PAGE);
    CHECK(!pin_read(p, 0, back, PAGE) && pin_read(p, PAGE, back, 1) == -EFAULT);
    pin_release(p);
    close(fd);
}

static void untouched_memory_costs_nothing_under_the_old_rule(void)
{
    uint64_t counted;
    char *memory = private(8), back[8];
    memory[2 * PAGE] = 'x';
    pin *p;
    CHECK(!pin_memory((uint64_t)(uintptr_t)memory, 8 * PAGE, PIN_ZERO_PAGE_FREE, NO_LIMIT, &p, &counted));
    if (counted == 8) {
        puts("this kernel can't tell the zero page: skipped");
    } else {
        CHECK(counted == 1);
        memory[0] = 'y';                        /* the device keeps seeing the zero page */
        CHECK(!pin_read(p, 0, back, 1) && back[0] == 0);
        CHECK(!pin_read(p, 2 * PAGE, back, 1) && back[0] == 'x');
    }
    pin_release(p);
    CHECK(!pin_at(private(4), 4, 0, NO_LIMIT, &counted) && counted == 4);
}

static void words_are_swapped(void)
{
    int fd = memfd(1), sealed = memfd(1);
    fcntl(sealed, F_ADD_SEALS, F_SEAL_SHRINK);
    char *kinds[] = {private(1), map(PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd),
                     map(PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, sealed)};
    for (int i = 0; i < 3; i++) {
        uint64_t *words = (uint64_t *)kinds[i], counted;
        pin *p = NULL;
        words[1] = 0x14007;
        CHECK(pin_memory((uint64_t)(uintptr_t)words, PAGE, PIN_WRITE, NO_LIMIT, &p, &counted) == 0);
        CHECK(pin_swap(p, 8, 0x14007, 0x14467) == 0 && words[1] == 0x14467);
        CHECK(pin_swap(p, 8, 0x14007, 0x14027) == -EAGAIN && words[1] == 0x14467);
        CHECK(pin_swap(p, 8, 0x14467, UINT64_MAX) == 0 && words[1] == UINT64_MAX && !words[0] && !words[2]);
        CHECK(pin_swap(p, 8, UINT64_MAX, 1) == 0 && words[1] == 1);
        if (i == 0) {
            munmap(words, PAGE);
            CHECK(pin_swap(p, 8, 1, 3) == -EFAULT);
        }
        pin_release(p);
    }
    close(fd);
    close(sealed);
}

static atomic_bool stop;

static void *set_accessed(void *p)
{
    while (!stop)
        pin_swap(p, 0, 0x14007, 0x14027);
    return NULL;
}

/* A guest that has cleared an entry must not find it there again. */
static void a_swap_undoes_no_store(void)
{
    _Atomic uint64_t *word = (_Atomic uint64_t *)private(1);
    uint64_t counted, back = 0;
    pthread_t thread;
    pin *p = NULL;
    CHECK(pin_memory((uint64_t)(uintptr_t)word, PAGE, PIN_WRITE, NO_LIMIT, &p, &counted) == 0);
    CHECK(pthread_create(&thread, NULL, set_accessed, p) == 0);
    for (unsigned i = 0; i < 20000; i++) {
        *word = 0x14007;
        for (volatile unsigned wait = 0; wait < 1500 + i % 4000; wait++)
            ;
        *word = 0;
        for (volatile unsigned wait = 0; wait < 3000; wait++)
            ;
        back += *word & 1;
    }
    stop = true;
    pthread_join(thread, NULL);
    CHECK(back == 0);
    pin_release(p);
}

static void user_memory_is_checked(void)
{
    char *memory = private(2), byte[8] = "1234567";
    munmap(memory + PAGE, PAGE);
    CHECK(!user_write((uint64_t)(uintptr_t)memory, byte, 8) && !memcmp(memory, byte, 8));
    CHECK(user_write((uint64_t)(uintptr_t)memory + PAGE - 4, byte, 8) == -EFAULT);
    CHECK(user_read(byte, (uint64_t)(uintptr_t)memory + PAGE - 4, 8) == -EFAULT);
    CHECK(user_read(byte, 0, 1) == -EFAULT && user_read(byte, UINT64_MAX, 1) == -EFAULT);
    CHECK(user_range_ok(0, 0x7ffffffff000ull) && !user_range_ok(1, 0x7ffffffff000ull) && !user_range_ok(UINT64_MAX, 2));
}

static void charges_count_against_the_limit(void)
{
    CHECK(memlock_allowed(MEMLOCK_UNLIMITED, false) == UINT64_MAX && memlock_allowed(0, true) == UINT64_MAX);
    uint64_t locked = memlock_vmlck(), room = memlock_allowed((int64_t)((locked + 10) * PAGE), false);
    CHECK(room == 10);
    memlock_charge(4);
    CHECK(memlock_charged() == 4 && memlock_allowed((int64_t)((locked + 10) * PAGE), false) == 6);
    CHECK(memlock_allowed((int64_t)((locked + 3) * PAGE), false) == 0);
    memlock_uncharge(4);
    CHECK(memlock_charged() == 0);
    memlock_charge(1);
    memlock_forget();
    CHECK(memlock_charged() == 0);
}

int main(void)
{
    errno_of_each_kind_of_memory();
    a_limit_wins_over_a_fault_behind_it_only();
    access_reaches_shared_memory_when_its_address_is_gone();
    sealed_memory_is_reached_directly_and_over_several_vmas();
    untouched_memory_costs_nothing_under_the_old_rule();
    words_are_swapped();
    a_swap_undoes_no_store();
    user_memory_is_checked();
    charges_count_against_the_limit();
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}
