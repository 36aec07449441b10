// The bare pair of ioctls, VFIO_IOMMU_MAP_DMA and VFIO_IOMMU_UNMAP_DMA: nanoseconds of `count` of them.
#include <linux/vfio.h>
#include <stdint.h>
#include <sys/ioctl.h>
#include <time.h>

static uint64_t now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

// 0 = an ioctl failed.
uint64_t type1_pairs(int fd, uint64_t iova, uint64_t vaddr, uint64_t size, unsigned count)
{
    uint64_t start = now();
    while (count--) {
        struct vfio_iommu_type1_dma_map map = {
            .argsz = sizeof map, .flags = VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE,
            .vaddr = vaddr, .iova = iova, .size = size,
        };
        struct vfio_iommu_type1_dma_unmap unmap = { .argsz = sizeof unmap, .iova = iova, .size = size };
        if (ioctl(fd, VFIO_IOMMU_MAP_DMA, &map) || ioctl(fd, VFIO_IOMMU_UNMAP_DMA, &unmap) || unmap.size != size)
            return 0;
    }
    return now() - start;
}
