// The kernels of one type in each head size that they have; included once per HEADKV_TYPE.
#define HEADKV_D 64
#include "metal-on-cpu-shape.h"
#undef HEADKV_D
#if HEADKV_TYPE != HEADKV_Q8_0 // its blocks have 32
#define HEADKV_D 80
#include "metal-on-cpu-shape.h"
#undef HEADKV_D
#endif
#define HEADKV_D 96
#include "metal-on-cpu-shape.h"
#undef HEADKV_D
#define HEADKV_D 128
#include "metal-on-cpu-shape.h"
#undef HEADKV_D
#define HEADKV_D 256
#include "metal-on-cpu-shape.h"
#undef HEADKV_D
