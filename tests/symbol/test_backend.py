import pytest

import symbol as S
from symbol import var
from symbol.backend import Backend


def test_problems_name_the_node_and_what_is_supported():
    backend = Backend("other")

    @backend.lowers("Activation", refuses=lambda attrs: attrs["act_type"] != "relu", only="relu")
    def activation(data, *, act_type):
        return data

    x = S.Activation(var("x"), act_type="relu", name="fine")
    x = S.Activation(x, act_type="tanh", name="refused")
    graph = S.Cast(x, dtype="float16", name="missing")
    assert backend.problems(graph.nodes()) == [
        "Activation 'refused': only relu",
        "Cast 'missing': other has no function for this operator",
    ]
    assert backend.lowerings["Activation"].function is activation


def test_one_function_per_operator_of_the_vocabulary():
    backend = Backend("other")
    backend.lowers("Cast")(print)
    with pytest.raises(AssertionError, match="Cast has a function in other"):
        backend.lowers("Cast")
    with pytest.raises(AssertionError, match="cast has no row"):
        backend.lowers("cast")
