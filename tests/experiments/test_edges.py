"""Edges by name: spans joined, objects and random patches, and what is refused."""

from __future__ import annotations

import pytest

from hooked_llava.analysis import output_knockout
from hooked_llava.architecture.layouts import llava_layout
from hooked_llava.errors import InputError, SpanError
from hooked_llava.experiments.edges import STANDARD, Edge, edge_names, edges_of, marked, study_edges
from hooked_llava.prompt.token_map import TokenMap
from hooked_llava.readout.metrics import teacher_forced
from hooked_llava.replay import Intervention
from hooked_llava.replay.binding import bind
from tests.layouts import by_hand, inputs_of
from tests.pairs import as_users_run, pair

# <s> image(2 x 2) text | question question | rest | last
TEXT = TokenMap(
    token_ids=(1, 5, 5, 5, 5, 9, 10, 11, 12, 13), real=range(10), image_starts=(1,), layouts=(llava_layout(2, 2),)
)
TOKENS = TEXT.with_spans(question=[6, 7], object=[2])


def test_edges_in_every_spelling() -> None:
    pair = [Edge("image->last", "image", "last")]
    for spelling in ("image->last", ["image->last"], ("image", "last"), [("image", "last")], (("image", "last"),)):
        assert edges_of(spelling) == pair, spelling
    assert edges_of({"image->last": ("image", "last")}) == edges_of({"image->last": "image->last"}) == pair
    two = edges_of((("image", "last"), "question->last"))
    assert [edge.name for edge in two] == ["image->last", "question->last"]
    assert edges_of([([3, 4], None)]) == [Edge("[3, 4]->all", [3, 4], None)]
    assert edges_of(([3, 4], [5]))[0].source == [3, 4]
    assert edge_names(("image", "last")) == edge_names("image->last") == ["image->last"]
    assert edge_names({"mine": ("image", "last")}) == edge_names(["mine"]) == ["mine"]
    for wrong in (("image", "last", "text"), [3], [("image",)]):
        with as_users_run(), pytest.raises(InputError, match="is no edge"):
            edges_of(wrong)
    for nothing in ([], {}, ()):
        with pytest.raises(InputError, match=r"edges=.*'image->last'"):
            edges_of(nothing)
    with pytest.raises(InputError, match="edge '.*twice"):
        edges_of([("image", "last"), "image->last"])


def test_edges_by_name_or_with_their_ends() -> None:
    assert edges_of(["a->b"]) == [Edge("a->b", "a", "b")]
    assert edges_of({"mine": ("image", [9])}) == [Edge("mine", "image", [9])]
    blocked = Edge.of("image -> last").weighted([1, 2])
    assert [iv.hook for iv in blocked] == [("attn_scores", 1), ("attn_scores", 2)]
    assert blocked[0].block == ("source of image -> last", "target of image -> last")
    (halved,) = Edge.of("image -> last").weighted([1], 0.5)
    assert (halved.reweight, halved.factor) == (blocked[0].block, 0.5)
    for wrong in ("image", "->last", "image->", ""):
        with pytest.raises(InputError, match="is no edge; expected 'source->target'"):
            Edge.of(wrong)
    with pytest.raises(InputError, match="edge '.*twice"):
        edges_of(["a->b", "a->b"])


def test_marked_prompts_have_both_ends_of_every_edge() -> None:
    ours = pair("plain").ours
    inputs = ours.as_inputs(pair("plain").prompt(n_text=6)).with_spans(question=[6, 7])
    edges = edges_of({"one": ("image", "question|last"), "two": ([0, 2], None), "three": ("object", "last")})
    found, present = marked(inputs, edges, missing="skip")
    assert present.tolist() == [[True, True, False]]
    ends = {name: found.token_map[name].tolist() for edge in edges for name in edge.ends}
    last = inputs.shape[1] - 1
    assert ends["source of one"] == [1, 2, 3, 4]
    assert ends["target of one"] == [6, 7, last]
    assert ends["source of two"] == [0, 2]
    assert ends["target of two"] == list(range(last + 1))
    assert ends["source of three"] == ends["target of three"] == []
    assert "one" not in inputs.token_map.named
    with pytest.raises(SpanError):
        marked(inputs, edges)
    with pytest.raises(InputError, match="edge '.*source.*after.*target"):
        marked(inputs, edges_of({"back": ("last", "question")}), missing="skip")


def test_an_edge_without_positions_is_no_edge_whose_blocking_changes_nothing() -> None:
    ours = pair("plain").ours
    inputs = ours.as_inputs(pair("plain").prompt(n_text=6))
    question = [p for p in inputs.token_map["rest"] if p > inputs.token_map["image"][-1]]
    inputs = inputs.with_spans(question=question)  # all text after the image, so that `rest` is empty
    for edges in ("rest->last", "image->rest", "image-image->last", ([], "last")):
        with pytest.raises(SpanError, match=r"rest.*system, image, question|image-image|has no positions"):
            marked(inputs, edges_of(edges))
        _, present = marked(inputs, edges_of(edges), missing="skip")
        assert not present.any(), edges
    found = output_knockout(ours, inputs, ["mlp at rest", "mlp at last"], window=1, missing="skip")
    assert found["effect"].isnull().all("layer").values.tolist() == [True, False]
    with pytest.raises(SpanError, match="positions='rest'"):
        bind(Intervention("blocks.1.hook_resid_post", positions="rest", zero=True), ours, inputs)


def test_edges_of_a_study_mean_the_same_in_every_question() -> None:
    every = [f"{name}->last" for name in STANDARD]
    assert [edge.name for edge in study_edges(every)] == every
    assert study_edges({"whole": (None, "last")})[0].source is None
    with pytest.raises(SpanError, match="span 'patches'"):
        study_edges(["image&patches->last"])
    with pytest.raises(InputError, match="positions by number.*'image->last'"):
        study_edges({"mine": (range(3), "last")})


def test_last_is_where_an_appended_answer_is_read() -> None:
    """In edges alone: as a span of its own it stays the prompt's last position."""
    ours = pair().ours
    asked = ours.as_inputs(pair().prompt(n_text=6)).with_spans(question=[6, 7, 8])
    forced = teacher_forced(ours, asked, [7, 8, 9]).inputs
    for end, positions in (("last", [10, 11, 12]), ("question|last", [6, 7, 8, 10, 11, 12]), ([10], [10])):
        for inputs, found in ((forced, positions), (asked, [p for p in positions if p < 11])):
            [edge] = edges_of({"mine": ("image", end)})
            assert marked(inputs, [edge])[0].token_map[edge.ends[1]] == found
            block = bind(Intervention("blocks.1.attn.hook_attn_scores", block=("image", end)), ours, inputs)
            assert list(block.positions[0]) == found
            named = bind(Intervention("blocks.1.hook_mlp_out", positions=end, zero=True), ours, inputs)
            assert list(named.positions[0]) == [p for p in positions if p < 11]
    assert forced.token_map["predicting"] == [10, 11, 12]


def test_edges_of_images_with_unequal_layouts() -> None:
    """The object's patches in every grid, without newlines and class token, whatever the layout."""
    prompts = inputs_of([by_hand(), llava_layout(2, 2)], [by_hand()]).padded_left()
    prompts = prompts.with_boxes(object=[[(0, 0, 8, 8)], [(16, 8, 24, 16)]])
    edges = edges_of(["object->last", "image->last", "other->last", "random->last", "image-object-other->last"])
    found, present = marked(prompts, edges)
    assert present.all()
    for token_map, shown in zip(found.token_maps, (["base", "fine"], ["base", "fine"]), strict=True):
        ends = {edge.name: token_map[edge.ends[0]] for edge in edges}
        assert [token_map.cell_at(p)[1].grid for p in ends["object->last"]] == shown
        assert ends["image->last"] == token_map["image"]
        assert len(ends["random->last"]) == len(ends["object->last"])
        patches = ends["object->last"] | ends["other->last"]
        assert ends["image-object-other->last"] == token_map["image"] - patches
        assert [token_map.labels[p].rpartition("[")[2] for p in ends["image-object-other->last"]] == [
            "cls]",
            "newline]",
            "0,newline]",
            "1,newline]",
        ]
