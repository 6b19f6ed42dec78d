"""What the tests of the command share."""

from pathlib import Path

import pytest

from ressa.cli.app import main


@pytest.fixture
def run(capsys):
    "The command without a process of its own: exit code, output and errors."

    def call(*args):
        try:
            code = main([*map(str, args)])
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return call


def saved(name, folder):
    "A tiny model of a real class with its processor, as a hub repository holds them."
    from tiny_models import tiny

    _, processor = tiny(name, folder)
    processor.save_pretrained(folder)
    return Path(folder)


@pytest.fixture
def saved_model():
    "The function `saved`."
    return saved


@pytest.fixture(scope="module")
def vqav2(tmp_path_factory):
    "Twelve examples a split in VQAv2's columns, in a folder of parquet files."
    from datasets import Dataset
    from tiny_models import picture

    folder = tmp_path_factory.mktemp("vqav2")
    given = ["red"] * 7 + ["blue"] * 3
    answers = [
        dict(answer=text, answer_confidence="yes", answer_id=k)
        for k, text in enumerate(given)
    ]
    for split, first in {"train": 0, "validation": 100}.items():
        rows = [
            dict(
                image=picture(20, 24, first + i),
                question="what color is the shape ?",
                answer_type="other",
                image_id=i,
                multiple_choice_answer="red",
                answers=answers,
            )
            for i in range(12)
        ]
        Dataset.from_list(rows).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder
