/* How alike in meaning two sentences are: token ids in, cosine out.
 *
 *   similarity weights.bin "101 7592 2088 102" "101 2204 2851 102"
 *
 * Plain C99 around a sentence encoder that was exported by Tersor under the name "encoder", and has an input of ids, one
 * of ones and zeros that says which are real, and hidden states of WIDTH numbers each: all-MiniLM-L6-v2, for example.
 * A sentence's embedding is the mean of the hidden states of its real tokens, as the model's authors define it.
 */
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "encoder.h"

enum { SENTENCES = 2, LONGEST = 256, WIDTH = 384 }; /* WIDTH: see last_hidden_state in encoder.h */

static int64_t ids[SENTENCES * LONGEST], mask[SENTENCES * LONGEST];
static float hidden[SENTENCES * LONGEST * WIDTH], pooled[SENTENCES * WIDTH];

/* Reads ids from a text, LONGEST at most; returns how many, or -1 for a text that is none of ids. */
static int read_ids(const char *text, int64_t *to) {
  for (int count = 0;; count++) {
    char *end;
    errno = 0;
    const long long id = strtoll(text, &end, 10);
    if (end == text) return text[strspn(text, " \t\r\n")] == '\0' && count > 0 ? count : -1;
    if (count == LONGEST || errno != 0) return -1;
    to[count] = id;
    text = end;
  }
}

/* The mean of the hidden states [length, WIDTH] where the mask is 1, made one long. */
static void embed(const float *states, const int64_t *real, int64_t length, double *embedding) {
  double square = 0;
  for (int i = 0; i < WIDTH; i++) {
    embedding[i] = 0;
    for (int64_t token = 0; token < length; token++)
      if (real[token]) embedding[i] += states[token * WIDTH + i];
    square += embedding[i] * embedding[i];
  }
  for (int i = 0; i < WIDTH; i++) embedding[i] /= sqrt(square); /* whatever the sum was divided by before */
}

int main(int count, char **words) {
  if (count != 2 + SENTENCES) {
    fprintf(stderr, "usage: %s weights.bin \"ID ID ...\" \"ID ID ...\"\n", words[0]);
    return 2;
  }
  static int64_t read[SENTENCES][LONGEST];
  int lengths[SENTENCES], length = 0;
  for (int i = 0; i < SENTENCES; i++) {
    lengths[i] = read_ids(words[2 + i], read[i]);
    if (lengths[i] < 0) {
      fprintf(stderr, "not between 1 and %d token ids: %s\n", LONGEST, words[2 + i]);
      return 2;
    }
    if (lengths[i] > length) length = lengths[i];
  }
  for (int i = 0; i < SENTENCES; i++) { /* one batch: the shorter sentence is padded */
    for (int token = 0; token < lengths[i]; token++) {
      ids[i * length + token] = read[i][token];
      mask[i * length + token] = 1;
    }
  }

  encoder_model model;
  encoder_session *session = NULL;
  const encoder_options options = {.threads = 2};
  const encoder_main_arguments arguments = {
      .batch = SENTENCES,
      .length = length,
      .input_ids = ids,
      .input_ids_count = (size_t)(SENTENCES * length),
      .attention_mask = mask,
      .attention_mask_count = (size_t)(SENTENCES * length),
      .last_hidden_state = hidden,
      .last_hidden_state_count = (size_t)(SENTENCES * length * WIDTH),
      .pooler_output = pooled,
      .pooler_output_count = SENTENCES * WIDTH,
  };
  int status = encoder_model_open(&model, words[1]);
  if (status == ENCODER_OK) status = encoder_session_create(&session, &model, &options);
  if (status == ENCODER_OK) status = encoder_main(session, &arguments);
  encoder_session_destroy(session);
  encoder_model_close(&model);
  if (status != ENCODER_OK) {
    fprintf(stderr, "%s: %s\n", words[1], encoder_message(status));
    return 1;
  }

  double embeddings[SENTENCES][WIDTH], cosine = 0;
  for (int i = 0; i < SENTENCES; i++)
    embed(hidden + (size_t)i * (size_t)length * WIDTH, mask + (size_t)i * (size_t)length, length, embeddings[i]);
  for (int i = 0; i < WIDTH; i++) cosine += embeddings[0][i] * embeddings[1][i];
  printf("%.7f\n", cosine);
  return 0;
}
