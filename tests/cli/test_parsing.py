"""Reading a command line: errors of one line that name the nearest option."""

import pytest

from ressa.cli.parsing import OneLineParser, nearest


def test_the_nearest_name():
    assert nearest("temprature", ["temperature", "seed"]) == (
        " Did you mean temperature?"
    )
    assert nearest("xyz", ["temperature", "seed"]) == ""


@pytest.fixture
def parser():
    top = OneLineParser("bake")
    commands = top.add_subparsers(dest="command", required=True)
    commands.add_parser("cake").add_argument("--oven-heat", type=int)
    return top


@pytest.mark.parametrize(
    "unknown, said",
    [
        (["--ovenheat", "3"], "unknown option --ovenheat. Did you mean --oven-heat"),
        (["--ovenheat=3"], "unknown option --ovenheat. Did you mean --oven-heat"),
        (["leftover"], "unexpected argument 'leftover'"),
    ],
)
def test_what_is_unknown_is_refused(parser, capsys, unknown, said):
    with pytest.raises(SystemExit) as end:
        parser.refuse(unknown, "cake")
    error = capsys.readouterr().err
    assert end.value.code == 2 and said in error and len(error.splitlines()) == 1


def test_options_are_not_abbreviated(parser):
    options, unknown = parser.parse_known_args(["cake", "--oven", "3"])
    assert options.oven_heat is None and unknown == ["--oven", "3"]


def test_a_wrong_value_is_one_line(parser, capsys):
    with pytest.raises(SystemExit):
        parser.parse_args(["cake", "--oven-heat", "hot"])
    error = capsys.readouterr().err
    assert "--oven-heat: invalid int value: 'hot'" in error
    assert len(error.splitlines()) == 1
