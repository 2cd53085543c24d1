import math

import torch

from models.retinanet.metric import FGAccMetric


def metric():
    return FGAccMetric("FGAcc", ["cls_logit_concat_output"], ["rpn_cls_label"])


def test_accuracy_over_foreground_anchors():
    # Predicted classes 2, 1, 3, 1; the labels 2 and 3 are right, 2 is wrong, background and ignored do not count.
    logit = torch.tensor([[[0.0, 9.0, 1.0], [5.0, 1.0, 0.0]], [[-3.0, -2.0, -1.0], [1.0, 0.0, 0.0]]])
    label = torch.tensor([[2.0, 0.0], [3.0, 2.0]])
    acc = metric()
    acc.update([label], [logit])
    assert acc.get() == ("FGAcc", 2 / 3)
    acc.update([torch.tensor([[1.0, -1.0]])], [torch.tensor([[[9.0, 0.0, 0.0], [0.0, 0.0, 9.0]]])])
    assert acc.get() == ("FGAcc", 3 / 4)
    acc.reset()
    acc.update([torch.tensor([[1.0]])], [torch.tensor([[[0.0, 1.0, 0.0]]])])
    assert acc.get() == ("FGAcc", 0.0)


def test_levels_count_as_the_anchors_that_they_hold():
    # 2 images, 3 anchors per cell, 4 classes, levels of 2 x 3 and 1 x 1 cells; labels per level in (A, H*W) order
    random = torch.Generator().manual_seed(0)
    maps = [torch.randn(2, 12, 2, 3, generator=random), torch.randn(2, 12, 1, 1, generator=random)]
    label = torch.randint(-1, 5, (2, 3 * 7), generator=random).float()
    by_anchor = [m.reshape(2, 3, 4, -1).transpose(2, 3).reshape(2, -1, 4) for m in maps]
    predicted = torch.cat(by_anchor, dim=1).argmax(dim=2) + 1
    expected = int(((predicted == label) & (label >= 1)).sum()) / int((label >= 1).sum())
    for layout in (torch.contiguous_format, torch.channels_last):
        acc = metric()
        acc.update([label], [m.contiguous(memory_format=layout) for m in maps])
        assert acc.get()[1] == expected
    assert 0 < expected < 1


def test_nothing_counted_is_nan():
    acc = metric()
    assert math.isnan(acc.get()[1])
    acc.update([torch.zeros(1, 2)], [torch.zeros(1, 2, 3)])
    assert math.isnan(acc.get()[1])


def test_update_keeps_no_graph():
    logit = torch.ones(1, 1, 2, requires_grad=True)
    acc = metric()
    acc.update([torch.ones(1, 1)], [logit * 2])
    assert acc.get() == ("FGAcc", 1.0)


def test_names_say_what_it_is_updated_with():
    assert (metric().output_names, metric().label_names) == (["cls_logit_concat_output"], ["rpn_cls_label"])
