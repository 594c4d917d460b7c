/* Weights and sessions of an exported model. Part of an export by Tersor; C99, libc and threads only. */
#if !defined(_WIN32) && !defined(_POSIX_C_SOURCE)
#define _POSIX_C_SOURCE 200809L
#endif
#include "internal.h"

#include <stdlib.h>
#include <string.h>

#ifdef _WIN32
#include <windows.h>
#else
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#endif

#define ALIGNMENT 64
#define MOST_THREADS 256

static uint32_t crc32(uint32_t crc, const unsigned char *data, size_t size) {
  uint32_t table[256];
  for (uint32_t i = 0; i < 256; i++) {
    table[i] = i;
    for (int bit = 0; bit < 8; bit++) table[i] = table[i] & 1 ? 0xEDB88320u ^ (table[i] >> 1) : table[i] >> 1;
  }
  crc = ~crc;
  for (size_t i = 0; i < size; i++) crc = table[(crc ^ data[i]) & 255] ^ (crc >> 8);
  return ~crc;
}

int tersor_model_use(tersor_model *model, const void *weights, size_t bytes) {
  if (model == NULL || weights == NULL) return TERSOR_NULL_POINTER;
  memset(model, 0, sizeof *model);
  if ((uintptr_t)weights % ALIGNMENT) return TERSOR_NOT_ALIGNED;
  if (bytes != TERSOR_WEIGHTS_BYTES || crc32(0, weights, TERSOR_HEADER_BYTES) != TERSOR_HEADER_CRC)
    return TERSOR_WRONG_WEIGHTS;
  model->weights = weights;
  model->bytes = bytes;
  return TERSOR_OK;
}

#ifdef _WIN32
static void *map_file(const char *path, size_t *bytes) {
  void *data = NULL;
  LARGE_INTEGER size;
  HANDLE file = CreateFileA(path, GENERIC_READ, FILE_SHARE_READ, NULL, OPEN_EXISTING, 0, NULL);
  if (file == INVALID_HANDLE_VALUE) return NULL;
  if (GetFileSizeEx(file, &size) && size.QuadPart > 0) {
    HANDLE mapping = CreateFileMappingA(file, NULL, PAGE_READONLY, 0, 0, NULL);
    if (mapping != NULL) {
      data = MapViewOfFile(mapping, FILE_MAP_READ, 0, 0, 0);
      CloseHandle(mapping);
    }
    *bytes = (size_t)size.QuadPart;
  }
  CloseHandle(file);
  return data;
}

static void unmap(void *data, size_t bytes) {
  (void)bytes;
  UnmapViewOfFile(data);
}
#else
static void *map_file(const char *path, size_t *bytes) {
  void *data = NULL;
  struct stat status;
  const int file = open(path, O_RDONLY);
  if (file < 0) return NULL;
  if (fstat(file, &status) == 0 && status.st_size > 0) {
    *bytes = (size_t)status.st_size;
    data = mmap(NULL, *bytes, PROT_READ, MAP_PRIVATE, file, 0);
    if (data == MAP_FAILED) data = NULL;
  }
  close(file);
  return data;
}

static void unmap(void *data, size_t bytes) { munmap(data, bytes); }
#endif

int tersor_model_open(tersor_model *model, const char *path) {
  if (model == NULL || path == NULL) return TERSOR_NULL_POINTER;
  memset(model, 0, sizeof *model);
  size_t bytes = 0;
  void *data = map_file(path, &bytes);
  if (data == NULL) return TERSOR_CANNOT_READ;
  const int status = tersor_model_use(model, data, bytes);
  if (status != TERSOR_OK) {
    unmap(data, bytes);
    return status;
  }
  model->mapping = data;
  return TERSOR_OK;
}

int tersor_model_check(const tersor_model *model) {
  if (model == NULL || model->weights == NULL) return TERSOR_NULL_POINTER;
  const unsigned char *weights = model->weights;
  const uint32_t crc = crc32(0, weights + TERSOR_HEADER_BYTES, TERSOR_WEIGHTS_BYTES - TERSOR_HEADER_BYTES);
  return crc == TERSOR_WEIGHTS_CRC ? TERSOR_OK : TERSOR_WRONG_WEIGHTS;
}

void tersor_model_close(tersor_model *model) {
  if (model == NULL) return;
  if (model->mapping != NULL) unmap(model->mapping, model->bytes);
  memset(model, 0, sizeof *model);
}

static size_t rounded(size_t size) { return (size + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; }

static size_t pool_bytes(int threads) { return threads > 1 ? tersor_pool_bytes(threads) : 0; }

size_t tersor_session_bytes(int threads) {
  if (threads == 0) threads = 1;
  if (threads < 1 || threads > MOST_THREADS) return 0;
  return ALIGNMENT + rounded(sizeof(tersor_session)) + pool_bytes(threads) + TERSOR_STATE_BYTES +
         TERSOR_WORKSPACE_BYTES + (size_t)threads * TERSOR_SCRATCH_BYTES;
}

int tersor_session_create(tersor_session **session, const tersor_model *model, const tersor_options *options) {
  static const tersor_options defaults;
  if (session == NULL) return TERSOR_NULL_POINTER;
  *session = NULL;
  if (model == NULL || model->weights == NULL) return TERSOR_NULL_POINTER;
  if (options == NULL) options = &defaults;
  const int threads = options->threads == 0 ? 1 : options->threads;
  const size_t bytes = tersor_session_bytes(threads);
  if (bytes == 0) return TERSOR_WRONG_THREADS;
  void *memory = options->memory, *owned = NULL;
  if (memory == NULL) {
    memory = owned = malloc(bytes);
    if (memory == NULL) return TERSOR_OUT_OF_MEMORY;
  } else if (options->memory_bytes < bytes) {
    return TERSOR_MEMORY_TOO_SMALL;
  }
  char *at = (char *)(((uintptr_t)memory + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
  tersor_session *made = (tersor_session *)at;
  memset(made, 0, sizeof *made);
  at += rounded(sizeof *made);
  struct tersor_pool *pool = (struct tersor_pool *)at;
  at += pool_bytes(threads);
  made->model = model;
  made->weights = (char *)(uintptr_t)model->weights;
  made->owned = owned;
  made->states = at;
  made->workspace = at += TERSOR_STATE_BYTES;
  made->worker.scratch = at += TERSOR_WORKSPACE_BYTES;
  memset(made->states, 0, TERSOR_STATE_BYTES);
  if (threads > 1) {
    const int failed = tersor_pool_start(pool, threads, options->cpus, at, TERSOR_SCRATCH_BYTES);
    if (failed) {
      free(owned);
      return failed == 2 ? TERSOR_WRONG_CPUS : TERSOR_NO_THREADS;
    }
    made->worker.pool = pool;
  }
  *session = made;
  return TERSOR_OK;
}

int tersor_session_reset(tersor_session *session) {
  const int status = tersor_enter(session);
  if (status == TERSOR_BUSY || status == TERSOR_NULL_POINTER) return status;
  memset(session->states, 0, TERSOR_STATE_BYTES);
  session->failed = 0;
  tersor_leave(session, TERSOR_OK);
  return TERSOR_OK;
}

void tersor_session_destroy(tersor_session *session) {
  if (session == NULL) return;
  if (session->worker.pool != NULL) tersor_pool_stop(session->worker.pool);
  free(session->owned);
}

int tersor_enter(tersor_session *session) {
  if (session == NULL) return TERSOR_NULL_POINTER;
  if (tersor_flag_set(&session->busy)) return TERSOR_BUSY;
  session->worker.status = 0;
  return session->failed ? TERSOR_RESET_NEEDED : TERSOR_OK;
}

int tersor_leave(tersor_session *session, int status) {
  tersor_flag_clear(&session->busy);
  return status;
}

const char *tersor_message(int status) {
  switch (status) {
    case TERSOR_OK: return "no error";
    case TERSOR_NULL_POINTER: return "a pointer that must not be null is";
    case TERSOR_WRONG_SIZE: return "a dimension lies outside its range";
    case TERSOR_WRONG_COUNT: return "a tensor has another number of elements than its shape says";
    case TERSOR_CANNOT_READ: return "the weights cannot be read: no such file, no permission, or an empty one";
    case TERSOR_WRONG_WEIGHTS: return "these are not the weights of this model, or they are damaged or cut off";
    case TERSOR_NOT_ALIGNED: return "the weights do not begin at a multiple of 64 bytes";
    case TERSOR_MEMORY_TOO_SMALL: return "the memory given for the session is too small";
    case TERSOR_OUT_OF_MEMORY: return "out of memory";
    case TERSOR_WRONG_THREADS: return "the number of threads must be between 1 and 256";
    case TERSOR_NO_THREADS: return "a thread could not be started";
    case TERSOR_WRONG_CPUS: return "a thread could not be bound to its CPU";
    case TERSOR_BUSY: return "the session is in use by another thread";
    case TERSOR_OUTSIDE_STATE: return "a position lies outside the state; reset the session";
    case TERSOR_RESET_NEEDED: return "an earlier call of this session failed half-way; reset it";
    default: return "unknown status";
  }
}
