// Preloaded by tests/test_out_of_memory.py and tests/test_server.py: makes one large allocation fail.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdlib.h>
#include <unistd.h>

// smaller ones are not looked at: C and C++ programs do not survive the loss of those
static const size_t N_BYTES_MIN = 64*1024;

static atomic_long n_seen;
static atomic_long n_fail; // number of the allocation that fails, 0 = none
static atomic_int  armed;

// starts to count; the k-th large allocation fails, 0 = none does
void fail_alloc_arm(long k) {
    n_seen = 0;
    n_fail = k;
    armed  = 1;
}

// stops; returns the number of large allocations since fail_alloc_arm()
long fail_alloc_disarm(void) {
    armed = 0;
    return n_seen;
}

static atomic_int all_fail;

// every large allocation fails until it is called with 0
void fail_alloc_all(int on) {
    all_fail = on;
}

// for another process: each SIGUSR1 arms for the allocation after the one before, SIGUSR2 disarms and writes the number of
// allocations, a long, to the file that FAIL_ALLOC_COUNT names
static long n_signal;
static const char * path;

static void on_signal(int number) {
    if (number == SIGUSR1) {
        fail_alloc_arm(++n_signal);
        return;
    }
    const long n = fail_alloc_disarm();
    const int file = path ? open(path, O_WRONLY | O_CREAT | O_TRUNC, 0600) : -1;
    if (file >= 0) {
        if (write(file, &n, sizeof(n)) != sizeof(n)) {
            unlink(path);
        }
        close(file);
    }
}

__attribute__((constructor)) static void listen_to_signals(void) {
    path = getenv("FAIL_ALLOC_COUNT");
    signal(SIGUSR1, on_signal);
    signal(SIGUSR2, on_signal);
}

static int fails(size_t size) {
    if (all_fail && size >= N_BYTES_MIN) {
        return 1;
    }
    return armed && size >= N_BYTES_MIN && ++n_seen == n_fail;
}

void * malloc(size_t size) {
    static void * (*next)(size_t);
    if (!next) {
        next = (void * (*)(size_t)) dlsym(RTLD_NEXT, "malloc");
    }
    return fails(size) ? NULL : next(size);
}

int posix_memalign(void ** res, size_t alignment, size_t size) {
    static int (*next)(void **, size_t, size_t);
    if (!next) {
        next = (int (*)(void **, size_t, size_t)) dlsym(RTLD_NEXT, "posix_memalign");
    }
    return fails(size) ? ENOMEM : next(res, alignment, size);
}
