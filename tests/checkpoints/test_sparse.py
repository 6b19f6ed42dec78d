"""Sparse checkpoints: exact to the bit, whole or refused, one tensor at a time."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import killed
import pytest
import torch
from random_tensors import random_bits, same
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from warm_processes import ended

from ressa.checkpoints import sparse
from ressa.checkpoints.packing import TENSOR_DTYPES
from ressa.checkpoints.sparse import (
    load_sparse,
    ordinary_tensors,
    pack,
    packed_tensors,
    save_sparse,
    unpack,
)
from ressa.files import whole_folder
from ressa.models.load_model import load_model
from ressa.pruning.scores import magnitude


@pytest.mark.parametrize(
    "target, limit",
    [
        (dict(sparsity=0.5), 0.57),
        (dict(sparsity=0.7), 0.37),
        (dict(pattern="2:4"), 0.55),
    ],
)
def test_sizes(tmp_path, target, limit):
    layers = {
        f"layer{i}.weight": magnitude(torch.randn(512, 1000), **target).bfloat16()
        for i in range(3)
    }
    (tmp_path / "dense").mkdir()
    save_file(layers, tmp_path / "dense" / "model.safetensors")
    sizes = pack(tmp_path / "dense", tmp_path / "packed")
    assert sizes["dense"] == 3 * 2 * 512 * 1000
    assert sizes["packed"] / sizes["dense"] <= limit


def packed_folder(path, **tensors):
    with whole_folder(path) as side:
        sparse._write_packed(side, tensors, 5e9)
    return path


def everything(folder):
    return {name: tensor.read() for name, tensor in packed_tensors(folder).items()}


def some():
    return {
        "mask": magnitude(torch.randn(16, 12), sparsity=0.7).bfloat16(),
        "half": magnitude(torch.randn(8, 16), pattern="2:4"),
        "norm": torch.randn(5),
        "flags": torch.tensor([True, False, True]),
        "step": torch.tensor(3),
        "none": torch.zeros(0, 4),
    }


@pytest.mark.parametrize("limit", [1, 100, 5e9])
def test_folder_round_trip(tmp_path, limit):
    tensors = some() | {
        str(dtype): random_bits(dtype, (7, 3), 0.8) for dtype in TENSOR_DTYPES.values()
    }
    with whole_folder(tmp_path / "a") as side:
        sparse._write_packed(side, tensors, limit)
    again = everything(tmp_path / "a")
    assert list(again) == list(tensors)
    for name, tensor in tensors.items():
        assert same(again[name], tensor), name
    unpack(tmp_path / "a", tmp_path / "b", max_shard_size=limit)
    plain = {
        name: tensor.read() for name, tensor in ordinary_tensors(tmp_path / "b").items()
    }
    for name, tensor in tensors.items():
        assert same(plain[name], tensor), name
    pack(tmp_path / "b", tmp_path / "c", max_shard_size=limit)
    for name, tensor in everything(tmp_path / "c").items():
        assert same(tensor, tensors[name]), name


@pytest.mark.slow
def test_every_flipped_byte_is_found(tmp_path):
    folder = packed_folder(tmp_path / "a", **some())
    before = everything(folder)
    for path in sorted(folder.iterdir()):
        whole, missed = path.read_bytes(), []
        for i in range(len(whole)):
            path.write_bytes(
                whole[:i] + bytes([whole[i] ^ 1 << i % 8]) + whole[i + 1 :]
            )
            try:
                again = everything(folder)
            except ValueError as error:
                assert path.name in str(error) or "sparse-" in str(error), str(error)
            else:  # what a flip leaves readable must be what was written
                if again.keys() != before.keys() or not all(
                    same(again[k], before[k]) for k in before
                ):
                    missed.append(i)
        path.write_bytes(whole)
        assert not missed, (path.name, missed[:5])


def test_every_cut_is_found(tmp_path):
    folder = packed_folder(tmp_path / "a", **some())
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        for i in range(0, len(whole), 7):
            path.write_bytes(whole[:i])
            with pytest.raises(ValueError, match=path.name):
                everything(folder)
        path.write_bytes(whole)


def forge(folder, change):
    "Change the table and make its checksum right again."
    table = json.loads((folder / "sparse.json").read_text())
    table.pop("crc32")
    change(table["tensors"])
    (folder / "sparse.json").write_text(
        json.dumps(table | {"crc32": sparse._table_checksum(table)})
    )


@pytest.mark.parametrize(
    "name, shape",
    [
        ("mask", [16, 13]),
        ("mask", [2**40]),
        ("mask", [-16, -12]),
        ("mask", [192.0]),
        ("half", [2**40]),
        ("half", [130]),
        ("norm", [4]),
        ("norm", [True] * 5 + [5]),
        ("mask", "16"),
    ],
)
def test_forged_shapes(tmp_path, name, shape):
    folder = packed_folder(tmp_path / "a", **some())
    forge(folder, lambda rows: rows[name].update(shape=shape))
    with pytest.raises(ValueError, match=name):
        everything(folder)


@pytest.mark.parametrize(
    "file",
    [
        "../a/sparse-00001-of-00001.safetensors",
        "/etc/passwd",
        "",
        None,
        7,
        ["a"],
        "..",
        "a\0.safetensors",
        "sub/x.safetensors",
        "..\\x.safetensors",
        "sparse.json",
    ],
)
def test_paths_out_of_the_folder(tmp_path, file):
    folder = packed_folder(tmp_path / "a", **some())
    forge(folder, lambda rows: rows["mask"].update(file=file))
    with pytest.raises(ValueError, match="is not the name of a safetensors file"):
        packed_tensors(folder)
    dense = tmp_path / "dense"
    dense.mkdir()
    (dense / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"w": file}})
    )
    with pytest.raises(ValueError, match="is not the name of a safetensors file"):
        pack(dense, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x04K\x01.",
        b"\xff" * 64,
        (2**62).to_bytes(8, "little") + b"{}",
        (10**8 + 1).to_bytes(8, "little") + b" " * 99,
        (2).to_bytes(8, "little") + b"[]",
    ],
)
def test_no_safetensors_file(tmp_path, content):
    folder = packed_folder(tmp_path / "a", **some())
    path = folder / "sparse-00001-of-00001.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=path.name):
        packed_tensors(folder)
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense" / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="model.safetensors"):
        pack(tmp_path / "dense", tmp_path / "out")


def test_a_pickle_is_not_opened(tmp_path):
    torch.save({"w": torch.ones(3)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="other formats are not read"):
        pack(tmp_path, tmp_path.parent / "out")
    torch.save({"w": torch.ones(3)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="not a whole safetensors"):
        pack(tmp_path, tmp_path.parent / "out")


@pytest.mark.parametrize("text", ["", "[]", "{", "{}", '{"version": 1}', "[" * 10**5])
def test_broken_tables(tmp_path, text):
    (tmp_path / "sparse.json").write_text(text)
    with pytest.raises(ValueError, match="sparse.json"):
        packed_tensors(tmp_path)


class Full:
    "A file on a disk that is full after some bytes."

    def __init__(self, file, room):
        self.file, self.room = file, room

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            raise OSError(28, "No space left on device")
        return self.file.write(data)


def test_full_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(
        sparse,
        "open",
        lambda *args, **options: Full(open(*args, **options), 200),
        raising=False,
    )
    with pytest.raises(ValueError, match="target: cannot be written: No space left"):
        packed_folder(tmp_path / "target", **some())
    assert list(tmp_path.iterdir()) == []


def test_read_only_folder(tmp_path, monkeypatch):
    def refuse(*args, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(
        ValueError, match="target: cannot be written: Permission denied"
    ):
        packed_folder(tmp_path / "target", **some())


def test_what_is_there_is_never_touched(tmp_path):
    folder = packed_folder(tmp_path / "a", **some())
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for write in (
        lambda: packed_folder(folder, **some()),
        lambda: pack(tmp_path, folder),
        lambda: unpack(folder, folder),
    ):
        with pytest.raises(ValueError):
            write()
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}
    (tmp_path / "empty").mkdir()
    packed_folder(tmp_path / "empty", **some())
    with pytest.raises(ValueError, match="lies in"):
        unpack(folder, folder / "inside")
    with pytest.raises(ValueError, match="packed already"):
        pack(folder, tmp_path / "b")
    with pytest.raises(ValueError, match="is not a folder"):
        pack(tmp_path / "nowhere", tmp_path / "b")
    with pytest.raises(ValueError, match="max_shard_size"):
        with whole_folder(tmp_path / "b") as side:
            sparse._write_packed(side, some(), 0)
    assert not (tmp_path / "b").exists()


@pytest.mark.slow
def test_killed_in_the_middle(tmp_path):
    "After the first of several files; nothing of that name is left, and what is left is not accepted."
    assert ended(killed.one_of_two_files, tmp_path / "target") == -signal.SIGKILL
    left = list(tmp_path.iterdir())
    assert [path.suffix for path in left] == [".part"]
    with pytest.raises(ValueError, match="no sparse.json"):
        load_sparse(left[0])
    packed_folder(tmp_path / "target", **some())


def llama(tied=True, **options):
    config = LlamaConfig(
        vocab_size=48,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        **options,
    )
    model = LlamaForCausalLM(config).eval()
    for name, weight in model.named_parameters():
        if "proj" in name:
            weight.data = magnitude(weight.data, sparsity=0.7)
    model.generation_config.max_new_tokens = 7
    return model


@pytest.mark.parametrize("tied", [True, False])
def test_model_round_trip(tmp_path, tied):
    model = llama(tied)
    model.model.layers[0].mlp.up_proj.weight.data[0, :2] = torch.tensor([-0.0, 1e-45])
    save_sparse(model, None, tmp_path / "a", max_shard_size=3000)
    assert ("lm_head.weight" in packed_tensors(tmp_path / "a")) != tied
    again, processor = load_sparse(tmp_path / "a")
    assert processor is None
    for (name, a), b in zip(model.state_dict().items(), again.state_dict().values()):
        assert same(a, b), name
    for (name, a), b in zip(model.named_buffers(), again.buffers()):
        assert same(a, b), name
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    assert not again.training and again.generation_config.max_new_tokens == 7
    x = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        assert torch.equal(model(x).logits, again(x).logits)
    unpack(tmp_path / "a", tmp_path / "b", max_shard_size=3000)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    for (name, a), b in zip(model.state_dict().items(), plain.state_dict().values()):
        assert same(a, b), name


def test_mixed_dtypes_come_back(tmp_path):
    model = llama().bfloat16()
    model.model.norm.float()
    model.model.layers[1].mlp.down_proj.to(torch.float64)
    save_sparse(model, None, tmp_path / "a")
    for (name, a), b in zip(
        model.state_dict().items(), load_sparse(tmp_path / "a")[0].state_dict().values()
    ):
        assert same(a, b), name


def test_twins_that_are_no_longer_tied(tmp_path):
    model = llama(tied=True)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight + 1)
    save_sparse(model, None, tmp_path / "a")
    assert "lm_head.weight" in packed_tensors(tmp_path / "a")


def test_bundled_model(tmp_path, bundled):
    model, processor = bundled
    save_sparse(model, processor, tmp_path / "a")
    again, loaded_processor = load_sparse(tmp_path / "a")
    assert type(loaded_processor) is type(processor)
    vocabulary = processor.tokenizer.get_vocab()
    assert loaded_processor.tokenizer.get_vocab() == vocabulary
    for (name, a), b in zip(model.state_dict().items(), again.state_dict().values()):
        assert same(a, b), name
    with pytest.raises(OSError, match="no file named model.safetensors"):
        type(model).from_pretrained(tmp_path / "a")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert not any("sparsity" in key or "quantization" in key for key in config)


def test_config_and_weights_that_differ(tmp_path):
    save_sparse(llama(), None, tmp_path / "a")
    config = json.loads((tmp_path / "a" / "config.json").read_text())

    def expect(message, **change):
        (tmp_path / "a" / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=message):
            load_sparse(tmp_path / "a")

    expect("missing: model.layers.2", num_hidden_layers=3)
    expect("unexpected: model.layers.1", num_hidden_layers=1)
    expect("no model class 'os'", architectures=["os"])
    expect("no model class None", architectures=None)
    expect("config.json", model_type="nothing")


def test_damage_is_named_through_the_loader(tmp_path):
    save_sparse(llama(), None, tmp_path / "a")
    path = next((tmp_path / "a").glob("sparse-*"))
    whole = bytearray(path.read_bytes())
    whole[-1] ^= 1
    path.write_bytes(bytes(whole))
    with pytest.raises(ValueError, match="its bytes are not those"):
        load_sparse(tmp_path / "a")


def test_what_is_no_model(tmp_path):
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]))
    for bad in (nn.Linear(2, 2), adapted):
        with pytest.raises(ValueError, match="merge adapters first"):
            save_sparse(bad, None, tmp_path / "a")
    config = llama().config
    with torch.device("meta"):
        empty = LlamaForCausalLM(config)
    with pytest.raises(ValueError, match="placeholders"):
        save_sparse(empty, None, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_the_rest_of_a_folder(tmp_path):
    source = tmp_path / "a"
    llama().save_pretrained(source)
    (source / "chat").mkdir()
    (source / "chat" / "template.jinja").write_text("hello")
    (source / "pytorch_model.bin").write_bytes(b"pickle")
    os.symlink(source / "chat" / "template.jinja", source / "vocab.txt")
    pack(source, tmp_path / "b")
    unpack(tmp_path / "b", tmp_path / "c")
    names = {
        str(path.relative_to(tmp_path / "c")) for path in (tmp_path / "c").rglob("*")
    }
    assert names == {
        "chat",
        "chat/template.jinja",
        "vocab.txt",
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }
    assert not (tmp_path / "c" / "vocab.txt").is_symlink()
    assert (
        load_file(tmp_path / "c" / "model.safetensors").keys()
        == load_file(source / "model.safetensors").keys()
    )


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_of_saving_and_loading(tmp_path):
    "21 layers of 4 MiB each: beside the model, about one of them. (3.4, 1.0, 0.0 and -2.9 MiB when it was written.)"
    code = f"""
import threading, time, torch
from transformers import LlamaConfig, LlamaForCausalLM
from ressa.checkpoints.sparse import load_sparse, pack, save_sparse, unpack
def held(): return int(open("/proc/self/status").read().split("RssAnon:")[1].split()[0]) / 1024
def peak(function):
    function_done, top, start = threading.Event(), [0], held()
    def watch():
        while not function_done.is_set(): top[0] = max(top[0], held()); time.sleep(0.0005)
    thread = threading.Thread(target=watch); thread.start()
    result = function(); function_done.set(); thread.join()
    return top[0] - start, result
config = LlamaConfig(vocab_size=64, hidden_size=1024, intermediate_size=1024, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=8)
model = LlamaForCausalLM(config)
with torch.no_grad():
    for weight in model.parameters(): weight.mul_(torch.rand_like(weight) < 0.5)
save_sparse(LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)), None, {str(tmp_path / "w")!r})
load_sparse({str(tmp_path / "w")!r})
size = sum(t.nbytes for t in model.state_dict().values()) / 2 ** 20
saving = peak(lambda: save_sparse(model, None, {str(tmp_path / "a")!r}))[0]
unpacking = peak(lambda: unpack({str(tmp_path / "a")!r}, {str(tmp_path / "b")!r}))[0]
packing = peak(lambda: pack({str(tmp_path / "b")!r}, {str(tmp_path / "c")!r}))[0]
loading, (again, _) = peak(lambda: load_sparse({str(tmp_path / "a")!r}))
print(size, saving, unpacking, packing, loading - size)
"""
    out = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True
    )
    size, *beside = map(float, out.stdout.split()[-5:])
    assert size > 80, out.stderr[-2000:]
    assert max(beside) < 10, (
        beside
    )  # MiB: a tensor of 4, its packed form, and what an allocator keeps


def test_a_configuration_of_other_sizes_is_named(tmp_path, bundled):
    "One digit of config.json was changed."
    save_sparse(bundled[0], None, tmp_path / "packed")
    path = tmp_path / "packed" / "config.json"
    config = json.loads(path.read_text())
    config["text_config"]["intermediate_size"] *= 2
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="config.json"):
        load_sparse(tmp_path / "packed")


def test_a_damaged_processor_is_named(tmp_path, bundled):
    save_sparse(*bundled, tmp_path / "packed")
    (tmp_path / "packed" / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="its processor cannot be loaded"):
        load_sparse(tmp_path / "packed")


def test_no_file_holds_more_than_the_limit():
    tensors = {str(i): torch.ones(10) for i in range(7)}
    for limit, files in ((40, 7), (80, 4), (120, 3), (1e9, 1)):
        assert len(sparse._shards(tensors, limit)) == files


# Files that are no files


@pytest.fixture(scope="module")
def folders_to_open(tmp_path_factory):
    "A plain, a packed and an adapter folder of the bundled model."
    from peft import LoraConfig, get_peft_model

    from ressa.files import save_model
    from ressa.models.bundled import BUNDLED, load_bundled

    place = tmp_path_factory.mktemp("folders")
    model, processor = load_bundled("cpu")
    save_model(model, processor, place / "plain")
    pack(place / "plain", place / "packed")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.peft_config["default"].base_model_name_or_path = str(BUNDLED)
    adapted.save_pretrained(place / "adapter")
    return place


def make_pipe(path):
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def make_endless(path):
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


def make_socket(path):
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


@pytest.fixture
def soon():
    "A call that waits for ever ends the test."
    signal.alarm(60)
    yield
    signal.alarm(0)


OPENED = {  # kind of folder → what opens it
    "packed": [load_sparse, packed_tensors, unpack, load_model],
    "plain": [ordinary_tensors, pack, load_model],
    "adapter": [load_model],
}


@pytest.mark.parametrize("make", [make_pipe, make_endless, make_socket])
@pytest.mark.parametrize("kind", OPENED)
def test_what_is_no_file_is_refused_at_once(
    folders_to_open, monkeypatch, tmp_path, soon, kind, make
):
    own = tmp_path / "m"
    shutil.copytree(folders_to_open / kind, own)
    monkeypatch.chdir(own)  # the path of a socket must be short
    for name in [file.name for file in own.iterdir() if file.is_file()]:
        whole = (own / name).read_bytes()
        make(Path(name))
        for load in OPENED[kind]:
            arguments = [tmp_path / "out"] if load in (pack, unpack) else []
            with pytest.raises((ValueError, OSError)) as caught:
                load(own, *arguments)
            assert "not a regular file" in str(caught.value), (name, load)
            assert not (tmp_path / "out").exists()
        Path(name).unlink()
        Path(name).write_bytes(whole)


@pytest.mark.parametrize("kind", ["packed", "plain"])
def test_links_are_followed_in_the_cache_of_the_hub_alone(
    folders_to_open, tmp_path, kind
):
    move = unpack if kind == "packed" else pack
    secret = tmp_path / "secret.txt"
    secret.write_text("a password")
    own = tmp_path / "own"
    shutil.copytree(folders_to_open / kind, own)
    (own / "notes.txt").symlink_to(secret)
    with pytest.raises(ValueError, match="notes.txt: is a link out"):
        move(own, tmp_path / "out")
    (own / "notes.txt").unlink()
    (own / "circle").symlink_to(own)
    with pytest.raises(ValueError, match="circle: is a link .* to a folder"):
        move(own, tmp_path / "out")

    cache = tmp_path / "models--a--b"
    snapshot = cache / "snapshots" / "0123"
    (cache / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    files = [file for file in (folders_to_open / kind).iterdir() if file.is_file()]
    for number, file in enumerate(files):
        shutil.copy(file, cache / "blobs" / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    move(snapshot, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").is_file()
    assert not (tmp_path / "out" / "config.json").is_symlink()


DAMAGES = {  # file of a packed folder → what it holds in place of its JSON
    "config.json": [b"", b"[]", b"null", b'{"model_type": 3}', b"\xff" * 9],
    "generation_config.json": [b"", b"[]", b"3", b'{"eos_token_id": "x"}', b"\xff"],
    "tokenizer.json": [b"", b"[]", b"{}", b"\xff"],
    "tokenizer_config.json": [b"", b"[]", b'"text"', b"\xff"],
    "processor_config.json": [b"", b"[]", b'{"image_processor": 3}', b"\xff"],
}


@pytest.mark.parametrize("name", DAMAGES)
def test_load_sparse_raises_what_it_promises(folders_to_open, tmp_path, name):
    own = tmp_path / "own"
    shutil.copytree(folders_to_open / "packed", own)
    for content in DAMAGES[name]:
        (own / name).write_bytes(content)
        try:
            load_sparse(own)
        except (ValueError, OSError) as error:
            assert str(error), content
