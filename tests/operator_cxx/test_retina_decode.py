import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from operator_cxx import library
from operator_cxx.anchor import base_anchors, grid_anchors
from operator_cxx.nms import nms
from operator_cxx.retina_decode import retina_decode

GOLDEN = Path(__file__).parents[1] / "golden"
SCALES = (4.0, 4.0 * 2 ** (1 / 3), 4.0 * 2 ** (2 / 3))
NAN, INF = math.nan, math.inf
# Memory layouts of a map (N, R, H, W), including gaps between its images, rows, cells and channels.
LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels-last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "some channels of channels-last": lambda x: torch.cat([x, x], 1).contiguous(memory_format=torch.channels_last)[
        :, : x.shape[1]
    ],
    "columns first": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "every second image": lambda x: torch.stack([x, x], 1).flatten(0, 1)[::2],
    "every second row": lambda x: torch.stack([x, x], 3).flatten(2, 3)[:, :, ::2],
    "rows of more": lambda x: torch.cat([x, x], 2)[:, :, : x.shape[2]],
    "every second cell": lambda x: torch.stack([x, x], 4)[..., 0],
}


def golden_candidates(device):
    """Return rows (M, 6) of box, score and class, as in the golden case."""
    golden = np.load(GOLDEN / "decode_256.npz")
    rows = []
    for stride in (8, 16, 32, 64, 128):
        prob = torch.from_numpy(golden[f"cls_prob_stride{stride}"]).to(device)
        anchors = grid_anchors(*prob.shape[2:], stride, base_anchors(stride, SCALES, (0.5, 1.0, 2.0)), device)
        box, score, cls = retina_decode(
            prob,
            torch.from_numpy(golden[f"bbox_delta_stride{stride}"]).to(device),
            torch.from_numpy(golden["im_info"])[None].to(device),
            anchors,
            pre_nms_top_n=int(golden["pre_nms_top_n"]),
            thresh=0.0 if stride == 128 else float(golden["min_det_score"]),
            num_anchors=9,
        )
        row = torch.cat([box[0], score[0, :, None], cls[0, :, None]], dim=1)
        rows.append(row[score[0] > 0])
    return golden, torch.cat(rows)


def sorted_rows(rows):
    """Return the rows in a canonical order."""
    return rows[np.lexsort((rows[:, 0], rows[:, 5], rows[:, 4]))]


def test_candidates_of_the_original(device):
    golden, rows = golden_candidates(device)
    expected, rows = sorted_rows(golden["candidates"]), sorted_rows(rows.cpu().numpy())
    assert rows.shape == expected.shape
    np.testing.assert_array_equal(rows[:, 4:], expected[:, 4:])
    np.testing.assert_allclose(rows[:, :4], expected[:, :4], rtol=0, atol=1e-3)


def test_detections_of_the_original():
    golden, rows = golden_candidates("cpu")
    thr, max_det = float(golden["nms_thr"]), int(golden["max_det_per_image"])
    (index,), _ = nms(rows[None, :, :4], rows[None, :, 4], rows[None, :, 5].long(), thr=thr, max_det=max_det)
    kept = index[index >= 0]
    np.testing.assert_array_equal(rows[kept, 4:].numpy(), golden["detections"][:, 4:])
    np.testing.assert_allclose(rows[kept, :4].numpy(), golden["detections"][:, :4], rtol=0, atol=1e-3)


def decode(prob, delta=None, anchors=None, im_info=(100.0, 100.0, 1.0), *, device, A=1, top_n=5, thresh=0.05):
    prob = torch.as_tensor(prob).to(device)
    N, _, H, W = prob.shape
    delta = torch.zeros(N, 4 * A, H, W) if delta is None else delta
    if anchors is None:  # a different box for every row
        anchors = torch.arange(H * W * A)[:, None] + torch.tensor([0.0, 0.0, 9.0, 9.0])
    info = torch.tensor([im_info]).expand(N, 3).to(device)
    options = {"pre_nms_top_n": top_n, "thresh": thresh, "num_anchors": A}
    return retina_decode(prob, delta.to(device), info, anchors.to(device), **options)


def test_channels_are_anchor_major_and_anchor_rows_have_the_anchor_fastest(device):
    prob = np.zeros((1, 2 * 3, 2, 4), np.float32)  # A = 2, C = 3, H = 2, W = 4
    prob[0, 1 * 3 + 2, 1, 3] = 0.9  # anchor 1, class 3, last cell: row (1 * 4 + 3) * 2 + 1 = 15
    prob[0, 0 * 3 + 1, 0, 2] = 0.8  # anchor 0, class 2, row 2 * 2 = 4
    delta = torch.zeros(1, 2, 4, 2, 4)
    delta[0, 1, 0, 1, 3] = 0.5  # dx of the first: 5 pixels
    delta[0, 0, 3, 0, 2] = math.log(2)  # dh of the second: 20 pixels about the centre 8.5
    bbox, score, cls = decode(prob, delta.reshape(1, 8, 2, 4), device=device, A=2, top_n=3)
    expected = torch.tensor([[20.0, 15.0, 29.0, 24.0], [4.0, 0.0, 13.0, 18.0], [0.0] * 4])
    torch.testing.assert_close(bbox[0].cpu(), expected)
    assert score[0].tolist() == pytest.approx([0.9, 0.8, 0.0])
    assert cls[0].tolist() == [3, 2, 0]
    assert (bbox.dtype, score.dtype, cls.dtype) == (torch.float32, torch.float32, torch.int64)


def test_boxes_are_clipped_to_each_image(device):
    anchors = torch.tensor([[-5.0, -6.0, 50.0, 60.0]], device=device)
    prob, delta = torch.full((2, 1, 1, 1), 0.5, device=device), torch.zeros(2, 4, 1, 1, device=device)
    info = torch.tensor([[40.0, 30.0, 1.0], [61.0, 51.0, 1.0]], device=device)
    bbox, _, _ = retina_decode(prob, delta, info, anchors, pre_nms_top_n=1, thresh=0.0, num_anchors=1)
    assert bbox[:, 0].tolist() == [[0.0, 0.0, 29.0, 39.0], [0.0, 0.0, 50.0, 60.0]]


def test_width_and_height_are_capped(device):
    anchors = torch.tensor([[0.0, 0.0, 15.0, 15.0]])
    bbox, _, _ = decode([[[[0.5]]]], torch.full((1, 4, 1, 1), 50.0), anchors, (5e3, 5e3, 1.0), device=device)
    assert bbox[0, 0].tolist() == pytest.approx([308.0, 308.0, 1307.0, 1307.0])  # centre 7.5 + 800, 1000 wide


def test_only_scores_above_the_threshold_are_candidates(device):
    bbox, score, cls = decode([[[[0.25, 0.250001, 0.0, 0.5]]]], device=device, thresh=0.25)
    assert score[0].tolist() == pytest.approx([0.5, 0.250001, 0, 0, 0])
    assert cls[0].tolist() == [1, 1, 0, 0, 0]
    assert bbox[0, 2:].count_nonzero() == 0
    assert decode([[[[0.0, 1e-30]]]], device=device, thresh=0.0)[2][0].tolist() == [1, 0, 0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_invalid_probabilities(device, dtype):
    prob = torch.tensor([NAN, 0.5, -0.0, -1.0, INF, -INF, 0.75, -NAN, 0.5, 2.0**-24, 0.0], dtype=dtype)
    for thresh, expected in ((0.0, [4, 6, 1, 8, 9]), (-0.0, [4, 6, 1, 8, 9]), (0.5, [4, 6]), (INF, []), (1e300, [])):
        bbox, score, cls = decode(prob.reshape(1, 1, 1, -1), device=device, top_n=7, thresh=thresh)
        assert bbox[0, : len(expected), 0].tolist() == expected
        assert score[0].tolist() == [*prob[expected].tolist(), *[0.0] * (7 - len(expected))]
        assert cls.sum() == len(expected)
    # candidates after a whole tile of NaN are found
    prob = torch.full((9000,), NAN, dtype=dtype).index_fill(0, torch.tensor([8999]), 0.5)
    _, score, _ = decode(prob.reshape(1, 1, 90, 100), device=device, top_n=1)
    assert score.item() == 0.5


def test_nan_deltas_give_nan_coordinates(device):
    delta = torch.zeros(1, 4, 1, 4)
    delta[0, 0, 0, 0] = NAN
    delta[0, 3, 0, 1] = NAN
    delta[0, :, 0, 2] = torch.tensor([INF, -INF, -INF, INF])
    bbox, _, _ = decode([[[[0.9, 0.8, 0.7, 0.6]]]], delta, device=device, top_n=4)
    nan = [[True, False, True, False], [False, True, False, True], [False] * 4, [False] * 4]
    assert bbox[0].isnan().tolist() == nan
    assert bbox[0, 2].tolist() == [99.0, 0.0, 99.0, 0.0]


def test_equal_scores_keep_their_order_in_anchor_class_row_column(device):
    # A = 2, C = 2, one row of three columns: 0.5 twice, then the first two of four 0.25 in (A, C, H, W).
    prob = [[[[0.25, 0.5, 0.0]], [[0.0, 0.0, 0.25]], [[0.25, 0.0, 0.0]], [[0.0, 0.5, 0.25]]]]
    bbox, score, cls = decode(prob, device=device, A=2, top_n=4)
    assert score[0].tolist() == [0.5, 0.5, 0.25, 0.25]
    assert cls[0].tolist() == [1, 2, 1, 2]
    assert bbox[0, :, 0].tolist() == [2.0, 3.0, 0.0, 4.0]  # anchor rows: column * 2 + anchor


def assert_chosen(prob, thresh, top_n, A, answer):
    """Check the result against a stable sort of the probabilities (N, A*C, H, W), with the boxes of `decode`."""
    bbox, score, cls = (x.cpu() for x in answer)
    N, channel, H, W = prob.shape
    for n in range(N):
        flat = prob[n].cpu().float().flatten()
        order = torch.sort(flat, descending=True, stable=True).indices
        order = order[flat[order] > thresh][:top_n]
        beyond = top_n - len(order)
        assert score[n].tolist() == [*flat[order].tolist(), *[0.0] * beyond]
        r, cell = order // (H * W), order % (H * W)
        assert cls[n].tolist() == [*(r % (channel // A) + 1).tolist(), *[0] * beyond]
        row = cell * A + r // (channel // A)
        assert bbox[n, :, 0].tolist() == [*row.tolist(), *[0.0] * beyond]


SCORES = {
    "few different": lambda shape, random: torch.randint(0, 6, shape, generator=random) / 5,
    "different": lambda shape, random: torch.rand(shape, generator=random),
    "mostly below": lambda shape, random: torch.rand(shape, generator=random) ** 9,
    "falling": lambda shape, _: torch.arange(math.prod(shape), 0, -1).reshape(shape) / math.prod(shape),
    "rising": lambda shape, _: torch.arange(math.prod(shape)).reshape(shape) / math.prod(shape),
    "all equal": lambda shape, _: torch.full(shape, 0.25),
    "none": lambda shape, _: torch.full(shape, 0.2),
    "last only": lambda shape, _: torch.zeros(shape).index_fill(3, torch.tensor([shape[3] - 1]), 0.5),
    "in the last bits": lambda shape, random: (
        torch.randint(0, 3, shape, generator=random, dtype=torch.int32) + 0x3F000000
    ).view(torch.float32),
}


@pytest.mark.parametrize("top_n", [1, 70, 1000, 4500])
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("kind", SCORES)
def test_the_best_in_order(device, kind, layout, top_n):
    prob = SCORES[kind]((2, 12, 20, 37), torch.Generator().manual_seed(top_n))  # A = 3, C = 4: 8880 per image
    prob[1:, :, :, :15] *= 0.1  # whole groups without a candidate
    laid = LAYOUTS[layout](prob)
    answer = decode(laid, device=device, A=3, top_n=top_n, thresh=0.2, im_info=(1e5, 1e5, 1.0))
    assert_chosen(prob, 0.2, top_n, 3, answer)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_best_of_half_precision(device, dtype):
    prob = torch.rand(2, 12, 20, 37, generator=torch.Generator().manual_seed(0)).to(dtype)  # many are equal
    answer = decode(prob, device=device, A=3, top_n=1000, thresh=0.2, im_info=(1e5, 1e5, 1.0))
    assert_chosen(prob, 0.2, 1000, 3, answer)


def slow_decode(prob, delta, im_info, anchors, top_n, thresh, A):
    """Return the rows (x1, y1, x2, y2, score, class) of one image by the definition, in Python floats."""
    C, (_, H, W) = len(prob) // A, prob.shape
    prob, delta, anchors = prob.tolist(), delta.tolist(), anchors.tolist()
    found = []
    for a in range(A):
        for c in range(C):
            for y in range(H):
                for x in range(W):
                    if prob[a * C + c][y][x] > thresh:
                        found.append((-prob[a * C + c][y][x], len(found), a, c, y, x))
    rows = []
    for score, _, a, c, y, x in sorted(found)[:top_n]:
        x1, y1, x2, y2 = anchors[(y * W + x) * A + a]
        dx, dy, dw, dh = (delta[4 * a + k][y][x] for k in range(4))
        w, h = (min(62.5, math.exp(d)) * (end - start + 1) for d, start, end in ((dw, x1, x2), (dh, y1, y2)))
        cx, cy = (x1 + x2) / 2 + dx * (x2 - x1 + 1), (y1 + y2) / 2 + dy * (y2 - y1 + 1)
        corners = (cx - (w - 1) / 2, cy - (h - 1) / 2, cx + (w - 1) / 2, cy + (h - 1) / 2)
        limits = (im_info[1] - 1, im_info[0] - 1) * 2
        rows.append([*(max(0.0, min(v, limit)) for v, limit in zip(corners, limits, strict=True)), -score, c + 1])
    return rows + [[0.0] * 6] * (top_n - len(rows))


def example(device, *, images=2, A=2, C=3, side=(5, 7), dtype=torch.float32, delta_dtype=None, seed=0):
    """Return prob, delta, im_info and anchors; some probabilities are equal, some boxes extend beyond the image."""
    random = torch.Generator().manual_seed(seed)
    prob = (torch.rand(images, A * C, *side, generator=random) * 32).round() / 32
    delta = torch.randn(images, 4 * A, *side, generator=random) * 1.5
    info = torch.tensor([[50.0, 60.0, 1.0], [40.0, 55.5, 0.5]])[torch.arange(images) % 2]
    anchors = grid_anchors(*side, 8, base_anchors(8, [1 + a for a in range(A)], (1.0,)))
    tensors = (prob.to(dtype), delta.to(delta_dtype or dtype), info, anchors)
    return [tensor.to(device) for tensor in tensors]


@pytest.mark.parametrize("dtype, delta_dtype", [("float32",) * 2, ("float16",) * 2, ("bfloat16", "float32")])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_against_the_definition(device, layout, dtype, delta_dtype):
    prob, delta, info, anchors = example(device, dtype=getattr(torch, dtype), delta_dtype=getattr(torch, delta_dtype))
    bbox, score, cls = retina_decode(
        LAYOUTS[layout](prob), LAYOUTS[layout](delta), info, anchors, pre_nms_top_n=40, thresh=0.5, num_anchors=2
    )
    for n in range(2):
        expected = torch.tensor(slow_decode(prob[n], delta[n], info[n].tolist(), anchors, 40, 0.5, 2))
        torch.testing.assert_close(bbox[n].cpu(), expected[:, :4], rtol=1e-5, atol=2e-4)
        assert score[n].tolist() == expected[:, 4].tolist()
        assert cls[n].tolist() == expected[:, 5].tolist()


def test_types_that_plain_torch_computes(device):
    inputs = example(device, dtype=torch.float64)
    bbox, score, cls = retina_decode(*inputs, pre_nms_top_n=40, thresh=0.5, num_anchors=2)
    single = [tensor.float() for tensor in inputs]
    torch.testing.assert_close(
        bbox.float(), retina_decode(*single, pre_nms_top_n=40, thresh=0.5, num_anchors=2)[0], rtol=1e-5, atol=2e-4
    )
    assert (bbox.dtype, score.dtype, cls.dtype) == (torch.float64, torch.float32, torch.int64)


def test_nothing_to_do(device):
    for shape, A in (((0, 4, 2, 2), 2), ((2, 4, 0, 3), 2), ((2, 0, 2, 2), 2), ((1, 2, 1, 1), 1)):
        bbox, score, cls = decode(torch.full(shape, 0.01), device=device, A=A, top_n=3)
        assert bbox.tolist() == [[[0.0] * 4] * 3] * shape[0]
        assert score.tolist() == [[0.0] * 3] * shape[0]
        assert cls.tolist() == [[0] * 3] * shape[0]


def test_images_without_candidates_among_others(device):
    prob = torch.zeros(4, 2, 30, 20)
    prob[2, 1, 3, 4] = 0.5
    prob[0] = torch.arange(1200.0).reshape(2, 30, 20) / 1200
    assert_chosen(prob, 0.1, 6, 1, decode(prob, device=device, top_n=6, thresh=0.1, im_info=(1e4, 1e4, 1.0)))


def test_half_precision_boxes_are_computed_in_float32(device):
    delta = torch.full((1, 4, 1, 1), 0.1, dtype=torch.float16)
    rest = (torch.tensor([[600.0, 0.0, 1111.0, 99.0]]), (5e3, 5e3, 1.0))
    half, _, _ = decode([[[[0.5]]]], delta, *rest, device=device)
    full, _, _ = decode([[[[0.5]]]], delta.float(), *rest, device=device)
    assert half.dtype == torch.float32
    assert half.tolist() == full.tolist()


def test_no_gradient_passes(device):
    prob, delta, info, anchors = example(device)
    bbox, score, _ = retina_decode(
        prob.requires_grad_(), delta.requires_grad_(), info, anchors, pre_nms_top_n=3, thresh=0.1, num_anchors=2
    )
    assert not bbox.requires_grad
    assert not score.requires_grad


def test_kernels_stay_in_their_workspace_whatever_it_holds(device, monkeypatch):
    inputs = example(device, side=(9, 70))
    expected = [retina_decode(*inputs, pre_nms_top_n=t, thresh=0.2, num_anchors=2) for t in (3, 300, 9999)]
    made = []

    def guarded(self, name, like, *sizes):
        size = self._functions[f"nk_{name}_workspace"](*sizes)
        made.append(torch.full((64 + size + 64,), 0xA5, dtype=torch.uint8, device=like.device))
        return made[-1][64:-64]

    monkeypatch.setattr(library.Kernels, "workspace", guarded)
    for top_n, answer in zip((3, 300, 9999), expected, strict=True):
        again = retina_decode(*inputs, pre_nms_top_n=top_n, thresh=0.2, num_anchors=2)
        assert all(map(torch.equal, again, answer))
    assert len(made) == (3 if library.loaded else 0)
    assert all((memory[:64] == 0xA5).all() and (memory[-64:] == 0xA5).all() for memory in made)


def test_the_threads_change_no_bit():
    inputs = example("cpu", side=(40, 333), C=11)  # several tiles per image
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(retina_decode(*inputs, pre_nms_top_n=1000, thresh=0.1, num_anchors=2))
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(result, results[0], strict=True))


def test_from_many_threads_at_once(device):
    inputs = example(device, side=(20, 20))
    expected = retina_decode(*inputs, pre_nms_top_n=100, thresh=0.1, num_anchors=2)
    with ThreadPoolExecutor(8) as pool:
        calls = [pool.submit(retina_decode, *inputs, pre_nms_top_n=100, thresh=0.1, num_anchors=2) for _ in range(24)]
    assert all(torch.equal(a, b) for call in calls for a, b in zip(call.result(), expected, strict=True))


def test_images_further_apart_than_two_gigabytes_of_elements(device):
    # The second image is 2^31 + 8 elements after the first; the memory in between is never touched.
    far = 2**31 + 8
    memory = torch.empty(far + 8, dtype=torch.float16, device=device)
    prob = memory.as_strided((2, 4, 1, 1), (far, 1, 1, 1)).copy_(torch.arange(8.0).reshape(2, 4, 1, 1) / 8)
    delta = memory[4:].as_strided((2, 4, 1, 1), (far, 1, 1, 1)).copy_(torch.zeros(2, 4, 1, 1))
    _, score, cls = decode(prob, delta, device=device, top_n=3, thresh=0.1)
    assert score.tolist() == [[0.375, 0.25, 0.125], [0.875, 0.75, 0.625]]
    assert cls.tolist() == [[4, 3, 2], [4, 3, 2]]


def test_an_image_of_more_than_two_gigabytes_of_elements():
    # Only its ends are written: untouched pages read as zero and take no memory.
    assert "cpu" in library.loaded, library.notes  # plain torch would take many gigabytes
    channel = 2**29 + 2
    memory = torch.from_numpy(np.zeros(4 * channel, np.float16))
    memory[:2] = 0.5
    memory[-2:] = torch.tensor([0.75, 0.5])
    for prob in (memory.reshape(1, channel, 2, 2), memory.reshape(1, 2, 2, channel).permute(0, 3, 1, 2)):
        bbox, score, cls = decode(prob, device="cpu", top_n=4)
        assert score[0].tolist() == [0.75, 0.5, 0.5, 0.5]
        places = [(channel, 2), (1, 0), (1, 1), (channel, 3)]
        if not prob.is_contiguous():
            places = [(channel - 1, 3), (1, 0), (2, 0), (channel, 3)]
        assert list(zip(cls[0].tolist(), bbox[0, :, 0].tolist(), strict=True)) == places


class Level(torch.nn.Module):
    def forward(self, prob, delta, im_info):
        anchors = grid_anchors(prob.shape[2], prob.shape[3], 8, base_anchors(8, (1, 2), (1.0,)))
        return retina_decode(prob, delta, im_info, anchors, pre_nms_top_n=7, thresh=0.5, num_anchors=2)


def test_it_can_be_exported():
    random = torch.Generator().manual_seed(0)
    prob, delta = torch.rand(2, 6, 4, 4, generator=random), torch.randn(2, 8, 4, 4, generator=random)
    inputs = (prob, delta, torch.tensor([[30.0, 32.0, 1.0], [32.0, 20.0, 1.0]]))
    program = torch.export.export(Level(), inputs)
    assert "necklace.retina_decode" in str(program.graph)
    other = (prob.flip(0), delta.flip(0), inputs[2])
    for got, expected in zip(program.module()(*other), Level()(*other), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_plain_torch_can_be_exported(monkeypatch):
    monkeypatch.setattr(library, "loaded", {})
    prob, delta, info, _ = example("cpu", side=(4, 4))
    exported = torch.export.export(Level(), (prob, delta, info)).module()
    assert all(map(torch.equal, exported(prob, delta, info), Level()(prob, delta, info)))


def test_tracing():
    inputs = example("cpu", side=(6, 6))
    torch.library.opcheck(torch.ops.necklace.retina_decode.default, (*inputs, 7, 0.5, 2))
    compiled = torch.compile(Level(), fullgraph=True, backend="aot_eager", dynamic=True)
    for side in ((6, 6), (3, 5)):
        prob, delta, info, _ = example("cpu", side=side)
        assert all(map(torch.equal, compiled(prob, delta, info), Level()(prob, delta, info)))


NUMBERS = torch.tensor([0.0, -0.0, NAN, INF, -INF, -0.5, 0.25, 0.25 + 2**-25, 0.5, 0.75, 1.0, 2.0**-24, 1e-40])


@pytest.mark.parametrize("kind", ["compiled", "emulated"])
def test_search_for_a_disagreement(kind, request):
    kernels = library.loaded["cpu"] if kind == "compiled" else request.getfixturevalue("emulated_kernels")

    @settings(max_examples=120 if kind == "compiled" else 40, derandomize=True, deadline=None)
    @given(
        st.tuples(st.integers(0, 3), st.integers(1, 3), st.integers(1, 5), st.integers(0, 24), st.integers(1, 24)),
        st.integers(1, 600),
        st.sampled_from([0.0, 0.25, 0.5, 0.9]),
        st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
        st.tuples(st.sampled_from(sorted(LAYOUTS)), st.sampled_from(sorted(LAYOUTS))),
        st.integers(0, 2**32 - 1),
        st.booleans(),
    )
    def search(sizes, top_n, thresh, dtype, layout, seed, odd):
        N, A, C, H, W = sizes
        prob, delta, info, anchors = example("cpu", images=N, A=A, C=C, side=(H, W), dtype=dtype, seed=seed)
        if odd:
            random = torch.Generator().manual_seed(seed)
            prob = NUMBERS.to(dtype)[torch.randint(0, len(NUMBERS), prob.shape, generator=random)]
            special = NUMBERS.to(dtype)[torch.randint(0, len(NUMBERS), delta.shape, generator=random)]
            delta = torch.where(delta > 2, special, delta)
        inputs = (LAYOUTS[layout[0]](prob), LAYOUTS[layout[1]](delta), info, anchors)
        answers = []
        for loaded in ({}, {"cpu": kernels}):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(library, "loaded", loaded)
                answers.append(retina_decode(*inputs, pre_nms_top_n=top_n, thresh=thresh, num_anchors=A))
        (bbox, *chosen), (compiled_bbox, *compiled_chosen) = answers
        assert all(map(torch.equal, compiled_chosen, chosen))
        torch.testing.assert_close(compiled_bbox, bbox, rtol=1e-5, atol=1e-3, equal_nan=True)

    search()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"prob": (1, 5, 2, 2)}, r"cls_prob \(N, A\*C, H, W\) with A = 2, got \(1, 5, 2, 2\)"),
        ({"prob": (1, 6, 4)}, r"cls_prob \(N, A\*C, H, W\) with A = 2, got \(1, 6, 4\)"),
        ({"delta": (1, 4, 2, 2)}, r"expected bbox_pred \(1, 8, 2, 2\), got \(1, 4, 2, 2\)"),
        ({"im_info": (1, 2)}, r"expected im_info \(1, 3\), got \(1, 2\)"),
        ({"anchors": (4, 4)}, r"expected anchors \(8, 4\), got \(4, 4\)"),
        ({"top_n": 0}, "pre_nms_top_n >= 1 and thresh >= 0, got 0 and 0.5"),
        ({"thresh": -1.0}, "pre_nms_top_n >= 1 and thresh >= 0, got 3 and -1.0"),
        ({"thresh": NAN}, "pre_nms_top_n >= 1 and thresh >= 0, got 3 and nan"),
        ({"A": 0}, r"cls_prob \(N, A\*C, H, W\) with A = 0, got \(1, 6, 2, 2\)"),
        ({"prob": (1, 2**30, 2, 2)}, r"fewer than 2\^32 probabilities per image, got \(1, 1073741824, 2, 2\)"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    shape = {"prob": (1, 6, 2, 2), "delta": (1, 8, 2, 2), "im_info": (1, 3), "anchors": (8, 4)} | change
    tensors = [torch.ones(()).expand(shape[name]) for name in ("prob", "delta", "im_info", "anchors")]
    top_n, thresh, A = change.get("top_n", 3), change.get("thresh", 0.5), change.get("A", 2)
    with pytest.raises(ValueError, match=f"retina_decode: expected .*{message}|retina_decode: {message}"):
        retina_decode(*tensors, pre_nms_top_n=top_n, thresh=thresh, num_anchors=A)


def test_wrong_types_and_devices_are_named():
    prob, delta, info, anchors = example("cpu")
    options = {"pre_nms_top_n": 3, "thresh": 0.5, "num_anchors": 2}
    with pytest.raises(ValueError, match=r"of floating-point types, got torch.int64 and torch.float32"):
        retina_decode(prob.long(), delta, info, anchors, **options)
    with pytest.raises(ValueError, match="retina_decode: expected all tensors on one device, got cpu, meta"):
        retina_decode(prob, delta, info.to("meta"), anchors, **options)
