/* Threads of a session: loops of the kernels are shared out over them. Part of an export by Tersor. */
#ifndef TERSOR_THREADS_H
#define TERSOR_THREADS_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

struct tersor_pool;

/* What a kernel is called with. Kernels know of the first member only. */
struct tersor_worker {
  int32_t status;           /* set by a kernel that finds its arguments impossible */
  void *scratch;            /* temporaries, at a multiple of 64 bytes */
  struct tersor_pool *pool; /* NULL: the caller is the only thread */
};

/* Iterations begin <= i < end of a loop. */
typedef void (*tersor_task)(const void *closure, void *scratch, int64_t begin, int64_t end);

/* Runs all iterations; returns when they are done. */
void tersor_parallel(struct tersor_worker *worker, tersor_task task, const void *closure, int64_t count);

/* A flag of several threads: sets it and returns what it was; clears it. */
int tersor_flag_set(int64_t *flag);
void tersor_flag_clear(int64_t *flag);

/* Bytes of memory that a pool of so many threads (the caller included) takes, a multiple of 64. */
size_t tersor_pool_bytes(int threads);

/* Starts the threads of a pool in memory of that size, at a multiple of 64 bytes; that of thread i begins at
 * scratch + i * scratch_bytes, the caller's is that of thread 0. Thread i runs on CPU cpus[i] only, where cpus is not
 * NULL (the caller is left where it is). Returns 0, 1 when a thread cannot be started, or 2 when it cannot be bound. */
int tersor_pool_start(struct tersor_pool *pool, int threads, const int *cpus, char *scratch, size_t scratch_bytes);

/* Ends the threads. No call may be under way. */
void tersor_pool_stop(struct tersor_pool *pool);

#ifdef __cplusplus
}
#endif
#endif
