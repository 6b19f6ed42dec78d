"""The field's data sets in the columns of their hub copies, read from files made here; and what goes wrong."""

import json

import datasets
import pytest
from datasets import Dataset
from tiny_models import picture

from ressa import hub_data
from ressa.data.collate import collate
from ressa.data.easy_vqa import easy_vqa_processor
from ressa.data.hub import advice, find_columns, standard_rows, load_data, prompt_writer
from ressa.models.load_model import load_model

TEN = ["red"] * 6 + ["blue"] * 4
CAPTIONS = ["a red circle", "there is a circle"]
SCHEMAS = {  # columns as in the hub's copies
    "VQAv2": dict(
        question="what color?",
        question_type="what color",
        answer_type="other",
        question_id=7,
        image_id=1,
        multiple_choice_answer="red",
        answers=[
            dict(answer=a, answer_confidence="yes", answer_id=i)
            for i, a in enumerate(TEN)
        ],
    ),
    "OK-VQA": dict(
        question="what color?",
        question_type="one",
        answer_type="other",
        question_id=7,
        answers=TEN,
    ),
    "TextVQA": dict(
        question="what color?",
        question_id=7,
        image_id="a1",
        answers=TEN,
        ocr_tokens=["x"],
        image_classes=["y"],
        set_name="val",
        image_width=8,
        image_height=8,
    ),
    "COCO": dict(
        question="Please describe.",
        question_id="7",
        answer=CAPTIONS,
        id=7,
        file_name="a.jpg",
        license=1,
    ),
    "Flickr30k": dict(
        caption=CAPTIONS, sentids=["1", "2"], img_id="3", filename="a.jpg"
    ),
    "NoCaps": dict(
        annotations_ids=[1, 2],
        annotations_captions=CAPTIONS,
        image_id=1,
        image_open_images_id="x",
    ),
    "plain": dict(question="what color?", answer="red"),
}
CAPTIONING = ("COCO", "Flickr30k", "NoCaps")


def made(name, n=4):
    return Dataset.from_list(
        [SCHEMAS[name] | dict(image=picture(12, 10 + i, i)) for i in range(n)]
    )


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_schema_becomes_rows(name, tmp_path):
    made(name).to_parquet(tmp_path / "validation-00000-of-00001.parquet")
    for data in (
        load_data(tmp_path),
        load_data(tmp_path, "validation", limit=3),
        load_data(tmp_path, "validation[1:4]"),
    ):
        assert data.column_names == [
            "image",
            "prompt",
            "answer",
            "answers",
            "question_type",
            "image_id",
        ]
        row = data[0]
        caption = name in CAPTIONING
        assert row["answers"] == (
            CAPTIONS if caption else ["red"] if name == "plain" else TEN
        )
        assert row["answer"] == (CAPTIONS[0] if caption else "red")
        assert (
            row["image"].mode == "RGB"
            and (row["question_type"] == "caption") == caption
        )
        assert ("what color?" in row["prompt"]) == (not caption)
        assert collate([data[0], data[1]], easy_vqa_processor())["labels"].shape[0] == 2
    assert (
        len(load_data(tmp_path, limit=3)) == 3
        and len(load_data(tmp_path, limit=99)) == 4
    )


def test_images_stay_with_their_rows(tmp_path):
    data = made("plain", 6).shuffle(seed=1)
    assert [row["image"].size for row in standard_rows(data)] == [
        row["image"].size for row in data
    ]
    again = standard_rows(standard_rows(data).rename_column("prompt", "question"))
    assert [row["image"].size for row in again] == [row["image"].size for row in data]


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv"])
def test_files_with_pictures_beside_them(tmp_path, suffix):
    (tmp_path / "pictures").mkdir()
    picture(12, 14).save(tmp_path / "pictures" / "a.png")
    data = Dataset.from_list(
        [dict(image="pictures/a.png", question="what color?", answer="red")] * 2
    )
    file = tmp_path / f"mine.{suffix}"
    data.to_csv(file) if suffix == "csv" else data.to_json(file)
    assert load_data(file)[1]["image"].size == (14, 12)


def test_gqa_in_two_parts(tmp_path):
    parts = {
        "val_images": [dict(id=str(i), image=picture(12, 10 + i)) for i in range(4)],
        "val_instructions": [
            dict(
                id=f"q{i}",
                imageId=str(i),
                question="what?",
                answer="red",
                fullAnswer="It is red.",
            )
            for i in (3, 1, 1, 0)
        ],
    }
    lines = []
    for name, rows in parts.items():
        (tmp_path / name).mkdir()
        Dataset.from_list(rows).to_parquet(tmp_path / name / "val-00000.parquet")
        lines.append(
            f"- config_name: {name}\n  data_files: [{{split: val, path: {name}/*}}]"
        )
    (tmp_path / "README.md").write_text("\n".join(["---", "configs:", *lines, "---"]))
    for limit in (None, 3):
        data = load_data(tmp_path, config="val_instructions", limit=limit)
        assert [row["image"].size[0] for row in data] == [13, 11, 11, 10][:limit]
        assert data["image_id"][:3] == ["3", "1", "1"]
    with pytest.raises(
        ValueError, match="(?s)Config name is missing.*val_images.*say which part"
    ):
        load_data(tmp_path)


def test_a_limit_reads_no_further(tmp_path):
    for i in range(2):
        made("plain").to_parquet(tmp_path / f"validation-0000{i}-of-00003.parquet")
    (tmp_path / "validation-00002-of-00003.parquet").write_bytes(b"not parquet at all")
    assert len(load_data(tmp_path, "validation", limit=3)) == 3
    with pytest.raises(ValueError, match="data .*"):
        load_data(tmp_path, "validation")


def test_what_cannot_become_rows_says_what_to_do(tmp_path):
    data = made("OK-VQA")
    secret = Dataset.from_list(
        [
            {k: v for k, v in row.items() if k != "answers"} | dict(answers=[])
            for row in data
        ]
    )
    blind = Dataset.from_list([dict(image=None, question="?", answer="red")])
    for bad, said in (
        (lambda: standard_rows(data.select([])), "empty"),
        (lambda: standard_rows(data.remove_columns("image")), "no column for image"),
        (lambda: standard_rows(data.remove_columns("question")), "no column for question"),
        (
            lambda: standard_rows(data.remove_columns("answers")),
            "no column for answers or captions",
        ),
        (lambda: standard_rows(secret), "take another split"),
        (lambda: standard_rows(blind), "holds no images"),
        (lambda: standard_rows(data, task="sing"), "task must be"),
        (lambda: find_columns(["image"], {"question": "frage"}), "no column 'frage'"),
        (lambda: find_columns(["image"], {"frage": "image"}), "is none of"),
        (lambda: load_data(tmp_path / "none"), "check the path"),
        (lambda: load_data(tmp_path, limit=0), "limit must be"),
        (lambda: load_data("no/such-data"), "What to do"),
    ):
        with pytest.raises(ValueError, match=said):
            bad()
    (tmp_path / "lost.json").write_text(
        json.dumps([dict(image="b.png", question="?", answer="no")])
    )
    with pytest.raises(
        ValueError, match="1 of 1 image files are missing, such as b.png"
    ):
        load_data(tmp_path / "lost.json")


@pytest.mark.parametrize(
    "error, todo",
    [
        (
            datasets.exceptions.DatasetNotFoundError(
                "Dataset 'x/y' is a gated dataset on the Hub. Visit the page"
            ),
            "ask for access",
        ),
        (
            datasets.exceptions.DatasetNotFoundError(
                "Dataset 'x/y' doesn't exist on the Hub or cannot be accessed."
            ),
            "check the spelling",
        ),
        (
            ConnectionError("Couldn't reach 'x/y' on the Hub (OfflineModeIsEnabled)"),
            "go online, or give a folder",
        ),
        (
            RuntimeError("Dataset scripts are no longer supported, but found y.py"),
            "code of its own",
        ),
    ],
)
def test_errors_of_the_hub(monkeypatch, error, todo):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr(hub_data, "load_dataset", fail)
    with pytest.raises(ValueError, match=todo) as caught:
        load_data("x/y", "validation")
    assert len(str(caught.value).splitlines()) == 1 and "x/y" in str(caught.value)


@pytest.mark.parametrize(
    "text, todo",
    [
        (
            "You are trying to access a gated repo.\nMake sure to have access to it.",
            "ask for access",
        ),
        (
            "x/y is not a local folder and is not a valid model identifier listed on 'https://huggingface.co/models'",
            "check the spelling",
        ),
        (
            "We couldn't connect to 'https://huggingface.co' to load the files",
            "go online, or give a folder",
        ),
    ],
)
def test_models_of_the_hub(monkeypatch, text, todo):
    def fail(*args, **options):
        raise OSError(text)

    monkeypatch.setattr(hub_data.AutoConfig, "from_pretrained", fail)
    with pytest.raises(ValueError, match=todo):
        load_model("x/y", "cpu")
    assert todo in advice(OSError(text))


def test_a_strangers_code_is_not_run(tmp_path):
    folder, marker = tmp_path / "odd", tmp_path / "ran"
    folder.mkdir()
    (folder / "odd.py").write_text(
        f"open({str(marker)!r}, 'w')\nfrom transformers import PretrainedConfig as Odd"
    )
    (folder / "config.json").write_text(
        json.dumps(dict(model_type="odd", auto_map={"AutoConfig": "odd.Odd"}))
    )
    with pytest.raises(ValueError, match="no vision-language model there"):
        load_model(str(folder), "cpu")
    assert not marker.exists()


def test_prompts_in_the_manner_of_a_processor():
    class Processor:
        tokenizer, chat_template, image_token = (
            easy_vqa_processor().tokenizer,
            "yes",
            "<image>",
        )

        def apply_chat_template(self, said, **options):
            return "<bos>" + "".join(
                f"<{c['type']}>" if c["type"] == "image" else c["text"]
                for c in said[0]["content"]
            )

    assert prompt_writer(Processor())("what?").startswith("<image>what? Answer")
    Processor.chat_template = None
    assert prompt_writer(Processor())("").startswith("<image>Describe")
    assert prompt_writer()("what?") == "Question: what? Short answer:"


def test_a_task_without_its_column_is_refused():
    rows = Dataset.from_list(
        [dict(image=picture(8, 8), question="what?", captions=["a"])]
    )
    with pytest.raises(ValueError, match="no column for answers"):
        standard_rows(rows, task="vqa")
