"""Deep Compression (Han et al. 2016) of ResNet-20: pruned, clustered, entropy-coded.

    python benchmarks/deep_compression.py [codebook integers untrained] [--steps 4000] [--keep DIR]

Each takes about 20 minutes on one core, `untrained` half a minute. Zeros grow while the network
trains with the quantizers of its file, taught by the float network on the 20,000 training images;
weights are one of 2^3 values of a codebook of their layer, or 3-bit integers; then the file is
entropy-coded. What is scored on the test split is the file that ``autoquant unpack`` makes of
it. ``--keep``: a folder for the trained files; one that is there is not trained again. Needs
AUTOQUANT_DATA.
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
SPARSITY = {"layer1.*": 0.4, "layer2.*": 0.6, "layer3.*": 0.7}  # three quarters are in layer3
TRAINING = {"batch_size": 64, "learning_rate": 1.5e-3, "alpha": 0.9, "seed": 0}


def candidate(layers: list[str], codebook: bool, training: dict[str, Any] | None) -> Candidate:
    """3 bits and a share of zeros by stage; the first and the last layer as 8-bit integers."""
    found = {}
    for name in layers:
        shares = [share for pattern, share in SPARSITY.items() if fnmatchcase(name, pattern)]
        sparse = LayerChoice(BITS, 8, sparsity=shares[0] if shares else 0.0, codebook=codebook)
        found[name] = sparse if shares else LayerChoice(8, 8)
    return Candidate(found, training=training)


class Bench:
    """What is prepared once, and rows of figures."""

    def __init__(self, folder: Path | None) -> None:
        import cifar10

        self.task, self.folder = cifar10.resnet20(), folder
        self.layers = [x.name for x in lower(self.task).layers]
        both = candidate(self.layers, True, None)
        self.context: Context = prepare(self.task, space=both, latency=False, evaluation_workers=1)
        self.test = evaluator_for(self.task, self.context.graph, "test", workers=1)
        self.float = float_model(self.context.original)
        self.reference = self.test.set_reference(OnnxRuntime().open(self.float))

    def trained(self, name: str, steps: int) -> dict[str, Any]:
        c, settings = self.context, {**TRAINING, "steps": steps}
        kept = None if self.folder is None else self.folder / f"{name}.onnx"
        found = resolve(c.graph, candidate(self.layers, name == "codebook", settings))
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

    def untrained(self) -> dict[str, Any]:
        artifact = self.context.compress(candidate(self.layers, True, None))
        return {"name": "codebook, not trained", **self.row(artifact.model)}

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
        "sparsity": SPARSITY,
        "bar": {"times_smaller": BAR, "aim": AIM, "test": LEAST},
        "reached": {
            r["name"]: r["times_smaller"] >= BAR and r["test"] >= LEAST
            for r in rows
            if "settings" in r
        },
    }
    record("deep_compression", {**about, "rows": rows})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", default=["untrained", "codebook"])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    bench = Bench(options.keep)
    for case in options.cases:
        row = bench.untrained() if case == "untrained" else bench.trained(case, options.steps)
        print(json.dumps(row), flush=True)
        keep(row)


if __name__ == "__main__":
    main()
