/* Threads of a session. Part of an export by Tersor; C99 and the threads of POSIX or Windows.
 *
 * One loop is open at a time, cut into a share for each thread. A thread that is awake takes pieces from the front of its
 * own share, one after the other, as kernels fetch ahead into the next piece; then from the ends of others' shares. The
 * caller does so too, closes the loop and waits for those that are inside. A thread that wakes late finds its share
 * taken and delays nobody, and fast cores take from slow ones.
 */
#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE /* sched_setaffinity, sched_getcpu */
#endif
#include "threads.h"

#ifdef _WIN32
#include <windows.h>
typedef HANDLE thread;
typedef SRWLOCK lock;
typedef CONDITION_VARIABLE condition;
#define lock_init(l) InitializeSRWLock(l)
#define lock_take(l) AcquireSRWLockExclusive(l)
#define lock_give(l) ReleaseSRWLockExclusive(l)
#define lock_end(l) ((void)(l))
#define condition_init(c) InitializeConditionVariable(c)
#define condition_wait(c, l) SleepConditionVariableSRW(c, l, INFINITE, 0)
#define condition_wake(c) WakeAllConditionVariable(c)
#define condition_end(c) ((void)(c))
#define yield() SwitchToThread()
#else
#include <pthread.h>
#include <sched.h>
typedef pthread_t thread;
typedef pthread_mutex_t lock;
typedef pthread_cond_t condition;
#define lock_init(l) pthread_mutex_init(l, NULL)
#define lock_take(l) pthread_mutex_lock(l)
#define lock_give(l) pthread_mutex_unlock(l)
#define lock_end(l) pthread_mutex_destroy(l)
#define condition_init(c) pthread_cond_init(c, NULL)
#define condition_wait(c, l) pthread_cond_wait(c, l)
#define condition_wake(c) pthread_cond_broadcast(c)
#define condition_end(c) pthread_cond_destroy(c)
#define yield() sched_yield()
#endif

#if defined(_MSC_VER) && !defined(__clang__)
#include <intrin.h>
#define atomic_load(p) _InterlockedOr64(p, 0)
#define atomic_store(p, v) ((void)_InterlockedExchange64(p, v))
#define atomic_swap(p, v) _InterlockedExchange64(p, v)
#define atomic_add(p, v) _InterlockedExchangeAdd64(p, v)
#define atomic_replace(p, from, to) (_InterlockedCompareExchange64(p, to, from) == (from))
#define relax() _mm_pause()
#else
#define atomic_load(p) __atomic_load_n(p, __ATOMIC_SEQ_CST)
#define atomic_store(p, v) __atomic_store_n(p, v, __ATOMIC_SEQ_CST)
#define atomic_swap(p, v) __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST)
#define atomic_add(p, v) __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST)
#define atomic_replace(p, from, to) \
  __atomic_compare_exchange_n(p, &(int64_t){from}, to, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)
#if defined(__x86_64__) || defined(__i386__)
#define relax() __asm__ __volatile__("pause" ::: "memory")
#elif defined(__aarch64__) || (defined(__arm__) && __ARM_ARCH >= 7)
#define relax() __asm__ __volatile__("yield" ::: "memory")
#else
#define relax() ((void)0)
#endif
#endif

int tersor_flag_set(int64_t *flag) { return atomic_swap(flag, 1) != 0; }

void tersor_flag_clear(int64_t *flag) { atomic_store(flag, 0); }

/* Looks at the next loop before a thread sleeps; some tens of microseconds, what the kernels between two loops take. */
#define SPIN 2000

/* Pieces of a share: enough for a fast core to overtake a slow one, few enough to cost nothing. */
#define PIECES 4

/* Iterations of the open loop that nobody took: the first in the upper half, the one behind the last in the lower. */
struct share {
  int64_t left;
  char line[56]; /* a cache line each: threads write them */
};

struct member {
  struct tersor_pool *pool;
  void *scratch;
  thread thread;
  int number; /* of its share; the caller's is 0 */
  int cpu;    /* or -1 */
};

struct tersor_pool {
  int64_t inside; /* threads that may look at the loop below; on a cache line of its own, as every thread writes it */
  char line[56];
  int64_t open;  /* number of the loop that may be entered, 0 when there is none */
  int64_t loops; /* loops so far */
  tersor_task task;
  const void *closure;
  int64_t piece;
  int64_t asleep;
  int64_t stopping;
  int64_t unbound; /* threads that could not be bound to their CPU */
  int64_t caller;  /* CPU that the caller was on when it last woke others, or -1 */
  int64_t started;
  lock lock;
  condition wake;
  int threads, running;
  struct share *shares;
  struct member members[1];
};

static size_t rounded(size_t size) { return (size + 63) / 64 * 64; }

static size_t members_bytes(int threads) {
  return rounded(sizeof(struct tersor_pool) + (size_t)threads * sizeof(struct member));
}

size_t tersor_pool_bytes(int threads) { return members_bytes(threads) + (size_t)threads * sizeof(struct share); }

/* Runs pieces of a share, from its front or its end, until it is empty. */
static void take_pieces(struct tersor_pool *pool, struct share *share, int front, void *scratch) {
  for (;;) {
    const int64_t left = atomic_load(&share->left);
    const int64_t begin = left >> 32, end = left & INT32_MAX;
    if (begin >= end) return;
    const int64_t size = end - begin < pool->piece ? end - begin : pool->piece;
    const int64_t rest = front ? left + (size << 32) : left - size;
    if (!atomic_replace(&share->left, left, rest)) continue;
    if (front)
      pool->task(pool->closure, scratch, begin, begin + size);
    else
      pool->task(pool->closure, scratch, end - size, end);
  }
}

static void take_part(struct tersor_pool *pool, int number, void *scratch) {
  take_pieces(pool, &pool->shares[number], 1, scratch);
  for (int i = 1; i < pool->threads; i++) take_pieces(pool, &pool->shares[(number + i) % pool->threads], 0, scratch);
}

static void join_loop(struct member *member, int64_t *last) {
  struct tersor_pool *pool = member->pool;
  atomic_add(&pool->inside, 1);
  const int64_t open = atomic_load(&pool->open); /* after "inside": the caller closes, then looks at it */
  if (open != 0 && open != *last) {
    take_part(pool, member->number, member->scratch);
    *last = open;
  }
  atomic_add(&pool->inside, -1);
}

static int bind_to(int cpu) {
  if (cpu < 0) return 0;
#if defined(__linux__)
  cpu_set_t set;
  if (cpu >= CPU_SETSIZE) return 1;
  CPU_ZERO(&set);
  CPU_SET(cpu, &set);
  return sched_setaffinity(0, sizeof set, &set) != 0;
#elif defined(_WIN32)
  return cpu >= 64 || SetThreadAffinityMask(GetCurrentThread(), (DWORD_PTR)1 << cpu) == 0;
#else
  return 1;
#endif
}

static int current_cpu(void) {
#if defined(__linux__)
  return sched_getcpu();
#else
  return -1;
#endif
}

/* A thread that wakes on the caller's CPU would only take time from it, and schedulers may leave it there for
 * milliseconds: it goes to the others of the CPUs that it may use. */
static void keep_off(int cpu, const void *allowed) {
#if defined(__linux__)
  if (cpu < 0 || cpu >= CPU_SETSIZE || current_cpu() != cpu) return;
  cpu_set_t set = *(const cpu_set_t *)allowed;
  CPU_CLR(cpu, &set);
  if (CPU_COUNT(&set) != 0) sched_setaffinity(0, sizeof set, &set);
#else
  (void)cpu;
  (void)allowed;
#endif
}

static void work(struct member *member) {
  struct tersor_pool *pool = member->pool;
  int64_t last = 0;
  if (bind_to(member->cpu)) atomic_add(&pool->unbound, 1);
#if defined(__linux__)
  cpu_set_t allowed;
  const int free_to_move = member->cpu < 0 && sched_getaffinity(0, sizeof allowed, &allowed) == 0;
#else
  const int allowed = 0, free_to_move = 0;
#endif
  atomic_add(&pool->started, 1);
  while (!atomic_load(&pool->stopping)) {
    int64_t open = 0;
    for (int i = 0; i < SPIN && !atomic_load(&pool->stopping); i++) {
      open = atomic_load(&pool->open);
      if (open != 0 && open != last) break;
      relax();
    }
    if (open != 0 && open != last) {
      join_loop(member, &last);
      continue;
    }
    lock_take(&pool->lock);
    atomic_add(&pool->asleep, 1);
    for (;;) { /* "asleep" first, then "open": who opens a loop looks at them in the other order */
      open = atomic_load(&pool->open);
      if ((open != 0 && open != last) || atomic_load(&pool->stopping)) break;
      condition_wait(&pool->wake, &pool->lock);
    }
    atomic_add(&pool->asleep, -1);
    lock_give(&pool->lock);
    if (free_to_move) keep_off((int)atomic_load(&pool->caller), &allowed);
  }
}

#ifdef _WIN32
static DWORD WINAPI entry(LPVOID member) {
  work(member);
  return 0;
}
#else
static void *entry(void *member) {
  work(member);
  return NULL;
}
#endif

void tersor_parallel(struct tersor_worker *worker, tersor_task task, const void *closure, int64_t count) {
  struct tersor_pool *pool = worker->pool;
  if (pool == NULL || count < 2 || count > INT32_MAX) {
    task(closure, worker->scratch, 0, count);
    return;
  }
  pool->task = task;
  pool->closure = closure;
  pool->piece = count / (PIECES * (int64_t)pool->threads);
  if (pool->piece < 1) pool->piece = 1;
  for (int64_t i = 0; i < pool->threads; i++) {
    const int64_t begin = count * i / pool->threads, end = count * (i + 1) / pool->threads;
    atomic_store(&pool->shares[i].left, begin << 32 | end);
  }
  pool->loops++;
  atomic_store(&pool->open, pool->loops);
  if (atomic_load(&pool->asleep) != 0) {
    atomic_store(&pool->caller, current_cpu());
    lock_take(&pool->lock);
    condition_wake(&pool->wake);
    lock_give(&pool->lock);
  }
  take_part(pool, 0, worker->scratch);
  atomic_store(&pool->open, 0);
  for (int i = 0; atomic_load(&pool->inside) != 0; i++) {
    if (i < SPIN)
      relax();
    else
      yield();
  }
}

int tersor_pool_start(struct tersor_pool *pool, int threads, const int *cpus, char *scratch, size_t scratch_bytes) {
  pool->inside = pool->open = pool->loops = 0;
  pool->asleep = pool->stopping = pool->unbound = pool->started = 0;
  pool->caller = -1;
  pool->task = NULL;
  pool->closure = NULL;
  pool->piece = 0;
  pool->threads = threads;
  pool->running = 0;
  pool->shares = (struct share *)((char *)pool + members_bytes(threads));
  lock_init(&pool->lock);
  condition_init(&pool->wake);
  for (int i = 1; i < threads; i++) {
    struct member *member = &pool->members[pool->running];
    member->pool = pool;
    member->scratch = scratch + (size_t)i * scratch_bytes;
    member->number = i;
    member->cpu = cpus ? cpus[i] : -1;
#ifdef _WIN32
    member->thread = CreateThread(NULL, 0, entry, member, 0, NULL);
    const int failed = member->thread == NULL;
#else
    const int failed = pthread_create(&member->thread, NULL, entry, member) != 0;
#endif
    if (failed) {
      tersor_pool_stop(pool);
      return 1;
    }
    pool->running++;
  }
  if (cpus) { /* only then is there something to wait for */
    while (atomic_load(&pool->started) < pool->running) yield();
    if (atomic_load(&pool->unbound)) {
      tersor_pool_stop(pool);
      return 2;
    }
  }
  return 0;
}

void tersor_pool_stop(struct tersor_pool *pool) {
  lock_take(&pool->lock);
  atomic_store(&pool->stopping, 1);
  condition_wake(&pool->wake);
  lock_give(&pool->lock);
  for (int i = 0; i < pool->running; i++) {
#ifdef _WIN32
    WaitForSingleObject(pool->members[i].thread, INFINITE);
    CloseHandle(pool->members[i].thread);
#else
    pthread_join(pool->members[i].thread, NULL);
#endif
  }
  lock_end(&pool->lock);
  condition_end(&pool->wake);
}
