"""Parts of the fuzzer that do on purpose what a model must never make us do."""

import os
import signal
import time

from benchmarks.fuzz.case import Outcome
from tersor.errors import InputError


class Broken:
    limit, memory = 0.5, 64 << 20

    def run(self, rng, stage):
        seed = self.kinds[rng.random()]
        stage("doing it")
        if seed == 0:
            os.kill(os.getpid(), signal.SIGSEGV)
        if seed == 1:
            time.sleep(60)
        if seed == 2:
            held = bytearray(256 << 20)
            return Outcome("right", str(len(held)))
        if seed == 3:
            raise ZeroDivisionError("untyped")
        if seed == 4:
            raise InputError("typed")
        return Outcome("right")

    def __init__(self):
        import random

        self.kinds = {random.Random(i).random(): i for i in range(6)}
