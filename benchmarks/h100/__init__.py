"""What an hour with a GPU is to decide: is it right, how fast is it, what does it learn.

Three programs, each of at most ten minutes, to be run in this order:

    python -m benchmarks.h100.correct
    python -m benchmarks.h100.speed
    python -m benchmarks.h100.train

Each line they print is a name, a number and `ok` or `FAIL`. `--device=cpu --quick` tries all of it.
"""
