"""Write a folder of drawn pictures with conversations about them, in each format that data come in.

python tests/tools/shapes_folder.py FOLDER [--rows 300] [--format llava] [--images 2] [--turns 2]
"""

import argparse
import json
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage
from PIL import ImageDraw

COLORS = ("red", "green", "blue", "yellow", "black", "white")
SHAPES = ("circle", "square", "triangle")
FORMATS = ("messages", "llava", "saved", "parquet", "csv", "choices")
QUESTIONS = ("What color is the shape?", "What shape is it?")


def drawn(color, shape, size, generator):
    "A picture of one coloured shape at a random place, on grey."
    canvas = PILImage.new("RGB", (size, size), "grey")
    width = int(generator.integers(size // 3, size // 2 + 1))
    left, top = generator.integers(0, size - width + 1, 2).tolist()
    box = (left, top, left + width - 1, top + width - 1)
    pen = ImageDraw.Draw(canvas)
    if shape == "circle":
        pen.ellipse(box, fill=color)
    elif shape == "square":
        pen.rectangle(box, fill=color)
    else:
        corners = [(left, box[3]), (box[2], box[3]), ((left + box[2]) // 2, top)]
        pen.polygon(corners, fill=color)
    return canvas


def draw_pictures(folder, count, size, seed):
    "Draw pictures into `folder/pictures`: a list of (file, color, shape)."
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    made = []
    for number in range(count):
        color = str(generator.choice(COLORS))
        shape = str(generator.choice(SHAPES))
        file = f"pictures/{number:04}.png"
        drawn(color, shape, size, generator).save(folder / file)
        made.append((file, color, shape))
    return made


def rows_of(pictures, images, turns):
    "Rows: the files of pictures that each shows, and its turns (question, answer)."
    rows = []
    for first in range(0, len(pictures), images):
        shown = pictures[first : first + images]
        _, *properties = shown[-1]
        # the questions are about the last picture
        about = "" if images == 1 else f"In picture {images}: "
        asked = [
            (about + QUESTIONS[turn % 2], properties[turn % 2]) for turn in range(turns)
        ]
        rows.append(([file for file, _, _ in shown], asked))
    return rows


def as_messages(files, asked):
    "A conversation in the common chat format, its pictures at the first question."
    messages = []
    for number, (question, answer) in enumerate(asked):
        parts = [{"type": "text", "text": question}]
        if number == 0:
            parts = [{"type": "image", "text": None} for _ in files] + parts
        messages.append({"role": "user", "content": parts})
        told = [{"type": "text", "text": answer}]
        messages.append({"role": "assistant", "content": told})
    return messages


def as_llava(files, asked):
    "The same in LLaVA's format."
    turns = []
    for number, (question, answer) in enumerate(asked):
        marks = "<image>\n" * len(files) if number == 0 else ""
        turns.append({"from": "human", "value": marks + question})
        turns.append({"from": "gpt", "value": answer})
    return turns


MESSAGE = {
    "role": Value("string"),
    "content": List({"type": Value("string"), "text": Value("string")}),
}


def as_data_set(folder, rows):
    "The conversations as a data set that holds its pictures."
    columns = {
        "messages": [as_messages(files, asked) for files, asked in rows],
        "images": [[str(folder / file) for file in files] for files, _ in rows],
    }
    features = Features({"messages": List(MESSAGE), "images": List(Image())})
    return Dataset.from_dict(columns, features=features)


def write_lines(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def write(folder, kind, pictures, images, turns):
    "Write one format; returns the path that `load_data` takes."
    rows = rows_of(pictures, images, turns)
    if kind == "messages":
        lines = [{"messages": as_messages(*row), "images": row[0]} for row in rows]
        return write_lines(folder / "messages.jsonl", lines)
    if kind == "llava":
        entries = [
            {
                "id": str(number),
                "image": files[0] if images == 1 else files,
                "conversations": as_llava(files, asked),
            }
            for number, (files, asked) in enumerate(rows)
        ]
        (folder / "llava.json").write_text(json.dumps(entries, indent=1))
        return folder / "llava.json"
    if kind == "saved":
        as_data_set(folder, rows).save_to_disk(folder / "saved")
        return folder / "saved"
    if kind == "parquet":
        (folder / "parquet").mkdir(exist_ok=True)
        as_data_set(folder, rows).to_parquet(folder / "parquet" / "train.parquet")
        return folder / "parquet"
    if kind == "csv":
        lines = ["file_name,question,answer"]
        lines += [
            f"{Path(file).name},{QUESTIONS[0]},{color}" for file, color, _ in pictures
        ]
        (folder / "pictures" / "metadata.csv").write_text("\n".join(lines) + "\n")
        return folder / "pictures"
    lines = [
        {
            "image": file,
            "question": QUESTIONS[0],
            "choices": list(COLORS),
            "answer": COLORS.index(color),
        }
        for file, color, _ in pictures
    ]
    return write_lines(folder / "choices.jsonl", lines)


def make(folder, kind, *, rows=300, images=1, turns=2, size=64, seed=0):
    "Draw the pictures and write one format; returns the path that `load_data` takes."
    folder = Path(folder)
    pictures = draw_pictures(folder, rows * images, size, seed)
    return write(folder, kind, pictures, images, turns)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--format", choices=FORMATS, default="llava")
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--images", type=int, default=1, help="pictures of each row")
    parser.add_argument("--turns", type=int, default=2, help="questions of each row")
    parser.add_argument("--size", type=int, default=64, help="pixels of each side")
    parser.add_argument("--seed", type=int, default=0)
    options = vars(parser.parse_args())
    print(make(options.pop("folder"), options.pop("format"), **options))
