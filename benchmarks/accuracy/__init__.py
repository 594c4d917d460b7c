"""Accuracy of trained models on real data, recipe by recipe, beside the model as it was and beside peers.

    python -m benchmarks.accuracy minilm --data stsb-en-test.csv
    python -m benchmarks.accuracy minilm --data stsb-en-test.csv --calibration stsb-en-train.csv --recipe int8
    python -m benchmarks.accuracy smollm2 --data wiki.test.raw --calibration wiki.valid.raw --recipe int8,int8-dynamic

Data are files that the repository does not hold, models come from PyPI packages (docs/benchmarks.md).
"""
