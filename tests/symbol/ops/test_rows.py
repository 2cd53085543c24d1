import pytest

from symbol.ops import ALIASES, OPS, find_op

STATISTICS = {"momentum": 0.9, "eps": 1e-3, "fix_gamma": True, "use_global_stats": False, "output_mean_var": False}


@pytest.mark.parametrize(
    "op, defaults",
    [
        ("Convolution", {"stride": (), "pad": (), "dilate": (), "num_group": 1, "no_bias": False}),
        ("BatchNorm", {**STATISTICS, "axis": 1}),
        ("_contrib_SyncBatchNorm", {**STATISTICS, "ndev": 1}),
        ("Pooling", {"pool_type": "max", "pooling_convention": "valid", "global_pool": False, "kernel": ()}),
        ("slice_axis", {"end": None}),
        ("Reshape", {"reverse": False}),
        ("Concat", {"dim": 1}),
        ("smooth_l1", {"scalar": 1.0}),
        ("MakeLoss", {"grad_scale": 1.0, "valid_thresh": 0.0, "normalization": "null"}),
    ],
)
def test_the_defaults_are_mxnets(op, defaults):
    """JSON files omit defaults, so another default would change the meaning of a file."""
    assert defaults.items() <= find_op(op).defaults().items()


def test_defaults_of_the_detection_operators():
    assert find_op("_contrib_FocalLoss").defaults() == {
        **{"alpha": 0.25, "gamma": 2.0, "grad_scale": 1.0, "normalization": "null"},
        **{"out_grad": False, "workspace": 256},
    }
    assert find_op("_contrib_BBoxNorm").defaults() == {"normalization": "valid"}


def test_every_default_is_a_value_of_its_attribute():
    for row in OPS.values():
        for key, value in row.defaults().items():
            assert row.attrs[key].parse(value) == value, f"{row.name}.{key}"


def test_rows_are_consistent():
    for row in OPS.values():
        assert row.inputs[len(row.inputs) - len(row.auxiliary) :] == row.auxiliary or not row.auxiliary
        assert set(row.auxiliary) <= set(row.parameters) <= set(row.inputs)
        assert not row.variadic or "num_args" in row.attrs


def test_aliases_and_unknown_names():
    assert {find_op(alias).name for alias in ALIASES} <= OPS.keys()
    assert not ALIASES.keys() & OPS.keys()
    with pytest.raises(ValueError, match="unknown operator 'Batchnorm'; nearest: BatchNorm"):
        find_op("Batchnorm")
