"""Random models and damaged files: no wrong answer, no crash, no hang, and every refusal a `TersorError`.

    python -m benchmarks.fuzz graphs|soups|files --count N --seed S --minutes M

graphs   random programs of the dialect (`programs`), compiled and compared with torch
soups    random, often invalid, graphs of ONNX operators, captured and compared with onnxruntime
files    small valid ONNX files, damaged or made hostile (`mutations`), captured under watch (`watch`)

Cases are numbered from the seed on; a case depends on its number alone, so `--seed NUMBER --count 1` replays it. They
run in a worker process (`worker`) whose crash, hang or memory is seen and attributed. Finished ones are in a journal:
a run that is killed goes on where it was. `summary` counts and writes the report.
"""
