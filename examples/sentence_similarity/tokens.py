"""Prints the token ids of a sentence, for similarity.c: python tokens.py MODEL_FOLDER "A sentence." """

import sys
from pathlib import Path

from tokenizers import Tokenizer

folder, sentence = sys.argv[1:]
tokenizer = Tokenizer.from_file(str(Path(folder, "tokenizer.json")))
tokenizer.no_padding()  # the file may ask for padding to a fixed length
print(*tokenizer.encode(sentence).ids)
