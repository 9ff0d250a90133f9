"""Latency of several files in OpenVINO, side by side; runs in NNCF's environment.

    python openvino_latency.py FOLDER

FOLDER/job.json: ``models``, label → path; ``inputs``, an .npz with the inputs of one run by
name. One thread, float layers in float32, every session a run a round
(`autoquant.runtime.measure`). Writes figures.json: label → milliseconds, None where OpenVINO
does not take the file.
"""

import json
import sys
from pathlib import Path

import numpy as np
import openvino as ov

from autoquant.runtime import measure


class Compiled:
    """A compiled model as `measure` wants it."""

    def __init__(self, path, names):
        settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
        self.request = ov.Core().compile_model(path, "CPU", settings).create_infer_request()
        self.names = names

    def run(self, inputs):
        self.request.infer(dict(zip(self.names, inputs, strict=True)), share_inputs=True)


def main():
    out = Path(sys.argv[1])
    job = json.loads((out / "job.json").read_text())
    with np.load(job["inputs"]) as arrays:
        inputs = {name: arrays[name] for name in arrays.files}
    sessions, refused = {}, {}
    for label, path in job["models"].items():
        try:
            sessions[label] = Compiled(path, list(inputs))
        except RuntimeError as error:
            refused[label] = " ".join(str(error).split())[:200]
    found = measure(sessions, list(inputs.values()), threads=1, runtime="openvino", seconds=1.0)
    figures = {"version": ov.__version__, "refused": refused}
    figures["latency_ms"] = {label: latency.latency_ms for label, latency in found.items()}
    (out / "figures.json").write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
