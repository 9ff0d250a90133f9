"""Deep Compression (Han et al. 2016) of ResNet-20: pruned, clustered, entropy-coded.

    python benchmarks/deep_compression.py [codebook integers untrained polished] [--steps 4000]
        [--sparsity 0.4 0.6 0.7] [--learning-rate 0.001] [--keep DIR]

A case takes a fifth of a second a step on one core, `untrained` and `polished` a minute. Zeros
grow while the network trains with the quantizers of its file, taught by the float network on the
20,000 training images; weights are one of 2^3 values of a codebook of their layer, or 3-bit
integers; then the file is entropy-coded. What is scored on the test split is
the file that ``autoquant unpack`` makes of it. ``--keep``: a folder for the trained files; one that
is there is not trained again. Needs AUTOQUANT_DATA.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from record import RESULTS, record

from autoquant.candidate import Candidate, LayerChoice
from autoquant.compress import coding, compress
from autoquant.compress.lower import lower
from autoquant.compress.qat import train
from autoquant.compress.qdq import resolve
from autoquant.runtime import OnnxRuntime
from autoquant.search.trial import Context, evaluator_for, float_model, prepare

sys.path.insert(0, str(Path(__file__).parent / "tasks"))

BAR, AIM, LEAST = 16.0, 20.0, 90.5  # times smaller, and so much at test top-1
BITS = 3
STAGES = ("layer1.*", "layer2.*", "layer3.*")  # the last has three quarters of the weights
TRAINING = {"batch_size": 64, "alpha": 0.9, "seed": 0}


def candidate(
    layers: list[str],
    sparsity: list[float],
    codebook: bool,
    training: dict[str, Any] | None = None,
    polish: bool = False,
) -> Candidate:
    """3 bits and a share of zeros by stage; the first and the last layer as 8-bit integers."""
    found = {}
    stages = list(zip(STAGES, sparsity, strict=True))
    for name in layers:
        shares = [share for pattern, share in stages if fnmatchcase(name, pattern)]
        sparse = LayerChoice(BITS, 8, sparsity=shares[0] if shares else 0.0, codebook=codebook)
        found[name] = sparse if shares else LayerChoice(8, 8)
    return Candidate(found, training=training, polish=polish)


class Bench:
    """What is prepared once, and rows of figures."""

    def __init__(self, sparsity: list[float], folder: Path | None) -> None:
        import cifar10

        self.task, self.folder, self.sparsity = cifar10.resnet20(), folder, sparsity
        self.layers = [x.name for x in lower(self.task).layers]
        both = candidate(self.layers, sparsity, True)
        self.context: Context = prepare(self.task, space=both, latency=False, evaluation_workers=1)
        self.test = evaluator_for(self.task, self.context.graph, "test", workers=1)
        self.float = float_model(self.context.original)
        self.reference = self.test.set_reference(OnnxRuntime().open(self.float))

    def trained(self, name: str, steps: int, rate: float) -> dict[str, Any]:
        c, settings = self.context, {**TRAINING, "steps": steps, "learning_rate": rate}
        kept = None if self.folder is None else self.folder / f"{name}.onnx"
        chosen = candidate(self.layers, self.sparsity, name == "codebook", settings)
        found = resolve(c.graph, chosen)
        about: dict[str, Any] = {"settings": settings}
        if kept is None or not kept.is_file():
            start, busy = time.perf_counter(), time.process_time()
            made = train(c.graph, found, c.calibration, c.bank, "onnxruntime", self.task)
            model = compress(made.graph, found, made.calibration, made.bank, "onnxruntime").model
            about["training_seconds"] = round(time.perf_counter() - start)
            about["training_cpu_seconds"] = round(time.process_time() - busy)
            if kept is not None:
                kept.parent.mkdir(parents=True, exist_ok=True)
                kept.write_bytes(model)
                kept.with_suffix(".json").write_text(json.dumps(about))
        else:
            model, about = kept.read_bytes(), json.loads(kept.with_suffix(".json").read_text())
        return {"name": name, **self.row(model), **about}

    def untrained(self, polish: bool) -> dict[str, Any]:
        chosen = candidate(self.layers, self.sparsity, codebook=not polish, polish=polish)
        name = "integers, polished" if polish else "codebook, not trained"
        return {"name": name, **self.row(self.context.compress(chosen).model)}

    def row(self, model: bytes) -> dict[str, Any]:
        """Sizes, and scores of the unpacked file."""
        stored = coding.compress(model)
        with tempfile.TemporaryDirectory() as folder:
            packed, unpacked = Path(folder) / "model.aqz", Path(folder) / "model.onnx"
            packed.write_bytes(stored)
            command = [sys.executable, "-m", "autoquant", "unpack", packed, "-o", unpacked]
            subprocess.run(command, check=True, capture_output=True)
            session = OnnxRuntime().open(unpacked.read_bytes())
        score = self.test.score(session)
        return {
            "sparsity": dict(zip(STAGES, self.sparsity, strict=True)),
            "float_bytes": len(self.float),
            "size_bytes": len(model),
            "stored_bytes": len(stored),
            "times_smaller": round(len(self.float) / len(stored), 2),
            "float_test": round(100 * self.reference.value, 3),
            "test": round(100 * score.value, 3),
            "drop_points": round(100 * score.drop, 3),
            "drop_standard_error_points": round(100 * score.drop_standard_error, 3),
            "validation": round(100 * self.context.evaluator.score(session).value, 3),
        }


def keep(row: dict[str, Any]) -> None:
    """Write a row over that of the same name in the record."""
    path = RESULTS / "deep_compression.json"
    known = json.loads(path.read_text())["rows"] if path.is_file() else []
    rows = sorted([*(r for r in known if r["name"] != row["name"]), row], key=lambda r: r["name"])
    about = {
        "network": "resnet20",
        "split": "test[2000:]",
        "bits": BITS,
        "bar": {"times_smaller": BAR, "aim": AIM, "test": LEAST},
        "reached": {r["name"]: r["times_smaller"] >= BAR and r["test"] >= LEAST for r in rows},
    }
    record("deep_compression", {**about, "rows": rows})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", default=["untrained", "codebook"])
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--sparsity", type=float, nargs=3, default=[0.4, 0.6, 0.7])
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    bench = Bench(options.sparsity, options.keep)
    for case in options.cases:
        if case in ("untrained", "polished"):
            row = bench.untrained(case == "polished")
        else:
            row = bench.trained(case, options.steps, options.learning_rate)
        print(json.dumps(row), flush=True)
        keep(row)


if __name__ == "__main__":
    main()
