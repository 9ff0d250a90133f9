"""Forms of an artifact for runtimes other than onnxruntime, made from the ONNX file alone.

A hardware profile names the ``formats`` that its device reads. To add one: a function from the
artifact to its files and a line in `FORMATS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx

from autoquant.deploy.cmsis import DRIVER, HEADER, KERNELS, header_files
from autoquant.deploy.encodings import ENCODINGS, FLOAT_MODEL, encodings_files
from autoquant.deploy.litert import TFLITE, is_installed, tflite_files

__all__ = ["FORMATS", "PRECOMPILED", "Format"]

PRECOMPILED = "precompiled.onnx"


@dataclass(frozen=True, slots=True)
class Format:
    """The names of a format's files, what makes them, and how a README says to use them.

    ``make`` gives the same bytes for the same artifact; RunError where the format lacks a layer.
    ``is_installed``: whether what ``make`` needs is here.
    """

    files: tuple[str, ...]
    make: Callable[[onnx.ModelProto], dict[str, bytes]]
    use: str
    is_installed: Callable[[], bool] = lambda: True


FORMATS = {
    "encodings": Format(
        (FLOAT_MODEL, ENCODINGS),
        encodings_files,
        f"""\
`{FLOAT_MODEL}` and `{ENCODINGS}` are the float network and the grid of every tensor, for Qualcomm's
converters (SNPE, QNN) and AIMET:

```sh
qairt-converter --input_network {FLOAT_MODEL} --quantization_overrides {ENCODINGS} -o model.dlc
qairt-quantizer --input_dlc model.dlc --float_fallback --bias_bitwidth 32 -o quantized.dlc
```
""",
    ),
    "c-header": Format(
        (HEADER, KERNELS, DRIVER),
        header_files,
        f"""\
`{HEADER}` holds weights and scales in CMSIS-NN's convention and `aq_run`, which calls the
portable kernels of `{KERNELS}`; each of them names the CMSIS-NN kernel that takes the same
arrays. `{DRIVER}` reads float32 samples and writes float32 outputs:

```sh
cc -O2 {DRIVER} -lm -o model && ./model < inputs.bin > outputs.bin
```
""",
    ),
    "tflite": Format(
        (TFLITE,),
        tflite_files,
        f"""\
`{TFLITE}` is for LiteRT (TensorFlow Lite): one float32 sample in NHWC, float32 outputs, int8
between them. With the Python package `ai-edge-litert`:

```python
from ai_edge_litert.interpreter import Interpreter

interpreter = Interpreter("{TFLITE}")
interpreter.allocate_tensors()
```
""",
        is_installed,
    ),
}
