/* Access to this process's memory by address, checked by the kernel: a bad address is -EFAULT, never a signal. */
#ifndef VFIODMA_USERCOPY_H
#define VFIODMA_USERCOPY_H
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Copy n bytes from address src; 0, or -EFAULT when a byte of it can't be read (dst is then undefined). */
int user_read(void *dst, uint64_t src, size_t n);

/* Copy n bytes to address dst; 0, or -EFAULT with the bytes before the fault written, as copy_to_user() leaves them. */
int user_write(uint64_t dst, const void *src, size_t n);

/* What access_ok() says: does [address, address + size) lie below the end of user space? */
bool user_range_ok(uint64_t address, uint64_t size);
#endif
