#include <stdint.h>
#include <stdlib.h>
#include "bitmap.h"
typedef uint64_t dirtylog;
static inline dirtylog*dirtylog_new(uint64_t n){return calloc(n/64+1,8);}
static inline void dirtylog_free(dirtylog*d){free(d);}
static inline void dirtylog_mark(dirtylog*d,uint64_t f,uint64_t n){bitmap_set(d,f,n);}
static inline uint64_t dirtylog_harvest(dirtylog*l,uint64_t f,uint64_t n,uint64_t*d,uint64_t db){uint64_t c=0;for(uint64_t i=0;i<n;i++)if(l[(f+i)/64]>>((f+i)%64)&1){d[(db+i)/64]|=1ull<<((db+i)%64);l[(f+i)/64]&=~(1ull<<((f+i)%64));c++;}return c;}
