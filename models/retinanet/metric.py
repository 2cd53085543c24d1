"""Training metrics of RetinaNet.

Shapes: N images, K anchors of all levels, A anchors per cell, P cells of a level, C foreground classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class FGAccMetric:
    """Fraction of foreground anchors whose highest class score is that of their label.

    `output_names` and `label_names` are the graph outputs and labels to call `update` with. Counts remain on the device
    until `get`, so that training steps do not synchronise.
    """

    def __init__(self, name: str, output_names: Sequence[str], label_names: Sequence[str]) -> None:
        self.name = name
        self.output_names = list(output_names)
        self.label_names = list(label_names)
        self.reset()

    def reset(self) -> None:
        """Reset the counts."""
        self._correct: Tensor | int = 0
        self._count: Tensor | int = 0

    @torch.no_grad()
    def update(self, labels: Sequence[Tensor], preds: Sequence[Tensor]) -> None:
        """Count one batch.

        labels: [label], label (N, K) with -1, 0, 1..C, the anchors of a level in (A, H*W) order.
        preds: logits or probabilities, of all anchors (N, K, C) or per level (N, A*C, H, W).
        """
        label = labels[0]
        levels = [_by_class(pred, label.shape[1], preds) for pred in preds]  # (N, A, C, P) each
        parts = label.split([level.shape[1] * level.shape[3] for level in levels], dim=1)
        for score, part in zip(levels, parts, strict=True):
            target = part.reshape(score.shape[0], score.shape[1], 1, score.shape[3]).long()  # (N, A, 1, P)
            target_score = score.gather(2, (target - 1).clamp(min=0))
            foreground = target >= 1
            self._correct = self._correct + (foreground & (target_score == score.amax(2, keepdim=True))).sum()
            self._count = self._count + foreground.sum()

    def get(self) -> tuple[str, float]:
        """Return name and value since the last reset; nan if no anchor was foreground."""
        count = int(self._count)
        return self.name, int(self._correct) / count if count else float("nan")


def _by_class(pred: Tensor, num_anchor: int, preds: Sequence[Tensor]) -> Tensor:
    """Return a view (N, A, C, P) of one of the predictions."""
    if pred.dim() == 3:
        return pred.transpose(1, 2)[:, None]  # (N, 1, C, K)
    A = num_anchor // sum(level.shape[2] * level.shape[3] for level in preds)
    return pred.flatten(2).unflatten(1, (A, -1))
