"""Three teachers say the same; the student itself is left as it was; files of other things are refused."""

import copy
import signal

import killed
import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import (
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    T5Config,
)
from warm_processes import ended

from ressa.adaptation.loss_terms import loss_terms
from ressa.adaptation.sparse_lora import SparseLoraConfig
from ressa.adaptation.teachers import (
    CachedTeacher,
    ModelTeacher,
    SelfTeacher,
    cache_targets,
    collate_targets,
    distilled_tokens,
    model_inputs,
)
from ressa.data.collate import calibration_batch, collate
from ressa.models.inputs import is_causal, picture_tokens
from ressa.parts import modality_map
from ressa.pruning.engine import prune

ALL_WORDS = 10**6  # more than any vocabulary: every word is listed


@pytest.fixture
def examples(case):
    return case.train.select(range(8))


@pytest.fixture
def batch(case, examples):
    return collate(list(examples), case.processor)


# The student itself


@pytest.fixture
def frozen(case):
    "A case whose pruned model trains nothing of its own."
    case.pruned.requires_grad_(False)
    return case


def adapted(model):
    "A SparseLoRA student that has learnt something, in training, with dropout."
    student = get_peft_model(model, SparseLoraConfig(r=2, lora_dropout=0.3)).train()
    for name, weight in student.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return student


def state(student):
    "Modes, what is trained, and every weight's bits."
    modes = [module.training for module in student.modules()]
    trained = [weight.requires_grad for weight in student.parameters()]
    bits = [
        weight.detach().clone().view(torch.int32) for weight in student.parameters()
    ]
    return modes, trained, bits


def assert_same_state(a, b):
    assert a[:2] == b[:2]
    for x, y in zip(a[2], b[2], strict=True):
        assert torch.equal(x, y)


def test_the_student_itself_is_the_dense_model(frozen, batch):
    layers = modality_map(frozen.pruned).layers
    zeros = {name: layer.weight == 0 for name, layer in layers.items()}
    removed = sum(int(is_zero.sum()) for is_zero in zeros.values())
    teacher = SelfTeacher(frozen.dense, frozen.pruned)
    assert teacher.nbytes == 4 * removed
    want = ModelTeacher(frozen.dense)(None, batch)
    assert torch.equal(teacher(frozen.pruned, batch), want)
    student = adapted(frozen.pruned)
    before = state(student)
    with torch.no_grad():
        assert (student.eval()(**batch).logits - want).abs().max() > 0.1
    student.train()
    for _ in range(2):
        assert torch.equal(teacher(student, batch), want)
    assert_same_state(state(student), before)
    merged = student.merge_and_unload()
    for name, layer in modality_map(merged).layers.items():
        assert torch.equal(layer.weight == 0, zeros[name])
        assert not torch.signbit(layer.weight[zeros[name]]).any()


def test_all_is_put_back_when_the_forward_raises(frozen, batch):
    layers = list(modality_map(frozen.pruned).layers.values())
    teacher = SelfTeacher(frozen.dense, frozen.pruned)
    student = adapted(frozen.pruned)
    before = state(student)

    def fail(*_):
        raise RuntimeError("stop")

    for layer in (layers[0], layers[len(layers) // 2], layers[-1]):
        for register in (layer.register_forward_pre_hook, layer.register_forward_hook):
            hook = register(fail)
            with pytest.raises(RuntimeError, match="stop"):
                teacher(student, batch)
            hook.remove()
            assert_same_state(state(student), before)
    want = ModelTeacher(frozen.dense)(None, batch)
    assert torch.equal(teacher(student, batch), want)


def test_the_student_itself_refuses(frozen, batch, examples):
    model, dense = frozen.pruned, frozen.dense
    teacher = SelfTeacher(dense, model)
    with pytest.raises(ValueError, match="does not hold the weights"):
        teacher(copy.deepcopy(model), batch)
    biases = [weight for name, weight in model.named_parameters() if "bias" in name]
    biases[0].requires_grad_()
    with pytest.raises(ValueError, match="own weights are trained"):
        teacher(model, batch)
    biases[0].requires_grad_(False)
    layer = next(iter(modality_map(model).layers.values()))
    layer.weight.data[layer.weight == 0] = 1.0
    with pytest.raises(ValueError, match="zeros have changed"):
        teacher(model, batch)
    changed = copy.deepcopy(dense)
    calibration = calibration_batch(examples, frozen.processor, n=8)
    prune(changed, calibration, "sparsegpt", sparsity=0.5, progress=False)
    with pytest.raises(ValueError, match="pruning changed kept weights"):
        SelfTeacher(dense, changed)


def test_the_student_itself_in_another_precision(frozen, batch):
    teacher = SelfTeacher(frozen.dense, frozen.pruned)
    student = adapted(frozen.pruned).double()
    dense = frozen.dense.double()
    batch = {
        name: value.double() if value.is_floating_point() else value
        for name, value in batch.items()
    }
    want = ModelTeacher(dense)(None, batch)
    torch.testing.assert_close(teacher(student, batch), want)


# The file


def test_file_of_other_things_is_refused(case, examples, tmp_path):
    file = tmp_path / "sub" / "said.arrow"
    right = dict(teacher=case.dense, data=examples, processor=case.processor, file=file)
    with pytest.raises(ValueError, match="said.arrow does not exist, and no teacher"):
        cache_targets(**right | dict(teacher=None))
    with pytest.raises(ValueError, match="batch_size must be 1 or more, not 0"):
        cache_targets(**right, batch_size=0)
    cached = cache_targets(**right, batch_size=3)
    made = file.stat().st_mtime_ns
    own_columns = cached.column_names[: len(examples.column_names)]
    assert own_columns == examples.column_names
    for teacher in (case.dense, None):
        assert cache_targets(**right | dict(teacher=teacher))[5] == cached[5]
    black = examples.map(lambda example: {"image": np.zeros_like(example["image"])})
    answers = [*examples["answer"][:7], "another"]
    other_answer = examples.remove_columns("answer").add_column("answer", answers)
    wrong = [
        dict(data=case.train.select(range(1, 9))),
        dict(data=examples.select(range(7))),
        dict(data=black),
        dict(data=other_answer),
        dict(teacher=case.pruned),
        dict(k=15),
        dict(temperature=2.0),
        dict(positions="answer"),
        dict(teacher=None, temperature=2.0),
    ]
    for other in wrong:
        with pytest.raises(ValueError, match="said.arrow holds targets of"):
            cache_targets(**right | other)
    assert file.stat().st_mtime_ns == made


@pytest.mark.slow
def test_a_killed_run_leaves_no_half_file(case, examples, tmp_path):
    file = tmp_path / "said.arrow"
    assert ended(killed.targets_of_two_batches, file) == -signal.SIGKILL
    assert not file.exists()
    cached = cache_targets(case.dense, examples, case.processor, file)
    assert len(cached) == len(Dataset.from_file(str(file))) == 8


@pytest.mark.parametrize(
    "temperature, positions", [(1.0, "answer"), (2.0, "text"), (1.0, "all")]
)
def test_cached_targets_are_those_of_the_model(
    case, examples, tmp_path, temperature, positions
):
    "In any batches, in any order; with all words listed the loss is that of the model."
    cached = cache_targets(
        case.dense,
        examples,
        case.processor,
        tmp_path / "said.arrow",
        k=ALL_WORDS,
        temperature=temperature,
        positions=positions,
        batch_size=3,
    )
    order = [6, 1, 3, 0, 7]
    batch = collate_targets([cached[i] for i in order], case.processor)
    plain_batch = collate([examples[i] for i in order], case.processor)
    assert model_inputs(batch).keys() == plain_batch.keys()
    with torch.no_grad():
        logits = case.pruned(**plain_batch).logits
    losses = []
    where = distilled_tokens(
        batch, batch["labels"], positions, pictures=picture_tokens(case.dense)
    )
    for teacher in (CachedTeacher(), ModelTeacher(case.dense)):
        targets = teacher(case.pruned, batch)
        _, divergence = loss_terms(
            logits,
            targets,
            batch["labels"],
            temperature=temperature,
            positions=where,
        )
        losses.append(divergence)
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
    assert losses[1] > 0.1
    assert set(cached["teacher_temperature"]) == {temperature}
    assert set(cached["teacher_positions"]) == {positions}
    without_targets = collate_targets([examples[0]], case.processor)
    with pytest.raises(ValueError, match="hold no targets"):
        CachedTeacher()(case.pruned, without_targets)


def encoder_decoder_config(config, pad_token_id):
    "A small InstructBLIP with T5 for its language model."
    text = T5Config(
        vocab_size=config.text_config.vocab_size,
        d_model=32,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=4,
        decoder_start_token_id=0,
        pad_token_id=pad_token_id,
    )
    return InstructBlipConfig(
        vision_config=config.vision_config.to_dict(),
        qformer_config=config.qformer_config.to_dict(),
        text_config=text.to_dict(),
        num_query_tokens=config.num_query_tokens,
        image_token_index=config.image_token_index,
    )


@pytest.mark.parametrize("positions", ["answer", "text", "all"])
def test_targets_of_an_encoder_decoder(case, examples, tmp_path, positions):
    "Logits at i predict the label at i; the model makes its inputs of the labels, and no answer stands in the prompt."
    pad_token_id = case.processor.tokenizer.pad_token_id
    config = encoder_decoder_config(case.dense.config, pad_token_id)
    dense = InstructBlipForConditionalGeneration(config).eval()
    student = InstructBlipForConditionalGeneration(config).eval()
    assert is_causal(case.dense)
    assert not is_causal(dense)
    cached = cache_targets(
        dense,
        examples,
        case.processor,
        tmp_path / "said.arrow",
        k=ALL_WORDS,
        batch_size=4,
        positions=positions,
    )
    batch = collate_targets(list(cached), case.processor, causal=False)
    assert batch["labels"].shape[1] < batch["input_ids"].shape[1]
    with torch.no_grad():
        logits = student(**model_inputs(batch)).logits
    losses = []
    for teacher in (CachedTeacher(), ModelTeacher(dense)):
        targets = teacher(student, batch)
        where = distilled_tokens(batch, batch["labels"], positions, causal=False)
        assert torch.equal(where, batch["labels"] != -100)
        terms = loss_terms(
            logits, targets, batch["labels"], shift=False, positions=where
        )
        losses.append(terms[1])
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-6)
    assert losses[1] > 1e-4


def test_cached_targets_know_every_part_of_the_images(data):
    "The same texts with one other image are other examples."
    from ressa.adaptation.teachers import _fingerprint

    examples = data[0].select(range(64))
    texts = {name: examples[name] for name in ("prompt", "answer")}
    for i in (0, 16, 60):
        other = data[0].select([*range(i), 3000 + i, *range(i + 1, 64)])

        class Mixed:
            def __len__(self):
                return 64

            def __getitem__(self, key, other=other):
                return texts[key] if isinstance(key, str) else other[key]

        mixed = _fingerprint(Mixed(), None, 4, 1.0, "text")
        assert mixed != _fingerprint(examples, None, 4, 1.0, "text"), i


# Vocabularies of other sizes


def padded_copy(model, words):
    "The same model with a larger table of words; the new ones are likely everywhere."
    larger = copy.deepcopy(model)
    larger.resize_token_embeddings(words, mean_resizing=False)
    head = larger.get_output_embeddings().weight.data
    known = model.get_output_embeddings().weight.shape[0]
    head[known:] = 2 * head[:known].mean(0)
    return larger


def first_line(trainer_of, case, teacher, student, **arguments):
    "The log of the first step."
    trainer = trainer_of(
        teacher,
        model=copy.deepcopy(student),
        max_steps=1,
        logging_steps=1,
        per_device_train_batch_size=8,
        **arguments,
    )
    trainer.train()
    return trainer.state.log_history[0]


@pytest.mark.parametrize("positions", ["answer", "text"])
def test_a_vocabulary_may_be_padded_in_teacher_or_student(case, trainer_of, positions):
    "The words of the tokenizer alone are compared."
    same = first_line(trainer_of, case, case.dense, case.pruned, positions=positions)[
        "distillation_loss"
    ]
    larger = padded_copy(case.dense, 64)
    found = first_line(trainer_of, case, larger, case.pruned, positions=positions)
    assert found["distillation_loss"] == pytest.approx(same, rel=1e-5)
    student = padded_copy(case.pruned, 50)
    found = first_line(trainer_of, case, larger, student, positions=positions)
    assert found["distillation_loss"] == pytest.approx(same, rel=1e-5)
    assert same > 1e-4


def test_cached_targets_list_no_word_that_pads_a_vocabulary(
    case, examples, trainer_of, tmp_path
):
    larger = padded_copy(case.dense, 64)
    cached = cache_targets(larger, examples, case.processor, tmp_path / "a.arrow")
    words = len(case.processor.tokenizer)
    assert max(map(np.max, cached["teacher_words"])) < words < 64
    line = first_line(trainer_of, case, CachedTeacher(), case.pruned, train=cached)
    assert line["distillation_loss"] > 0


def test_a_teacher_with_another_tokenizer_is_refused(
    case, examples, trainer_of, tmp_path
):
    other = copy.deepcopy(case.processor)
    other.tokenizer.add_tokens(["zebra"])
    message = "another tokenizer than the student"
    cached = cache_targets(case.dense, examples, other, tmp_path / "a.arrow")
    other_mark = copy.deepcopy(case.dense)
    other_mark.config.image_token_index = 5
    smaller = copy.deepcopy(case.dense)
    smaller.resize_token_embeddings(41)
    for teacher, train, more in (
        (CachedTeacher(), cached, ""),
        (ModelTeacher(case.dense, other), None, ""),
        (other_mark, None, r".*pictures are \[5\]"),
        (smaller, None, ".*it has 41 words"),
    ):
        with pytest.raises(ValueError, match=f"{message}{more}"):
            trainer_of(teacher, model=copy.deepcopy(case.pruned), train=train)
    fits = ModelTeacher(case.dense, copy.deepcopy(case.processor))
    assert trainer_of(fits).words is None
