"""Training metrics of RetinaNet.

Shapes: N images, K anchors of all levels, C foreground classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class FGAccMetric:
    """Share of the foreground anchors whose largest class score is that of their label.

    `output_names` and `label_names` name the graph outputs and labels that `update` is called with. Counts
    stay on the device until `get`, so that a training step does not wait for them.
    """

    def __init__(self, name: str, output_names: Sequence[str], label_names: Sequence[str]) -> None:
        self.name = name
        self.output_names = list(output_names)
        self.label_names = list(label_names)
        self.reset()

    def reset(self) -> None:
        """Forget what was counted."""
        self._correct: Tensor | int = 0
        self._count: Tensor | int = 0

    @torch.no_grad()
    def update(self, labels: Sequence[Tensor], preds: Sequence[Tensor]) -> None:
        """Count one batch: labels[0] (N, K) with -1, 0, 1..C, preds[0] (N, K, C) logits or probabilities."""
        label, pred = labels[0], preds[0]
        foreground = label >= 1
        correct = pred.argmax(dim=2) + 1 == label  # false for background and ignored anchors
        self._correct = self._correct + correct.sum()
        self._count = self._count + foreground.sum()

    def get(self) -> tuple[str, float]:
        """Name and value since the last reset; nan where no anchor was foreground."""
        count = int(self._count)
        return self.name, int(self._correct) / count if count else float("nan")
