"""Real networks: float figures, uniform 8/8, the kernels that run, file sizes by width.

    python benchmarks/networks.py            # all networks, about 5 minutes on two cores

For each network: the float metric on both splits and on their union, uniform 8-bit weights and
activations against float on the same test samples, the count of int8 kernels in the graph that
onnxruntime runs (uniform, and a mix in which every second layer is float), the size of the files
at 8, 4, 3 and 2 bits, and how far the predicted sizes are off. Needs AUTOQUANT_DATA.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from record import record

from autoquant.candidate import Candidate, LayerChoice
from autoquant.runtime import OnnxRuntime, kernels
from autoquant.search.trial import evaluator_for, float_model, prepare
from autoquant.tasks import load_task

TASKS = Path(__file__).parent / "tasks"
NETWORKS = {
    "resnet20": ("cifar10.py:resnet20", 0.9173, 0.003),
    "resnet8": ("cifar10.py:resnet8", 0.8719, 0.005),
    "efficientnet_lite0": ("imagenet.py:efficientnet_lite0", 0.8269, 0.010),
    "minilm": ("stsb.py:minilm", None, 0.005),
    "resnet20_onnx": ("cifar10.py:resnet20_data", 0.9173, 0.003),
}
INT8_CONV = ("QLinearConv",)
INT8_PRODUCT = ("QGemm", "QLinearMatMul", "MatMulIntegerToFloat")


def task(name: str, folder: Path):
    """The task of a network; the bare ONNX file is exported from the torch one first."""
    spec = str(TASKS / NETWORKS[name][0])
    if not name.endswith("_onnx"):
        return load_task(spec)
    import onnx

    from autoquant.compress.lower import export

    path = folder / "resnet20.onnx"
    onnx.save(export(load_task(str(TASKS / "cifar10.py:resnet20"))), str(path))
    return load_task(str(path), spec)


def measure(name: str, folder: Path) -> dict[str, object]:
    """All figures of one network."""
    start = time.perf_counter()
    found = task(name, folder)
    context = prepare(found, space=Candidate(), latency=False)
    graph = context.graph
    test = evaluator_for(found, graph, "test")
    reference = test.set_reference(OnnxRuntime().open(float_model(graph)))
    validation = context.evaluator
    assert validation.reference is not None
    result: dict[str, object] = {
        "layers": len(graph.layers),
        "float_validation": validation.reference.value,
        "float_test": reference.value,
    }
    samples = (validation.split.samples, test.split.samples)
    if reference.correct is not None:
        pooled = np.concatenate([validation.reference.correct, reference.correct]).mean()
        result["float_both"] = round(float(pooled), 6)

    def uniform(bits: int, every: int = 1) -> Candidate:
        chosen = [layer.name for i, layer in enumerate(graph.layers) if i % every == 0]
        return Candidate({layer: LayerChoice(bits, 8) for layer in chosen})

    artifact = context.compress(uniform(8))
    score = test.score(OnnxRuntime().open(artifact.model))
    result["int8_test"] = score.value
    result["int8_drop"] = score.drop
    result["int8_drop_standard_error"] = score.drop_standard_error
    result["samples"] = samples
    for label, every in (("uniform", 1), ("every_second", 2)):
        mixed = context.compress(uniform(8, every))
        ran = kernels(mixed.model)
        int8 = [graph.by_name[n] for n, c in mixed.candidate.layers.items() if not c.is_float]
        convolutions = sum(layer.kind == "Conv" for layer in int8)
        products = sum(layer.kind in ("Gemm", "MatMul") for layer in int8)
        result[f"kernels_{label}"] = {
            "int8_convolutions": [convolutions, sum(ran[k] for k in INT8_CONV)],
            "int8_products": [products, sum(ran[k] for k in INT8_PRODUCT)],
        }
    sizes, worst = {}, 0.0
    for bits in (8, 4, 3, 2):
        built = context.compress(uniform(bits))
        sizes[bits] = built.size_bytes
        predicted = context.cost.predict(built.candidate).size_bytes
        worst = max(worst, abs(predicted / built.size_bytes - 1))
    result["size_bytes"] = {"float": len(float_model(graph)), **sizes}
    result["size_4_over_8"] = sizes[4] / sizes[8]
    result["size_3_over_4"] = sizes[3] / sizes[4]
    result["size_prediction_worst"] = worst
    result["seconds"] = time.perf_counter() - start
    return result


def main() -> None:
    """Measure, check the bars, write the record."""
    import tempfile

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="*", default=list(NETWORKS))
    names = parser.parse_args().networks
    results, missed = {}, []
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            found = measure(name, Path(folder))
            results[name] = found
            _, whole, allowed = NETWORKS[name]
            if whole is not None and abs(found["float_both"] - whole) > 0.00006:
                missed.append(f"{name}: float {found['float_both']} is not {whole}")
            if found["int8_drop"] > allowed:
                missed.append(f"{name}: 8/8 drops {found['int8_drop']:.4f}, bar {allowed}")
            for label in ("uniform", "every_second"):
                for said, ran in found[f"kernels_{label}"].values():
                    if said != ran:
                        missed.append(
                            f"{name}: {said} layers are int8, {ran} kernels are ({label})"
                        )
            print(json.dumps({name: found}), flush=True)
    record("networks", {"networks": results, "missed": missed}, write=names == list(NETWORKS))
    print("missed:", missed or "nothing")


if __name__ == "__main__":
    main()
