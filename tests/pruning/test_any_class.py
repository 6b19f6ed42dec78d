"""Pruning in micro-batches, padding, caches and early ends, on a small model of each class."""

import copy
import functools

import pytest
import tiny_models
import torch
import transformers

from ressa.data.collate import collate
from ressa.models.inputs import is_causal
from ressa.parts import modality_map, output_head
from ressa.pruning.engine import prune
from ressa.pruning.passes import in_pieces, picture_counts

# --- classes that have no small processor: models with batches made by hand


def padded(n_tokens, ignored):
    "Ids of three examples, their attention mask and labels; the first ends with padding."
    ids = torch.randint(8, 60, (3, n_tokens))
    mask = torch.ones_like(ids)
    mask[0, -ignored:] = 0
    return ids, mask, ids.masked_fill(mask == 0, -100)


def florence_2():
    "Blocks of the vision part lie two lists deep; encoder and decoder of equal length."
    vision = dict(
        embed_dim=[8, 16],
        depths=[1, 2],
        num_heads=[2, 2],
        num_groups=[2, 2],
        patch_size=[7, 3],
        patch_stride=[4, 2],
        patch_padding=[3, 1],
        patch_prenorm=[False, True],
        window_size=4,
        projection_dim=16,
        drop_path_rate=0.0,
    )
    text = dict(
        model_type="bart",
        vocab_size=64,
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=64,
        init_std=0.2,
        decoder_start_token_id=2,
    )
    config = transformers.Florence2Config(
        vision_config=vision, text_config=text, image_token_id=5
    )
    model = transformers.Florence2ForConditionalGeneration(config)
    ids, mask, _ = padded(21, 2)
    ids[:, :17] = 5  # tokens of a picture
    labels = torch.randint(6, 60, (3, 21))
    labels[1, 3:] = -100
    pixels = torch.randn(3, 3, 32, 32)
    return model, dict(
        input_ids=ids, attention_mask=mask, pixel_values=pixels, labels=labels
    )


def idefics_2():
    perceiver = dict(
        resampler_n_latents=4,
        resampler_depth=1,
        resampler_n_heads=2,
        resampler_head_dim=8,
        num_key_value_heads=2,
        hidden_size=16,
    )
    config = transformers.Idefics2Config(
        vision_config=tiny_models.VIT,
        text_config=tiny_models.TEXT | dict(model_type="mistral", head_dim=8),
        perceiver_config=perceiver,
        image_token_id=5,
    )
    ids, mask, labels = padded(14, 4)
    ids[:, 1:5] = 5
    pixels = torch.randn(3, 1, 3, 16, 16)
    return transformers.Idefics2ForConditionalGeneration(config), dict(
        input_ids=ids, attention_mask=mask, pixel_values=pixels, labels=labels
    )


def pix2struct():
    "Its attention mask is about patches; answers are as long as there are patches."
    config = transformers.Pix2StructConfig(
        vision_config=dict(
            hidden_size=16,
            patch_embed_hidden_size=12,
            d_ff=32,
            d_kv=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            seq_len=32,
        ),
        text_config=dict(
            vocab_size=64,
            hidden_size=16,
            d_kv=8,
            d_ff=32,
            num_layers=2,
            num_heads=2,
            decoder_start_token_id=0,
            pad_token_id=0,
            eos_token_id=1,
        ),
        initializer_factor=1.0,
    )
    patches = torch.randn(3, 6, 14)
    patches[..., 0] = torch.tensor([1.0, 1, 1, 2, 2, 2])
    patches[..., 1] = torch.tensor([1.0, 2, 3, 1, 2, 3])
    mask = torch.ones(3, 6)
    mask[1, 4:] = 0
    labels = torch.randint(2, 60, (3, 6))
    labels[0, 3:] = -100
    return transformers.Pix2StructForConditionalGeneration(config), dict(
        flattened_patches=patches, attention_mask=mask, labels=labels
    )


BY_HAND = {"Florence-2": florence_2, "Idefics2": idefics_2, "Pix2Struct": pix2struct}


@functools.cache
def dense(name):
    "A model and a batch of three examples; tests that change the model copy it."
    torch.manual_seed(0)
    if name in BY_HAND:
        model, batch = BY_HAND[name]()
        for weight in model.parameters():
            if weight.dim() > 1 and not weight.any():  # zero at the start
                torch.nn.init.normal_(weight, std=0.3)
        return model.eval(), batch
    config, processor = tiny_models.TINY[name]()
    retrieves = name in tiny_models.RETRIEVING
    auto = transformers.AutoModelForImageTextToText
    model = (transformers.AutoModel if retrieves else auto).from_config(config).eval()
    examples = tiny_models.examples(name, processor)
    return model, collate(
        examples, processor, answers=not retrieves, causal=is_causal(model)
    )


def pruned(name, **options):
    model, batch = dense(name)
    model = copy.deepcopy(model)
    report = prune(model, batch, progress=False, **{"sparsity": 0.5} | options)
    return model, report


ALL = [*tiny_models.TINY, *BY_HAND]


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_in_micro_batches_the_same_weights_are_pruned(name):
    whole, report = pruned(name)
    assert not report.left_dense
    for micro_batch in (1, 2):
        cut, in_cut = pruned(name, micro_batch=micro_batch)
        assert not in_cut.left_dense
        assert {line.name: line.tokens for line in in_cut.layers} == {
            line.name: line.tokens for line in report.layers
        }
        pairs = zip(whole.parameters(), cut.parameters())
        differ = sum(int(((a == 0) != (b == 0)).sum()) for a, b in pairs)
        assert differ <= 2, f"{micro_batch=}"  # near ties


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    "options", [{}, {"micro_batch": 1}, {"method": "sparsegpt"}], ids=str
)
def test_a_pass_ends_before_logits_and_loss(name, options):
    model, batch = dense(name)
    model = copy.deepcopy(model)
    if name in tiny_models.RETRIEVING:
        pytest.skip("it has no output head")
    calls = []
    head = output_head(model)
    head.register_forward_hook(lambda *call: calls.append("head"))
    prune(model, batch, progress=False, sparsity=0.5, **options)
    assert not calls
    with torch.no_grad():  # what has been left is as before
        first, second = model(**batch), model(**batch)
    assert torch.equal(first.logits, second.logits)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_configurations_and_modes_are_as_before(name):
    model, batch = dense(name)
    model = copy.deepcopy(model)
    some = list(model.modules())[::3]
    for module in some:
        module.training = True
    before = [module.training for module in model.modules()]
    configs = [m.config.to_dict() for m in model.modules() if hasattr(m, "config")]
    prune(model, batch, progress=False, sparsity=0.5, micro_batch=2)
    assert [module.training for module in model.modules()] == before
    after = [m.config.to_dict() for m in model.modules() if hasattr(m, "config")]
    assert after == configs


# --- padding


def tokens_of(name):
    _, report = pruned(name)
    return {line.name: line.tokens for line in report.layers}


@pytest.mark.parametrize("name", ["Florence-2", "InstructBLIP, T5", "BLIP-2, T5"])
def test_encoder_and_decoder_are_measured_without_their_own_padding(name):
    _, batch = dense(name)
    of_encoder = int(batch["attention_mask"].sum())
    of_decoder = int((batch["labels"] != -100).sum())
    assert of_encoder != of_decoder
    seen = set()
    for layer, tokens in tokens_of(name).items():
        words = layer.split(".")
        if "language_model" not in words:
            continue
        crosses = {"encoder_attn", "EncDecAttention"} & set(words)
        reads_encoder = crosses and words[-1] in ("k_proj", "v_proj", "k", "v")
        in_encoder = "encoder" in words or reads_encoder
        assert tokens == (of_encoder if in_encoder else of_decoder), layer
        seen.add((bool(crosses), bool(in_encoder)))
    assert len(seen) == 4  # of both stacks, in and outside of a cross-attention


def test_patches_are_measured_without_padding():
    _, batch = dense("Pix2Struct")
    patches = int(batch["attention_mask"].sum())
    answers = int((batch["labels"] != -100).sum())
    for layer, tokens in tokens_of("Pix2Struct").items():
        words = layer.split(".")
        crosses = "encoder_decoder_attention" in words and words[-1] in ("key", "value")
        assert tokens == (patches if words[0] == "encoder" or crosses else answers)


def test_a_mask_is_not_laid_over_what_is_no_text():
    "Keys and values of BLIP's cross-attention read five patches of each picture."
    model, batch = dense("BLIP")
    batch = {
        key: value[:, :5] if value.shape == batch["input_ids"].shape else value
        for key, value in batch.items()
    }
    batch["attention_mask"] = batch["attention_mask"].clone()
    batch["attention_mask"][0, :2] = 0
    report = prune(copy.deepcopy(model), batch, sparsity=0.5, progress=False)
    for line in report.layers:
        if line.part == "language":
            reads_pictures = ".crossattention.self." in line.name and (
                line.name.endswith(("key", "value"))
            )
            assert line.tokens == (15 if reads_pictures else 13), line.name


# --- pictures


@pytest.mark.parametrize(
    "name", ["LLaVA-NeXT", "Idefics3", "SmolVLM", "Qwen2-VL", "Qwen2.5-VL", "Qwen3-VL"]
)
def test_a_vision_part_is_cut_between_pictures(name):
    model, batch = dense(name)
    parts = modality_map(model)
    blocks = {n.rpartition(".self_attn")[0] for n in parts.linears["vision"]}
    blocks |= {n.rpartition(".attn")[0] for n in parts.linears["vision"]}
    blocks = {block for block in blocks if block}
    visited = {}

    def visit(block, forward, pieces):
        visited[block] = len(pieces)

    with torch.no_grad():
        whole = model(**batch, use_cache=False).logits
        with in_pieces(model, blocks, 3, 1, visit, picture_counts(batch)):
            cut = model(**batch, use_cache=False).logits
    assert torch.allclose(whole, cut, atol=1e-4)
    assert visited == dict.fromkeys(blocks, 3)


def test_the_report_counts_fused_experts_among_all_weights():
    model, report = pruned("Qwen3-VL-MoE")
    row = report.parts()["language"]
    assert row["sparsity"] == 0.5
    weights = model.model.language_model.parameters()
    assert row["of_all"] * sum(w.numel() for w in weights) == row["weights"] / 2
    assert row["of_all"] < 0.3
    assert "of all" in repr(report)
