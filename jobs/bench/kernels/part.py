"""One part of `shoal bench kernels`, in its own process: `python -m jobs.bench.kernels.part PART PLACE RATES`.

Prints a JSON row per case as soon as it is done. RATES: the rows of part machine, as JSON.
"""

from __future__ import annotations

import importlib
import json
import sys

import torch

from jobs.bench.kernels.case import run_case


def main(part: str, place: str, rates_json: str) -> None:
    device = torch.device("cuda" if place == "cuda" else "cpu")
    rates = {key: value for row in json.loads(rates_json) for key, value in row.items()}
    for case in importlib.import_module(f"jobs.bench.kernels.{part}").cases(place, device):
        row = run_case(case, device, rates, is_timed=place != "interpreter")
        print(json.dumps(row), flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main(*sys.argv[1:4])
