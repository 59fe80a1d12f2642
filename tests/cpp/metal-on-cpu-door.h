// What tests tell the device of metal-on-cpu-device.cpp, beside ggml's interface.
#pragma once

#ifdef __cplusplus
extern "C" {
#endif

// the order of threads, threadgroups, and of dispatches between two barriers
void metal_on_cpu_order(bool descending);

// graphs that were computed so far, or parts of them that the device has
int metal_on_cpu_n_graphs(void);

// barriers that were reached so far, "file:line" or "before kernel"; which one is left out from now on, -1 = none
int metal_on_cpu_n_barriers(void);
const char * metal_on_cpu_barrier(int i);
void metal_on_cpu_leave_out(int i);

#ifdef __cplusplus
}
#endif
