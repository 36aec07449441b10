#include "bitmap_kernels.h"
const struct bitmap_kernels *bitmap_x86(const char *name)
{
    (void)name;
    return NULL;
}
