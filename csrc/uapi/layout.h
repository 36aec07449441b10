/* Static checks for ABI structures: one line after each declaration pins its size and the offset of every member.
 *
 * Every name of these headers carries the prefix uapi_ or UAPI_, so they can stand in one file with <linux/vfio.h>,
 * <linux/iommu.h> and <linux/iommufd.h>, in any order.  No system header is needed: the ABI does not depend on the
 * machine that builds us.  Only 64-bit machines are supported; on i386 some of these structures are shorter.
 */
#ifndef UAPI_LAYOUT_H
#define UAPI_LAYOUT_H

#include <stddef.h>
#include <stdint.h>

_Static_assert(sizeof(void *) == 8, "the layouts are those of 64-bit Linux");

typedef uint64_t uapi_le64; /* little-endian whatever the machine */

/* An ioctl without direction and size, the only kind VFIO and iommufd have. */
#define UAPI_IO(type, nr) ((type) << 8 | (nr))

#define UAPI_ASSERT_OFFSET(s, field, at) \
    _Static_assert(offsetof(struct uapi_##s, field) == (at), "offset of " #s "." #field);

/* Apply action(struct, field, offset) to up to 16 pairs. */
#define UAPI_PAIRS(action, s, ...) \
    UAPI_PICK(__VA_ARGS__, 16, , 15, , 14, , 13, , 12, , 11, , 10, , 9, , 8, , 7, , 6, , 5, , 4, , 3, , 2, , 1, , ) \
    (action, s, __VA_ARGS__)
#define UAPI_PICK(a1, a2, b1, b2, c1, c2, d1, d2, e1, e2, f1, f2, g1, g2, h1, h2, i1, i2, j1, j2, k1, k2, l1, l2, \
                  m1, m2, n1, n2, o1, o2, p1, p2, count, ...) UAPI_PAIRS_N(count)
#define UAPI_PAIRS_N(count) UAPI_PAIRS_##count
#define UAPI_PAIRS_1(action, s, f, o) action(s, f, o)
#define UAPI_PAIRS_2(action, s, f, o, ...) action(s, f, o) UAPI_PAIRS_1(action, s, __VA_ARGS__)
#define UAPI_PAIRS_3(action, s, f, o, ...) action(s, f, o) UAPI_PAIRS_2(action, s, __VA_ARGS__)
#define UAPI_PAIRS_4(action, s, f, o, ...) action(s, f, o) UAPI_PAIRS_3(action, s, __VA_ARGS__)
#define UAPI_PAIRS_5(action, s, f, o, ...) action(s, f, o) UAPI_PAIRS_4(action, s, __VA_ARGS__)
#define UAPI_PAIRS_6(action, s, f, o, ...) action(s, f, o) UAPI_PAIRS_5(action, s, __VA_ARGS__)
#define UAPI_PAIRS_7(action, s, f, o, ...) action(s, f, o) UAPI_PAIRS_6(action, s, __VA_ARGS__)
#define UAPI_PAIRS_8(action, s, f, o, ...) action(s, f, o) UAPI_PAIRS_7(action, s, __VA_ARGS__)
#define UAPI_PAIRS_9(action, s, f, o, ...) action(s, f, o) UAPI_PAIRS_8(action, s, __VA_ARGS__)
#define UAPI_PAIRS_10(action, s, f, o, ...) action(s, f, o) UAPI_PAIRS_9(action, s, __VA_ARGS__)
#define UAPI_PAIRS_11(action, s, f, o, ...) action(s, f, o) UAPI_PAIRS_10(action, s, __VA_ARGS__)
#define UAPI_PAIRS_12(action, s, f, o, ...) action(s, f, o) UAPI_PAIRS_11(action, s, __VA_ARGS__)
#define UAPI_PAIRS_13(action, s, f, o, ...) action(s, f, o) UAPI_PAIRS_12(action, s, __VA_ARGS__)
#define UAPI_PAIRS_14(action, s, f, o, ...) action(s, f, o) UAPI_PAIRS_13(action, s, __VA_ARGS__)
#define UAPI_PAIRS_15(action, s, f, o, ...) action(s, f, o) UAPI_PAIRS_14(action, s, __VA_ARGS__)
#define UAPI_PAIRS_16(action, s, f, o, ...) action(s, f, o) UAPI_PAIRS_15(action, s, __VA_ARGS__)

/* UAPI_LAYOUT(struct, size, field, offset, field, offset...): every member but a flexible array. */
#define UAPI_LAYOUT(s, size, ...) \
    UAPI_PAIRS(UAPI_ASSERT_OFFSET, s, __VA_ARGS__) \
    _Static_assert(sizeof(struct uapi_##s) == (size), "size of " #s)

/* The flexible array at the end of a structure: where it begins and how large an element is. */
#define UAPI_FLEXIBLE(s, field, at, element) \
    UAPI_ASSERT_OFFSET(s, field, at) \
    _Static_assert(sizeof(((struct uapi_##s *)0)->field[0]) == (element), "element of " #s "." #field)

/* A shorter form of the past, as the enumerator uapi_STRUCT_size_KERNEL: the last kernel known to have it, and its last
 * member. */
#define UAPI_OLDER(s, kernel, last, size) \
    enum { uapi_##s##_size_##kernel = (size) }; \
    _Static_assert(offsetof(struct uapi_##s, last) + sizeof(((struct uapi_##s *)0)->last) == (size), \
                   "size of " #s " in " #kernel)

#endif
