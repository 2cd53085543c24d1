import symbol as S
from symbol import Group, var
from symbol.passes import rewrite


def test_a_rewrite_that_changes_nothing_keeps_the_nodes():
    graph = S.Activation(S.Convolution(var("x"), num_filter=4, kernel=(1, 1), name="c"), act_type="relu", name="r")
    same = rewrite(graph, lambda node, inputs: node)
    assert same.entries == graph.entries


def test_a_rewrite_follows_every_output():
    x = S._contrib_GenProposalRetina(*map(var, "abcd"), num_anchors=1, name="p")
    graph = Group([x[1], x[0]])
    text = graph.tojson()

    def rename(node, inputs):
        return S.Node(node.op, "q", inputs, node.attrs, node.hints)

    assert rewrite(graph, rename).list_outputs() == ["q_scores", "q_output"]
    assert graph.tojson() == text
