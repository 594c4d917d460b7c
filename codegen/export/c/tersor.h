/* A model compiled by Tersor, as plain C: needs libc, libm and threads, and nothing else.
 *
 *   tersor_model model;                                      the weights, which any number of sessions share
 *   tersor_session *session;                                 threads, workspace and states of one caller
 *   tersor_model_open(&model, "weights.bin");
 *   tersor_session_create(&session, &model, NULL);
 *   tersor_NAME_arguments arguments = {0};                   sizes, inputs, memory for the outputs
 *   tersor_NAME(session, &arguments);
 *   tersor_session_destroy(session);
 *   tersor_model_close(&model);
 *
 * Everything returns TERSOR_OK or another status; tersor_message tells what it means. A call of the model allocates
 * nothing. Sessions may be used from any thread, each by one at a time.
 */
#ifndef TERSOR_H
#define TERSOR_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32) && defined(TERSOR_DLL) /* while the DLL is built */
#define TERSOR_API __declspec(dllexport)
#elif defined(__GNUC__) && !defined(_WIN32)
#define TERSOR_API __attribute__((visibility("default")))
#else
#define TERSOR_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum {
  TERSOR_OK = 0,
  TERSOR_NULL_POINTER = 1,
  TERSOR_WRONG_SIZE = 2,
  TERSOR_WRONG_COUNT = 3,
  TERSOR_CANNOT_READ = 4,
  TERSOR_WRONG_WEIGHTS = 5,
  TERSOR_NOT_ALIGNED = 6,
  TERSOR_MEMORY_TOO_SMALL = 7,
  TERSOR_OUT_OF_MEMORY = 8,
  TERSOR_WRONG_THREADS = 9,
  TERSOR_NO_THREADS = 10,
  TERSOR_WRONG_CPUS = 11,
  TERSOR_BUSY = 12,
  TERSOR_OUTSIDE_STATE = 13,
  TERSOR_RESET_NEEDED = 14
};

/* What a status means, in English. */
TERSOR_API const char *tersor_message(int status);

/* The weights; its members are nobody's business. */
typedef struct tersor_model {
  const void *weights;
  size_t bytes;
  void *mapping;
} tersor_model;

/* Maps the file of weights into memory; its size and its header are checked. */
TERSOR_API int tersor_model_open(tersor_model *model, const char *path);

/* Takes the contents of that file from memory, at a multiple of 64 bytes, which must stay: weights linked in. */
TERSOR_API int tersor_model_use(tersor_model *model, const void *weights, size_t bytes);

/* Reads all weights and compares their checksum. */
TERSOR_API int tersor_model_check(const tersor_model *model);

/* No session of the model may be left. */
TERSOR_API void tersor_model_close(tersor_model *model);

typedef struct tersor_session tersor_session;

/* Zeros, or no options at all, are the defaults. */
typedef struct tersor_options {
  int threads;         /* of a call, its caller included; 0 is 1 */
  const int *cpus;     /* the CPU that each thread is bound to; the first, the caller's, is not looked at */
  void *memory;        /* for everything the session needs; NULL: it is allocated */
  size_t memory_bytes; /* of it, at least tersor_session_bytes(threads) */
} tersor_options;

/* Memory that a session takes; 0 for a number of threads that cannot be. */
TERSOR_API size_t tersor_session_bytes(int threads);

/* Starts a session: all states are zeros. Everything that is ever allocated is allocated here. */
TERSOR_API int tersor_session_create(tersor_session **session, const tersor_model *model, const tersor_options *options);

/* All states are zeros again. */
TERSOR_API int tersor_session_reset(tersor_session *session);

/* Ends its threads and frees what was allocated. */
TERSOR_API void tersor_session_destroy(tersor_session *session);
@functions@
#ifdef __cplusplus
}
#endif
#endif
