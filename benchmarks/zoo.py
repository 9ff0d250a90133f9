"""Networks that latencies are published for, as the operators that a device runs.

Shapes only, no weights: what `autoquant.cost.roofline` needs of a network. The MAC counts are
checked against the published ones in benchmarks/analytic.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from autoquant.cost.roofline import Operator


class Builder:
    """Appends operators; (channels, height, width) and the last writer are its state."""

    def __init__(self, channels: int, height: int, width: int | None = None) -> None:
        self.operators: list[Operator] = []
        self.channels, self.height, self.width = channels, height, width or height
        self.writer = -1

    @property
    def elements(self) -> int:
        return self.channels * self.height * self.width

    def at(self) -> tuple[int, int, int, int]:
        """The state, to branch from."""
        return self.channels, self.height, self.width, self.writer

    def go(self, state: tuple[int, int, int, int]) -> None:
        """Back to a state."""
        self.channels, self.height, self.width, self.writer = state

    def conv(
        self,
        out: int,
        kernel: int | tuple[int, int] = 3,
        stride: int = 1,
        group: int = 1,
        valid: bool = False,
        live: tuple[int, int] | None = None,
    ) -> Builder:
        """A convolution, "same" padded unless ``valid``. ``live``: (input, output) channels that
        are computed, where a tool drops dead ones."""
        k, m = (kernel, kernel) if isinstance(kernel, int) else kernel
        read = self.elements
        used, made = live or (self.channels, out)
        if valid:
            self.height, self.width = self.height - k + 1, self.width - m + 1
        self.height, self.width = -(-self.height // stride), -(-self.width // stride)
        weights = k * m * used // group * made if group == 1 or live is None else k * m * made
        shape = "pointwise" if k * m == 1 else "conv"
        if group > 1 and group == self.channels:
            shape = "depthwise"
        self.channels = out
        macs = weights * self.height * self.width
        return self._add(shape, read, macs, "Conv", weights)

    def depthwise(self, kernel: int = 3, stride: int = 1, live: int | None = None) -> Builder:
        """A convolution with one input channel a group."""
        pair = None if live is None else (live, live)
        return self.conv(self.channels, kernel, stride, self.channels, live=pair)

    def dense(self, out: int, live: int | None = None) -> Builder:
        """A product with a matrix, of all elements."""
        read = live or self.elements
        self.channels, self.height, self.width = out, 1, 1
        return self._add("dense", read, read * out, "Gemm", read * out)

    def pool(self, size: int = 1, whole: bool = False) -> Builder:
        """A pooling that divides height and width, or takes their mean."""
        read = self.elements
        self.height = 1 if whole else -(-self.height // size)
        self.width = 1 if whole else -(-self.width // size)
        return self._add("other", read)

    def add(self, state: tuple[int, int, int, int]) -> Builder:
        """Add another branch of the same shape."""
        inputs = ((self.elements, self.writer), (self.elements, state[3]))
        self.operators.append(Operator("other", inputs, self.elements))
        self.writer = len(self.operators) - 1
        return self

    def concat(self, states: Sequence[tuple[int, int, int, int]]) -> Builder:
        """Join branches along the channels."""
        inputs = tuple((c * h * w, writer) for c, h, w, writer in states)
        self.channels = sum(state[0] for state in states)
        self.operators.append(Operator("other", inputs, self.elements))
        self.writer = len(self.operators) - 1
        return self

    def gate(self, squeezed: int) -> Builder:
        """Squeeze and excitation: mean, two products, a multiplication."""
        here = self.at()
        self.pool(whole=True).conv(squeezed, 1).conv(here[0], 1)
        gate = self.writer
        self.go(here)
        inputs = ((self.elements, self.writer), (self.channels, gate))
        self.operators.append(Operator("other", inputs, self.elements))
        self.writer = len(self.operators) - 1
        return self

    def _add(
        self, shape: str, read: int, macs: int = 0, kind: str = "", weights: int = 0
    ) -> Builder:
        name = f"{len(self.operators)}" if kind else ""
        inputs = ((read, self.writer),)
        self.operators.append(
            Operator(shape, inputs, self.elements, macs, name, kind, name, weights)
        )
        self.writer = len(self.operators) - 1
        return self


def resnet8() -> list[Operator]:
    """MLPerf Tiny image classification (16 filters, CIFAR-10)."""
    b = Builder(3, 32).conv(16)
    for out, stride in ((16, 1), (32, 2), (64, 2)):
        before = b.at()
        b.conv(out, 3, stride).conv(out)
        after = b.at()
        if stride > 1:
            b.go(before)
            b.conv(out, 1, stride)
            before = b.at()
        b.go(after)
        b.add(before)
    return b.pool(whole=True).dense(10).operators


def dscnn() -> list[Operator]:
    """MLPerf Tiny keyword spotting (49 frames of 10 coefficients)."""
    b = Builder(1, 49, 10).conv(64, (10, 4), 2)
    for _ in range(4):
        b.depthwise().conv(64, 1)
    return b.pool(whole=True).dense(12).operators


_DEAD = (4, 21, 71, 98, 109, 109, 101, 224, 234)  # of the sixth and later 1×1 layers of VWW
_DEAD_OF = (64, 128, 128, 128, 128, 128, 128, 256, 256)


def vww(live: bool = False) -> list[Operator]:
    """MLPerf Tiny visual wake words: MobileNetV1 0.25 at 96×96; ``live``: without the output
    channels of 1×1 layers that are zero in the reference weights."""
    b = Builder(3, 96).conv(8, 3, 2)
    plan = [(16, 1), (32, 2), (32, 1), (64, 2), (64, 1), (128, 2), *[(128, 1)] * 5, (256, 2)]
    dead = [0, 0, 0, 0, *_DEAD]
    alive = 8
    for (out, stride), gone in zip([*plan, (256, 1)], dead, strict=True):
        b.depthwise(3, stride, live=alive if live else None)
        b.conv(out, 1, live=(alive, out - gone) if live else None)
        alive = out - gone
    return b.pool(whole=True).dense(2, live=alive if live else None).operators


def autoencoder() -> list[Operator]:
    """MLPerf Tiny anomaly detection."""
    b = Builder(640, 1)
    for out in (128, 128, 128, 128, 8, 128, 128, 128, 128, 640):
        b.dense(out)
    return b.operators


def mobilenet_v1(width: float = 1.0, size: int = 224) -> list[Operator]:
    """Howard et al. 2017."""
    b = Builder(3, size).conv(int(32 * width), 3, 2)
    plan = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5]
    for out, stride in [*plan, (1024, 2), (1024, 1)]:
        b.depthwise(3, stride).conv(int(out * width), 1)
    return b.pool(whole=True).dense(1000).operators


def _round(value: float, divisor: int = 8) -> int:
    """Channels as MobileNets round them."""
    found = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return found + divisor if found < 0.9 * value else found


def mobilenet_v2(width: float = 1.0, size: int = 224, classes: int = 1000) -> list[Operator]:
    """Sandler et al. 2018."""
    b = Builder(3, size).conv(_round(32 * width), 3, 2)
    for t, c, n, s in (
        (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1),
        (6, 160, 3, 2), (6, 320, 1, 1),
    ):  # fmt: skip
        for i in range(n):
            _inverted(b, t, _round(c * width), s if i == 0 else 1)
    b.conv(_round(1280 * max(1.0, width)), 1).pool(whole=True)
    return b.dense(classes).operators


def _inverted(b: Builder, expand: int, out: int, stride: int, kernel: int = 3) -> None:
    before = b.at()
    if expand != 1:
        b.conv(before[0] * expand, 1)
    b.depthwise(kernel, stride).conv(out, 1)
    if stride == 1 and before[0] == out:
        b.add(before)


def mobilenet_v3(large: bool = True) -> list[Operator]:
    """Howard et al. 2019, tables 1 and 2; (kernel, expanded, out, gate, stride)."""
    rows = (
        [(3, 16, 16, 0, 1), (3, 64, 24, 0, 2), (3, 72, 24, 0, 1), (5, 72, 40, 1, 2),
         (5, 120, 40, 1, 1), (5, 120, 40, 1, 1), (3, 240, 80, 0, 2), (3, 200, 80, 0, 1),
         (3, 184, 80, 0, 1), (3, 184, 80, 0, 1), (3, 480, 112, 1, 1), (3, 672, 112, 1, 1),
         (5, 672, 160, 1, 2), (5, 960, 160, 1, 1), (5, 960, 160, 1, 1)]
        if large else
        [(3, 16, 16, 1, 2), (3, 72, 24, 0, 2), (3, 88, 24, 0, 1), (5, 96, 40, 1, 2),
         (5, 240, 40, 1, 1), (5, 240, 40, 1, 1), (5, 120, 48, 1, 1), (5, 144, 48, 1, 1),
         (5, 288, 96, 1, 2), (5, 576, 96, 1, 1), (5, 576, 96, 1, 1)]
    )  # fmt: skip
    b = Builder(3, 224).conv(16, 3, 2)
    for kernel, expanded, out, gate, stride in rows:
        before = b.at()
        if expanded != before[0]:
            b.conv(expanded, 1)
        b.depthwise(kernel, stride)
        if gate:
            b.gate(_round(expanded / 4))
        b.conv(out, 1)
        if stride == 1 and before[0] == out:
            b.add(before)
    b.conv(960 if large else 576, 1).pool(whole=True)
    return b.dense(1280 if large else 1024).dense(1000).operators


def mnasnet05() -> list[Operator]:
    """Tan et al. 2019, width 0.5, as torchvision builds it."""
    b = Builder(3, 224).conv(16, 3, 2).depthwise().conv(8, 1)
    for kernel, t, c, n, s in (
        (3, 3, 24, 3, 2), (5, 3, 40, 3, 2), (5, 6, 80, 3, 2), (3, 6, 96, 2, 1),
        (5, 6, 192, 4, 2), (3, 6, 320, 1, 1),
    ):  # fmt: skip
        for i in range(n):
            _inverted(b, t, _round(c * 0.5), s if i == 0 else 1, kernel)
    return b.conv(1280, 1).pool(whole=True).dense(1000).operators


def efficientnet_lite(index: int) -> list[Operator]:
    """EfficientNet-Lite 0…4: no gates, stem and head not scaled."""
    width, depth, size = (
        (1.0, 1.0, 224), (1.0, 1.1, 240), (1.1, 1.2, 260), (1.2, 1.4, 280), (1.4, 1.8, 300)
    )[index]  # fmt: skip
    b = Builder(3, size).conv(32, 3, 2)
    rows = (
        (1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3),
        (6, 112, 3, 1, 5), (6, 192, 4, 2, 5), (6, 320, 1, 1, 3),
    )  # fmt: skip
    for stage, (t, c, n, s, kernel) in enumerate(rows):
        count = n if stage in (0, len(rows) - 1) else -int(-n * depth // 1)
        for i in range(count):
            _inverted(b, t, _round(c * width), s if i == 0 else 1, kernel)
    return b.conv(1280, 1).pool(whole=True).dense(1000).operators


def resnet(
    blocks: Sequence[int],
    bottleneck: bool = True,
    size: int = 224,
    wide: int = 1,
    group: int = 1,
    first: bool = False,
) -> list[Operator]:
    """He et al. 2016; ``wide`` of Wide ResNets, ``group`` of ResNeXt (32×4d has wide 2 there).

    ``first``: the stride is in the first 1×1 layer (the original "v1"), not in the 3×3.
    """
    b = Builder(3, size).conv(64, 7, 2).pool(2)
    for stage, count in enumerate(blocks):
        base = 64 << stage
        for i in range(count):
            stride = 2 if stage and i == 0 else 1
            before, out = b.at(), base * (4 if bottleneck else 1)
            if bottleneck:
                b.conv(base * wide, 1, stride if first else 1)
                b.conv(base * wide, 3, 1 if first else stride, group).conv(out, 1)
            else:
                b.conv(base, 3, stride).conv(base)
            after = b.at()
            if before[0] != out or stride > 1:
                b.go(before)
                b.conv(out, 1, stride)
                before = b.at()
            b.go(after)
            b.add(before)
    return b.pool(whole=True).dense(1000).operators


def squeezenet() -> list[Operator]:
    """SqueezeNet 1.1."""
    b = Builder(3, 224).conv(64, 3, 2).pool(2)
    for i, (squeeze, expand) in enumerate(
        [(16, 64), (16, 64), (32, 128), (32, 128), (48, 192), (48, 192), (64, 256), (64, 256)]
    ):
        here = b.conv(squeeze, 1).at()
        one = b.conv(expand, 1).at()
        b.go(here)
        b.concat([one, b.conv(expand).at()])
        if i in (1, 3):
            b.pool(2)
    return b.conv(1000, 1).pool(whole=True).operators


def vgg16() -> list[Operator]:
    """Simonyan and Zisserman 2014."""
    b = Builder(3, 224)
    for out, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(count):
            b.conv(out)
        b.pool(2)
    return b.dense(4096).dense(4096).dense(1000).operators


def googlenet() -> list[Operator]:
    """Szegedy et al. 2014 as torchvision builds it (3×3 in place of 5×5)."""
    b = Builder(3, 224).conv(64, 7, 2).pool(2).conv(64, 1).conv(192).pool(2)
    rows = [
        (64, 96, 128, 16, 32, 32), (128, 128, 192, 32, 96, 64), (192, 96, 208, 16, 48, 64),
        (160, 112, 224, 24, 64, 64), (128, 128, 256, 24, 64, 64), (112, 144, 288, 32, 64, 64),
        (256, 160, 320, 32, 128, 128), (256, 160, 320, 32, 128, 128),
        (384, 192, 384, 48, 128, 128),
    ]  # fmt: skip
    for i, (one, reduce3, three, reduce5, five, pooled) in enumerate(rows):
        here, ends = b.at(), []
        for steps in (((one, 1),), ((reduce3, 1), (three, 3)), ((reduce5, 1), (five, 3))):
            b.go(here)
            for out, kernel in steps:
                b.conv(out, kernel)
            ends.append(b.at())
        b.go(here)
        b.pool(1).conv(pooled, 1)
        b.concat([*ends, b.at()])
        if i in (1, 6):
            b.pool(2)
    return b.pool(whole=True).dense(1000).operators


def aggregate(macs: float) -> list[Operator]:
    """A network of which only the MACs are known: one convolution that moves nothing."""
    return [Operator("conv", ((0, -1),), 0, int(macs), "0", "Conv", "0", 0)]


NETWORKS: dict[str, Callable[[], list[Operator]]] = {
    "ic_resnet8": resnet8,
    "kws_dscnn": dscnn,
    "vww_mbv1_025": vww,
    "vww_live": lambda: vww(live=True),
    "ad_fcae": autoencoder,
    "mobilenet_v1_1.0_224": mobilenet_v1,
    "mobilenet_v2_1.0_224": mobilenet_v2,
    "mobilenet_v3_large": mobilenet_v3,
    "mobilenet_v3_small": lambda: mobilenet_v3(large=False),
    "mnasnet05": mnasnet05,
    "mbv2-w0.3-r64": lambda: mobilenet_v2(0.3, 64),
    "resnet18": lambda: resnet((2, 2, 2, 2), bottleneck=False),
    "resnet50": lambda: resnet((3, 4, 6, 3)),
    "resnet101": lambda: resnet((3, 4, 23, 3)),
    "wideresnet50": lambda: resnet((3, 4, 6, 3), wide=2),
    "resnext50": lambda: resnet((3, 4, 6, 3), wide=2, group=32),
    "resnet50_v1_299": lambda: resnet((3, 4, 6, 3), size=299, first=True),
    "resnet152_v2_299": lambda: resnet((3, 8, 36, 3), size=299),
    "squeezenet1_1": squeezenet,
    "vgg16_224": vgg16,
    "googlenet": googlenet,
    "mobilenet_v2_0.35_128": lambda: mobilenet_v2(0.35, 128),
    "mobilenet_v2_0.35_224": lambda: mobilenet_v2(0.35),
    "mobilenet_v2_1.4_224": lambda: mobilenet_v2(1.4),
    **{f"efficientnet_lite{i}": lambda i=i: efficientnet_lite(i) for i in range(5)},
    # GFLOPs of the Ultralytics model tables, halved
    **{
        f"yolo11{k}_640": lambda g=g: aggregate(g * 5e8)
        for k, g in zip("nsmlx", (6.5, 21.5, 68.0, 86.9, 194.9), strict=True)
    },
    "yolov8n_640": lambda: aggregate(8.7 * 5e8),
}  # fmt: skip
