"""The report of a pruning: errors against the definition, sums of parts, table and figure."""

import json

import matplotlib
import pytest
import torch

from ressa.palette import PALETTE
from ressa.pruning.report import LayerReport, PruneReport, estimated_error
from ressa.pruning.scores import reconstruction_error
from ressa.pruning.statistics import Statistics

matplotlib.use("agg")


def line(part, shape, sparsity, error):
    return LayerReport(
        name=f"{part}.fc",
        part=part,
        shape=shape,
        target=0.5,
        sparsity=sparsity,
        error=error,
        tokens=9,
        seconds=0.5,
    )


def example_report():
    lines = [
        line("vision", (4, 6), sparsity=0.5, error=0.2),
        line("language", (10, 10), sparsity=0.2, error=0.1),
        line("language", (10, 20), sparsity=0.5, error=0.3),
    ]
    return PruneReport(lines, left_dense={"head": "no calibration token reached it"})


def test_the_error_is_exact_with_the_gram_matrix():
    dense, x = torch.randn(600, 8), torch.randn(50, 8)
    pruned = dense * (torch.rand_like(dense) > 0.5)
    error = estimated_error(dense, pruned, Statistics.of(x))
    assert error == pytest.approx(reconstruction_error(x, dense, pruned), rel=1e-5)


def test_the_error_is_exact_without_it_where_inputs_are_uncorrelated():
    dense, x = torch.randn(100, 8), torch.diag(torch.rand(8) + 0.1)
    pruned = dense * (torch.rand_like(dense) > 0.5)
    error = estimated_error(dense, pruned, Statistics.of(x, gram=False))
    assert error == pytest.approx(reconstruction_error(x, dense, pruned), rel=1e-5)


def test_without_it_many_output_rows_are_sampled_evenly():
    dense, stats = torch.randn(1024, 8), Statistics.of(torch.randn(50, 8), gram=False)
    pruned = dense.clone()
    pruned[1::4] = 0  # rows that the estimate does not look at
    assert estimated_error(dense, pruned, stats) == 0
    pruned[::4] = 0
    assert estimated_error(dense, pruned, stats) == 1


def test_a_weight_of_zeros_has_no_error():
    zeros, stats = torch.zeros(4, 6), Statistics.of(torch.randn(9, 6))
    assert estimated_error(zeros, zeros, stats) == 0


def test_sums_of_the_parts():
    parts = example_report().parts()
    assert list(parts) == ["vision", "language"]
    assert parts["language"] == {
        "layers": 2,
        "weights": 300,
        "sparsity": pytest.approx((0.2 * 100 + 0.5 * 200) / 300),
        "error": pytest.approx(0.2),
    }


def test_the_printed_table():
    assert repr(example_report()).splitlines() == [
        "      part layers     weights sparsity  error",
        "    vision      1          24   0.5000  0.200",
        "  language      2         300   0.4000  0.200",
        "left dense: 1 layer, no calibration token reached it: head",
    ]
    assert len(repr(PruneReport()).splitlines()) == 1


def test_layers_that_stayed_dense_are_one_line_for_each_reason():
    report = PruneReport(
        left_dense={f"layer.{i}": "its inputs hold NaN" for i in range(300)}
    )
    report.left_dense["head"] = "no calibration token reached it"
    assert repr(report).splitlines()[1:] == [
        "left dense: 300 layers, its inputs hold NaN: layer.0, layer.1, layer.2, …",
        "left dense: 1 layer, no calibration token reached it: head",
    ]


def test_zeros_among_all_weights_of_a_part():
    report = example_report()
    report.all_weights = {"language": 1200, "vision": 48}
    assert report.parts()["language"]["of_all"] == pytest.approx(120 / 1200)
    assert repr(report).splitlines()[:3] == [
        "      part layers     weights sparsity  error   of all",
        "    vision      1          24   0.5000  0.200   0.2500",
        "  language      2         300   0.4000  0.200   0.1000",
    ]


def test_plain_values_make_the_same_report_again():
    report = example_report()
    values = json.loads(json.dumps(report.to_dict()))
    lines = [LayerReport(**layer) for layer in values.pop("layers")]
    again = PruneReport(lines, **values)
    assert again.parts() == report.parts()
    assert again.left_dense == report.left_dense


def test_the_figure_has_a_bar_for_each_layer_in_the_colour_of_its_part():
    axes = example_report().plot()
    assert [bar.get_center()[0] for bar in axes.patches] == pytest.approx([0, 1, 2])
    assert [bar.get_height() for bar in axes.patches] == [0.2, 0.1, 0.3]
    colors = [matplotlib.colors.to_hex(bar.get_facecolor()) for bar in axes.patches]
    wanted = [PALETTE[part] for part in ("vision", "language", "language")]
    assert colors == [color.lower() for color in wanted]
    assert example_report().plot(axes) is axes


def test_the_figure_names_each_block_at_its_first_layer():
    names = ("blocks.0.fc1", "blocks.0.fc2", "blocks.1.fc1", "head")
    lines = [line("vision", (4, 6), sparsity=0.5, error=0.2) for _ in names]
    for layer, name in zip(lines, names):
        layer.name = name
    axes = PruneReport(lines).plot()
    assert axes.get_xticks().tolist() == [0, 2, 3]
    shown = [label.get_text() for label in axes.get_xticklabels()]
    assert shown == ["vision 0", "vision 1", "head"]
