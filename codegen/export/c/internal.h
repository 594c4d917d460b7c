/* What the sources of an export share; not for its users. */
#ifndef TERSOR_INTERNAL_H
#define TERSOR_INTERNAL_H

#include "tersor.h"
#include "layout.h"
#include "threads.h"

struct tersor_session {
  struct tersor_worker worker; /* of the thread that calls */
  const tersor_model *model;
  char *weights, *states, *workspace;
  void *owned;  /* the session's memory, if it was allocated here */
  int64_t busy; /* 1 while a call is under way */
  int failed;   /* the states are half those before and half those behind a call */
};

/* Begins a call; the session is another's unless the result is TERSOR_OK or TERSOR_RESET_NEEDED. */
int tersor_enter(tersor_session *session);

/* Ends a call; returns its status. */
int tersor_leave(tersor_session *session, int status);

#endif
