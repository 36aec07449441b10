/* Compiling this file checks every static assertion of csrc/uapi, beside whatever system headers there are.
 *
 * Built with UAPI_NAMES, the name of a file of CONSTANT(...) and STRING(...) lines, it also prints all that our headers
 * declare, for tests/unit/test_uapi.py to compare:
 *     struct NAME SIZE | field STRUCT NAME OFFSET SIZE TYPE | flexible STRUCT NAME OFFSET ELEMENT | older STRUCT KERNEL SIZE
 *     constant NAME VALUE | string NAME VALUE
 */
#include <stdio.h>
#include <string.h>

#if __has_include(<linux/vfio.h>)
#include <linux/vfio.h>
#endif
#if __has_include(<linux/iommu.h>)
#include <linux/iommu.h>
#endif
#if __has_include(<linux/iommufd.h>)
#include <linux/iommufd.h>
#endif

#include "uapi/layout.h"

static unsigned structs;

#ifdef UAPI_NAMES
#define SHOW printf
#else
#define SHOW(...) ((void)0)
#endif

/* Arrays decay to pointers; a pointer member has the size of one. */
#define TYPE_NAME(s, f) \
    _Generic(((struct uapi_##s *)0)->f, \
             uint8_t: "u8", uint16_t: "u16", uint32_t: "u32", uint64_t: "u64", int32_t: "s32", \
             uint8_t *: "u8[]", uint32_t *: "u32[]", uint64_t *: "u64[]", default: "struct")
#define SHOW_FIELD(s, f, at) \
    SHOW("field %s %s %zu %zu %s\n", #s, #f, offsetof(struct uapi_##s, f), sizeof(((struct uapi_##s *)0)->f), \
         TYPE_NAME(s, f));

/* The declarations of the headers become constructors that describe them. */
#undef UAPI_LAYOUT
#define UAPI_LAYOUT(s, size, ...) \
    UAPI_PAIRS(UAPI_ASSERT_OFFSET, s, __VA_ARGS__) \
    __attribute__((constructor)) static void show_##s(void) \
    { \
        structs++; \
        SHOW("struct %s %zu\n", #s, sizeof(struct uapi_##s)); \
        UAPI_PAIRS(SHOW_FIELD, s, __VA_ARGS__) \
    } \
    _Static_assert(sizeof(struct uapi_##s) == (size), "size of " #s)

#undef UAPI_FLEXIBLE
#define UAPI_FLEXIBLE(s, f, at, element) \
    UAPI_ASSERT_OFFSET(s, f, at) \
    __attribute__((constructor)) static void show_##s##_flexible(void) \
    { \
        SHOW("flexible %s %s %zu %zu\n", #s, #f, offsetof(struct uapi_##s, f), \
             sizeof(((struct uapi_##s *)0)->f[0])); \
    } \
    _Static_assert(sizeof(((struct uapi_##s *)0)->f[0]) == (element), "element of " #s)

#undef UAPI_OLDER
#define UAPI_OLDER(s, kernel, last, size) \
    enum { uapi_##s##_size_##kernel = (size) }; \
    __attribute__((constructor)) static void show_##s##_##kernel(void) \
    { \
        SHOW("older %s %s %d\n", #s, #kernel, uapi_##s##_size_##kernel); \
    } \
    _Static_assert(offsetof(struct uapi_##s, last) + sizeof(((struct uapi_##s *)0)->last) == (size), "size of old " #s)

#include "uapi/iommu.h"
#include "uapi/iommufd.h"
#include "uapi/vfio.h"
#include "uapi/vfio_device.h"

int main(void)
{
#ifdef UAPI_NAMES
#define CONSTANT(name) printf("constant %s %lld\n", #name, (long long)UAPI_##name);
#define STRING(name) printf("string %s %s\n", #name, UAPI_##name);
#include UAPI_NAMES
#else
    printf("%u passed, 0 failed\n", structs);
#endif
    return structs == 0;
}
