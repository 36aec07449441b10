#include <stdint.h>
static inline void bitmap_set(uint64_t*w,uint64_t f,uint64_t n){for(uint64_t i=f;i<f+n;i++)w[i/64]|=1ull<<(i%64);}
static inline void bitmap_clear(uint64_t*w,uint64_t f,uint64_t n){for(uint64_t i=f;i<f+n;i++)w[i/64]&=~(1ull<<(i%64));}
static inline uint64_t bitmap_harvest(uint64_t*d,uint64_t db,uint64_t*s,uint64_t n){uint64_t c=0;for(uint64_t i=0;i<n;i++)if(s[i/64]>>(i%64)&1){d[(db+i)/64]|=1ull<<((db+i)%64);s[i/64]&=~(1ull<<(i%64));c++;}return c;}
