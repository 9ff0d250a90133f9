"""Quantize one ONNX network to int8 with NNCF; runs in its own environment.

    python nncf_run.py FOLDER

FOLDER/job.json names the float file, the folder of arrays (calibration.npz: entries
``batch/input name``; test.npy where the network takes images), the ``backend`` (``onnx`` or
``openvino``) and whether the network is a ``transformer``. Images calibrate one at a time, as
NNCF advises; everything that is not named is its default. Writes figures.json and model.onnx, or
model.xml with model.bin and predictions.npy (the class of every test image, one thread, float
layers in float32).
"""

import importlib.metadata
import json
import sys
import time
from pathlib import Path

import nncf
import numpy as np


def items(path, single):
    """Calibration inputs by name, one image at a time if ``single``."""
    found = {}
    with np.load(path) as arrays:
        for key in arrays.files:
            batch, name = key.split("/")
            found.setdefault(batch, {})[name] = arrays[key]
    for batch in found.values():
        rows = len(next(iter(batch.values())))
        step = 1 if single else rows
        for i in range(0, rows, step):
            yield {name: array[i : i + step] for name, array in batch.items()}


def classes(model, test):
    """The class of every test image, in OpenVINO."""
    import openvino as ov

    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = ov.Core().compile_model(model, "CPU", settings)
    parts = [test[i : i + 50] for i in range(0, len(test), 50)]
    return np.concatenate([compiled([np.array(part)])[0].argmax(-1) for part in parts])


def main():
    out = Path(sys.argv[1])
    job = json.loads((out / "job.json").read_text())
    data = Path(job["data"])
    inputs = list(items(data / "calibration.npz", not job["transformer"]))
    options = {"model_type": nncf.ModelType.TRANSFORMER} if job["transformer"] else {}
    wall, cpu = time.perf_counter(), time.process_time()
    if job["backend"] == "onnx":
        import onnx

        model = onnx.load(job["model"])
    else:
        import openvino as ov

        model = ov.Core().read_model(job["model"])
    quantized = nncf.quantize(model, nncf.Dataset(inputs), subset_size=len(inputs), **options)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    if job["backend"] == "onnx":
        onnx.save(quantized, str(out / "model.onnx"))
    else:
        ov.save_model(quantized, str(out / "model.xml"), compress_to_fp16=False)
        test = np.load(data / "test.npy", mmap_mode="r")
        np.save(out / "predictions.npy", classes(str(out / "model.xml"), test))
    figures = {
        "tool_version": importlib.metadata.version("nncf"),
        "openvino": importlib.metadata.version("openvino"),
        "cpu_seconds": cpu,
        "wall_seconds": wall,
    }
    (out / "figures.json").write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
