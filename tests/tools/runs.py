"""Runs of toy studies; other processes import them, so they need nothing that is slow to import."""

import time


def noted(x, seed, log, wait=0.0):
    "A run that writes down that it was made."
    with open(log, "a") as file:
        file.write(f"{x} {seed}\n")
    time.sleep(wait)
    return {"sum": x + seed, "padding": "x" * 20_000}


def fails_at_two(x):
    if x == 2:
        raise ZeroDivisionError("at two")
    return {"half": x / 2}
