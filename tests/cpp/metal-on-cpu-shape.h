// The sources of one head size and type: score, and attend for few and for many queries.
#define HEADKV_NQ 0
#include "metal-on-cpu-program.h"
#define HEADKV_NQ 4
#include "metal-on-cpu-program.h"
#define HEADKV_NQ 8
#include "metal-on-cpu-program.h"
