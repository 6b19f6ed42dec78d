"""`ressa compare`: the paired difference of two models, in a table."""

import numpy as np
import pytest

from ressa.checkpoints.sparse import save_sparse
from ressa.cli.app import main
from ressa.cli.compare import comparison_rows, comparison_table, conclusion
from ressa.evaluation.answers import Evaluation
from ressa.evaluation.score_intervals import difference_interval


def judged(values, metric="exact match", types=None):
    n = len(values)
    values = np.asarray(values, dtype=float)
    return Evaluation(["x"] * n, [["x"]] * n, values, types or ["t"] * n, metric)


def test_the_table():
    types = ["color"] * 60 + ["shape"] * 40
    first = judged([1] * 80 + [0] * 20, types=types)
    second = judged([1] * 60 + [0] * 40, types=types)
    head, color, shape, total = comparison_rows(first, second)
    assert head == ["exact match", "n", "A", "B", "A − B", "95 % interval"]
    assert color[:5] == ["color", "60", "100.00%", "100.00%", "+0.00"]
    assert shape[:5] == ["shape", "40", "50.00%", "0.00%", "+50.00"]
    low, high = difference_interval(first.values, second.values)
    assert total[4:] == ["+20.00", f"{100 * low:+.2f} to {100 * high:+.2f}"]
    lines = comparison_table(first, second).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert conclusion(first, second) == "A is better than B: the interval is above 0."
    assert conclusion(second, first).startswith("B is better")


def test_few_equal_answers_show_no_difference():
    same = judged([1, 1, 1])
    assert conclusion(same, same) == "No difference is shown: the interval contains 0."
    assert comparison_rows(same, same)[-1][-1] == "-56.15 to +56.15"


def test_cider_is_shown_on_its_scale():
    rows = comparison_rows(
        judged([0.5] * 40, "CIDEr/10"), judged([0.4] * 40, "CIDEr/10")
    )
    assert rows[-1][2:5] == ["5.00", "4.00", "+1.00"]


def test_other_examples_are_refused():
    with pytest.raises(ValueError, match="other examples or metrics"):
        comparison_rows(judged([1, 1]), judged([1]))
    with pytest.raises(ValueError, match="other examples or metrics"):
        comparison_rows(judged([1]), judged([1], "VQA accuracy"))


@pytest.mark.slow
def test_two_models_on_few_questions(bundled, tmp_path, capsys):
    "The second one has lost its language part."
    model, processor = bundled
    for weight in model.language_model.parameters():
        weight.data.zero_()
    save_sparse(model, processor, tmp_path / "packed")
    line = ["compare", "bundled", str(tmp_path / "packed"), "--limit", "12"]
    assert main(line) == 0
    said = capsys.readouterr().out
    questions, captions = said.split("\n\n")[1:]
    assert questions.splitlines()[0].split()[:3] == ["exact", "match", "n"]
    assert "A is better than B" in questions and "A is better than B" in captions
    total = questions.splitlines()[-2].split()
    assert total[:5] == ["all", "12", "100.00%", "0.00%", "+100.00"]


def test_wrong_lines(capsys):
    for line in (["compare", "bundled"], "compare a b --no-such 1".split()):
        with pytest.raises(SystemExit):
            main(line)
    assert main("compare bundled no/such/folder --limit 0".split()) == 2
