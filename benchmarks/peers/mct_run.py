"""Quantize one network with Sony's Model Compression Toolkit; runs in its own environment.

    python mct_run.py FOLDER

FOLDER/job.json names the network's loader and its arguments, the folder of arrays
(calibration.npz: a batch an entry; test.npy: float32, N × C × H × W), and the setting: ``bits``
(average weight bits, 8 for no budget), ``hessian`` (scores weighted by Hessians), ``epochs`` (of
gradient-based rounding, 0 for none) and ``attention`` (its loss weighted by every sample's own
Hessian scores, the default, instead of the scores of 16 images). Writes predictions.npy (the
class of every test image), figures.json and, where the exporter manages it, model.onnx.
Everything that is not named is the toolkit's default: its IMX500 target has weights of 2, 4 or
8 bits, symmetric a channel, and activations of 8 bits with thresholds that are powers of two;
biases stay float.
"""

import functools
import importlib.util
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

try:
    import torchvision  # noqa: F401
except RuntimeError:
    # Its binary part does not load beside a CPU build of torch. The toolkit needs only the
    # Python part, which imports once these two operators are declared.
    for operator in ("nms", "qnms"):
        torch.library.define(
            f"torchvision::{operator}", "(Tensor dets, Tensor scores, float threshold) -> Tensor"
        )

import mct_quantizers
import model_compression_toolkit as mct

BATCH = 32


def load(job):
    """The float network, in eval mode."""
    spec = importlib.util.spec_from_file_location("loader", job["loader"])
    module = importlib.util.module_from_spec(spec)
    sys.dont_write_bytecode = True
    spec.loader.exec_module(module)
    return module.load(*job["arguments"])


def weights(model):
    """Every weight of a convolution or linear layer: (name, elements, bits)."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, mct_quantizers.PytorchQuantizationWrapper):
            for attribute, quantizer in module.weights_quantizers.items():
                elements = module.get_quantized_weights()[attribute].numel()
                found.append((f"{name}.{attribute}", elements, quantizer.num_bits))
    return found


def quantize(job, model, calibration):
    """The quantized module and what the toolkit says of it."""

    def representative():
        for i in range(0, len(calibration), BATCH):
            yield [torch.from_numpy(calibration[i : i + BATCH])]

    kinds = (torch.nn.Conv2d, torch.nn.Linear)
    elements = sum(m.weight.numel() for m in model.modules() if isinstance(m, kinds))
    budget = None
    if job["bits"] < 8:
        budget = mct.core.ResourceUtilization(weights_memory=elements * job["bits"] / 8)
    mixed = mct.core.MixedPrecisionQuantizationConfig(use_hessian_based_scores=job["hessian"])
    common = {
        "target_resource_utilization": budget,
        "core_config": mct.core.CoreConfig(mixed_precision_config=mixed),
        "target_platform_capabilities": mct.get_target_platform_capabilities(),
    }
    if job["epochs"]:
        rounding = mct.gptq.get_pytorch_gptq_config(
            n_epochs=job["epochs"], use_hessian_sample_attention=job["attention"]
        )
        return mct.gptq.pytorch_gradient_post_training_quantization(
            model, representative, gptq_config=rounding, **common
        )
    return mct.ptq.pytorch_post_training_quantization(model, representative, **common)


def export(job, model, calibration, path):
    """The toolkit's own ONNX export; None, or what went wrong.

    It was written for torch's earlier exporter, and fails with today's default.
    """
    torch.onnx.export = functools.partial(torch.onnx.export, dynamo=False)
    try:
        mct.exporter.pytorch_export_model(
            model,
            str(path),
            lambda: iter([[torch.from_numpy(calibration[:1])]]),
            quantization_format=mct.exporter.QuantizationFormat.FAKELY_QUANT,
        )
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return None


def main():
    out = Path(sys.argv[1])
    job = json.loads((out / "job.json").read_text())
    data = Path(job["data"])
    torch.set_num_threads(1)
    torch.manual_seed(0)
    np.random.seed(0)
    with np.load(data / "calibration.npz") as batches:
        calibration = np.concatenate([batches[key] for key in batches.files])
    test = np.load(data / "test.npy", mmap_mode="r")
    model = load(job)
    wall, cpu = time.perf_counter(), time.process_time()
    quantized, information = quantize(job, model, calibration)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    quantized = quantized.eval()
    predictions = []
    with torch.no_grad():
        for i in range(0, len(test), 100):
            predictions.append(quantized(torch.from_numpy(test[i : i + 100].copy())).argmax(-1))
    np.save(out / "predictions.npy", torch.cat(predictions).numpy())
    found = weights(quantized)
    elements = sum(count for _, count, _ in found)
    utilization = getattr(information.final_resource_utilization, "weights_memory", None)
    figures = {
        "tool_version": mct.__version__,
        "torch": torch.__version__,
        "layers": len(found),
        "elements": elements,
        "average_bits": sum(count * bits for _, count, bits in found) / elements,
        "bits": {name: bits for name, _, bits in found},
        "reported_weights_bytes": None if utilization is None else float(utilization),
        "cpu_seconds": cpu,
        "wall_seconds": wall,
    }
    figures["export_error"] = export(job, quantized, calibration, out / "model.onnx")
    (out / "figures.json").write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
