import re

import numpy as np
import pytest
import torch
from torch.nn.parameter import is_lazy

import symbol as S
from symbol import Group, lower, var
from symbol.initializer import constant, first_value
from symbol.layers import concat, conv, normalizer_factory, relu, reshape, sigmoid

DATA_SHAPE = (2, 3, 8, 8)
NORM = normalizer_factory("localbn", wd_mult=0.0)


def features(data):
    return relu(NORM(conv(data, "c", 6, kernel=3), name="b"), "r")


def train_graph():
    """Build a detector with one anchor per cell and two classes on 8x8 cells: [cls_loss, reg_loss]."""
    x = features(var("data"))
    logit = reshape(conv(x, "cls", 2, no_bias=False), (0, 1, 2, -1), "split")
    logit = reshape(S.transpose(logit, axes=(0, 1, 3, 2), name="t"), (0, -3, 0), "logit")
    delta = reshape(conv(x, "bbox", 4, no_bias=False), (0, 0, -1), "delta")
    difference = S._contrib_BBoxNorm(delta - var("target"), var("label"), name="norm")
    smooth = S.smooth_l1(difference, scalar=3.0, name="smooth")
    return Group(
        [
            S._contrib_FocalLoss(logit, var("label_cls"), normalization="valid", name="cls_loss"),
            S.MakeLoss(var("weight") * smooth, name="reg_loss"),
        ]
    )


def predict_graph():
    """Build its prediction: [score, bbox_xyxy]."""
    x = features(var("data"))
    score = sigmoid(conv(x, "cls", 2, no_bias=False), "score")
    anchors = S._contrib_GenAnchor(score, scales=(2.0,), ratios=(1.0,), feature_stride=4, name="anchor")
    delta = conv(x, "bbox", 4, no_bias=False)
    found = S._contrib_GenProposalRetina(
        score, delta, var("im_info"), anchors, num_anchors=1, rpn_pre_nms_top_n=10, thresh=0.05, name="p"
    )
    return Group([concat([found[1]], 1, "cls_score"), concat([found[0]], 1, "bbox_xyxy")])


def train_inputs():
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(-1, 3, (2, 64), generator=generator).float()
    return {
        "data": torch.randn(DATA_SHAPE, generator=generator),
        "target": torch.randn(2, 4, 64, generator=generator),
        "label": label,
        "label_cls": label,
        "weight": (label >= 1).float()[:, None].expand(2, 4, 64),
    }


def predict_inputs():
    return {"data": train_inputs()["data"], "im_info": torch.tensor([[32.0, 32, 1], [30, 20, 1]])}


def parameters_of(module):
    return dict(module.named_parameters()) | dict(module.named_buffers())


def test_parameters_carry_the_names_and_shapes_of_the_graph():
    graph = train_graph()
    module = lower(graph, data=DATA_SHAPE)
    arguments, _, auxiliary = graph.infer_shape(data=DATA_SHAPE)
    expected = dict(zip(graph.list_arguments(), arguments, strict=True))
    expected = {name: shape for name, shape in expected.items() if name not in graph.list_inputs()}
    assert {name: tuple(p.shape) for name, p in module.named_parameters()} == expected
    buffers = dict(zip(graph.list_auxiliary_states(), auxiliary, strict=True))
    assert {name: tuple(p.shape) for name, p in module.named_buffers()} == buffers
    assert list(module.state_dict()) == [*expected, *buffers]


def test_parameters_start_as_their_hints_say():
    graph = conv(var("x"), "c", 4, no_bias=False, init=constant(3.0))
    module = lower(graph, x=DATA_SHAPE)
    assert (module.c_weight == 3).all()
    assert (module.c_bias == 0).all()
    seeded = lower(train_graph(), seed=7, data=DATA_SHAPE)
    assert (seeded.c_weight.detach().numpy() == first_value("c_weight", (6, 3, 3, 3), None, 7)).all()
    assert (seeded.c_weight != lower(train_graph(), seed=8, data=DATA_SHAPE).c_weight).any()


def test_inputs_come_by_name_or_with_data_first():
    graph = S.elemwise_sub(var("label"), conv(var("data"), "c", 3), name="d")
    data, label = torch.randn(2, 3, 5, 5), torch.randn(2, 3, 5, 5)
    module = lower(graph)
    expected = label - torch.nn.functional.conv2d(data, lower(graph, data=data.shape).c_weight)
    for out in (module(data, label), module(label=label, data=data)):
        assert isinstance(out, list)
        torch.testing.assert_close(out[0], expected)


def test_a_graph_without_parameters_and_a_head_that_is_an_input():
    graph = Group([var("x"), 2.0 * var("y"), S.BatchNorm(var("z"), name="b")])
    x, y, z = torch.rand(2), torch.rand(3), torch.rand(1, 2, 3, 3)
    out = lower(graph)(x=x, y=y, z=z)
    assert out[0] is x
    assert (out[1] == 2 * y).all()


def test_two_losses_are_scalars_that_differentiate():
    module = lower(train_graph(), data=DATA_SHAPE)
    losses = module(**train_inputs())
    assert [loss.shape for loss in losses] == [(), ()]
    sum(losses).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
    assert module.c_weight.grad.abs().max() > 1e-4


def test_training_and_evaluation_differ_in_batch_norm():
    module = lower(train_graph(), data=DATA_SHAPE)
    before = module.b_moving_mean.clone()
    train = module(**train_inputs())[0].item()
    assert (module.b_moving_mean != before).any()
    after = module.b_moving_mean.clone()
    assert module.eval()(**train_inputs())[0].item() != train
    assert (module.b_moving_mean == after).all()


def test_parameters_of_unknown_shape_come_with_the_first_call():
    module = lower(train_graph())
    assert {name for name, tensor in parameters_of(module).items() if not is_lazy(tensor)} == {"cls_bias", "bbox_bias"}
    losses = module(**train_inputs())
    expected = lower(train_graph(), data=DATA_SHAPE)
    assert [loss.item() for loss in losses] == [loss.item() for loss in expected(**train_inputs())]
    for name, tensor in parameters_of(expected).items():
        assert (parameters_of(module)[name] == tensor).all()
    assert isinstance(module.c_weight, torch.nn.Parameter)


def test_parameters_of_unknown_shape_come_with_a_state_dict():
    state = {name: torch.rand_like(p) for name, p in lower(train_graph(), data=DATA_SHAPE).state_dict().items()}
    module = lower(train_graph())
    module.load_state_dict(state)
    for name, tensor in parameters_of(module).items():
        assert (tensor == state[name]).all()
    module(**train_inputs())
    assert (module.c_weight == state["c_weight"]).all()


def test_a_state_dict_of_a_module_around_it():
    around = torch.nn.ModuleDict({"inner": lower(train_graph())})
    around.load_state_dict({"inner.c_weight": torch.ones(6, 3, 3, 3)}, strict=False)
    assert (around["inner"].c_weight == 1).all()


def test_a_part_of_a_state_dict_and_then_a_call():
    module = lower(train_graph())
    module.load_state_dict({"c_weight": torch.ones(6, 3, 3, 3)}, strict=False)
    module(**train_inputs())
    assert (module.c_weight == 1).all()
    assert module.bbox_weight.shape == (4, 6, 1, 1)


def test_parameters_of_unknown_shape_take_a_dtype():
    module = lower(train_graph()).double()
    module(**{name: tensor.double() for name, tensor in train_inputs().items()})
    assert {tensor.dtype for tensor in parameters_of(module).values()} == {torch.float64}


def test_shapes_that_contradict_the_graph():
    with pytest.raises(ValueError, match=r"Convolution 'c': 'weight' should be .*, but it is \(5, 3, 3, 3\)"):
        lower(features(var("data", shape=(0, 3, 0, 0))), c_weight=(5, 3, 3, 3))
    module = lower(features(var("data")))
    module.load_state_dict({"b_gamma": torch.ones(5)}, strict=False)
    with pytest.raises(ValueError, match=r"BatchNorm 'b': 'gamma' should be \(6,\), but it is \(5,\)"):
        module(data=torch.zeros(DATA_SHAPE))
    with pytest.raises(ValueError, match=r"Convolution 'c': data must have 4 dimensions, got \(3, 8, 8\)"):
        module(data=torch.zeros(3, 8, 8))


@pytest.mark.parametrize("make, inputs", [(train_graph, train_inputs), (predict_graph, predict_inputs)])
@pytest.mark.parametrize("known", [True, False])
def test_compiled_and_exported_modules_agree(make, inputs, known):
    training = make is train_graph
    inputs = inputs()
    names = sorted(make().list_inputs(), key=lambda name: name != "data")
    inputs = {name: inputs[name] for name in names}  # torch.export takes them by position

    def fresh():
        module = lower(make(), **({"data": DATA_SHAPE} if known else {})).train(training)
        module.load_state_dict(lower(make(), data=DATA_SHAPE).state_dict())
        return module

    plain, compiled = fresh(), fresh()
    expected = plain(**inputs)
    outputs = torch.compile(compiled, backend="eager", fullgraph=True)(**inputs)
    exported = torch.export.export(fresh(), (), kwargs=inputs).module()
    for others, state in ((outputs, compiled), (exported(**inputs), exported)):
        for one, other in zip(expected, others, strict=True):
            torch.testing.assert_close(one, other)
        assert state.state_dict().keys() == plain.state_dict().keys()
        for name, value in plain.state_dict().items():
            torch.testing.assert_close(state.state_dict()[name], value)
    if training:
        sum(expected).backward()
        sum(outputs).backward()
        for name, parameter in plain.named_parameters():
            torch.testing.assert_close(compiled.get_parameter(name).grad, parameter.grad)


def test_all_refused_attributes_are_reported_at_once():
    x, y = var("x"), var("y")
    refused = {
        "bilinear": S.UpSampling(x, scale=2, sample_type="bilinear", name="bilinear"),
        "several": S.UpSampling(x, y, scale=2, sample_type="nearest", name="several"),
        "lp": S.Pooling(x, kernel=(2, 2), pool_type="lp", name="lp"),
        "sum": S.Pooling(x, kernel=(2, 2), pool_type="sum", name="sum"),
        "same": S.Pooling(x, kernel=(2, 2), pooling_convention="same", name="same"),
        "uncounted": S.Pooling(x, kernel=(2, 2), pool_type="avg", count_include_pad=False, name="uncounted"),
        "padded": S.Pooling(x, kernel=(3, 3), pad=(2, 2), name="padded"),
        "open": S.BatchNorm(x, output_mean_var=True, name="open"),
        "empty": S.Reshape(x, shape=(), name="empty"),
        "shifted": S._contrib_GenProposalRetina(x, x, x, x, num_anchors=1, anchor_mean=(0, 0, 0, 0.1), name="shifted"),
        "scaled": S._contrib_GenProposalRetina(x, x, x, x, num_anchors=1, anchor_std=(1, 1, 2, 2), name="scaled"),
        "iou": S._contrib_GenProposalRetina(x, x, x, x, num_anchors=1, iou_loss=True, name="iou"),
        "plain": S._contrib_GenProposalRetina(x, x, x, x, num_anchors=1, output_one_hot=False, name="plain"),
        "many": S._contrib_GenProposalRetina(x, x, x, x, num_anchors=1, batch_wise_anchor=True, name="many"),
    }
    with pytest.raises(ValueError, match="cannot be lowered to torch:") as raised:
        lower(Group([*refused.values(), S.Pooling(x, kernel=(3, 3), pad=(1, 1), name="fine")]))
    named = [line.split("'")[1] for line in str(raised.value).splitlines()[1:]]
    assert named == list(refused)


@pytest.mark.parametrize("name", ["a.b", "a b", "1st", "class", "self", "torch", "x, y=print()", "é", 'a"b'])
def test_names_that_torch_fx_would_write_into_its_code(name):
    with pytest.raises(
        ValueError, match=f"variable {re.escape(repr(name))}: not usable as a name in Python; rename it"
    ):
        lower(2.0 * var(name))


@pytest.mark.parametrize("name", ["training", "forward", "weight()", "a.b"])
def test_names_of_parameters(name):
    graph = conv(var("x"), "c", 4, weight=var(name, init='["zero", {}]'))
    with pytest.raises(ValueError, match="not usable as a name in Python"):
        lower(graph, x=(1, 3, 4, 4))


def test_two_variables_of_one_name():
    graph = conv(conv(var("x"), "c", 3), "c", 3)
    with pytest.raises(ValueError, match="several variables are named c_weight; give each its own name"):
        lower(graph, x=(1, 3, 4, 4))


def test_a_graph_from_json_computes_the_same():
    graph = train_graph()
    one, other = (lower(g, data=DATA_SHAPE) for g in (graph, S.load_json(graph.tojson())))
    assert [x.item() for x in one(**train_inputs())] == [x.item() for x in other(**train_inputs())]


def test_the_prediction_of_the_test_graph():
    module = lower(predict_graph(), data=DATA_SHAPE).eval()
    score, bbox = (out.detach() for out in module(**predict_inputs()))
    assert score.shape == (2, 10, 3)
    assert bbox.shape == (2, 10, 4)
    assert ((score > 0).sum(2) <= 1).all()
    assert (score[..., 0] == 0).all()
    best = score.max(2).values
    assert (best.diff(dim=1) <= 0).all()
    for image, (height, width) in enumerate([(32, 32), (30, 20)]):
        assert bbox[image, :, 0::2].max() <= width - 1
        assert bbox[image, :, 1::2].max() <= height - 1
    np.testing.assert_array_less(0.05, best)
