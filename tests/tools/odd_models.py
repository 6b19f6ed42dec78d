"""Tiny random models of classes whose processors need more than PIL, each with a batch of three examples made by hand.

Where a class takes that, the first example has one picture, the second two, and the third none; all are padded on the right.
"""

from typing import NamedTuple

import tiny_models
import torch
import transformers
from tiny_models import CLIP_VIT, LLAMA, QWEN, SIGLIP_VIT, TEXT, VIT

VOCABULARY = 64
IMAGE = 5  # id of the token in the place of a picture
AFTER_PICTURE = 4
FIRST_WORD = 8  # ids below are special
ONE_TWO_NONE = (1, 2, 0)  # pictures of the three examples
ONE_EACH = (1, 1, 1)
NO_PICTURE = (0, 0, 0)
WORDS = (6, 4, 9)  # length of the three questions
SMALL = dict(vocab_size=VOCABULARY)


class Text(NamedTuple):
    "Ids, attention mask and labels of three examples, padded on the right."

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor


def some_words(length):
    "Ids of words."
    return torch.randint(FIRST_WORD, 60, (length,)).tolist()


def text(places, counts=ONE_TWO_NONE):
    "Questions behind `places` tokens for each picture."
    rows = [
        [1] + ([IMAGE] * places + [AFTER_PICTURE]) * count + some_words(length)
        for count, length in zip(counts, WORDS)
    ]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    is_word = ids >= FIRST_WORD
    return Text(ids, (ids != 0).long(), ids.masked_fill(~is_word, -100))


def batch(places, counts=ONE_TWO_NONE, **more):
    "A batch of questions with what a class wants besides."
    return text(places, counts)._asdict() | more


def pictures(*shape):
    "Noise."
    return torch.randn(*shape)


def aria():
    "Its experts are fused; queries of the projector stand for patches."
    config = transformers.AriaConfig(
        vision_config=VIT | dict(model_type="idefics3_vision"),
        text_config=TEXT | SMALL | dict(moe_num_experts=4, moe_topk=2),
        projector_patch_to_query_dict={4: 3},
        image_token_index=IMAGE,
    )
    model = transformers.AriaForConditionalGeneration(config)
    return model, batch(3, pixel_values=pictures(3, 3, 16, 16))


def vipllava():
    "Reads several layers of its vision part."
    config = transformers.VipLlavaConfig(
        vision_config=CLIP_VIT,
        text_config=LLAMA | SMALL,
        image_token_index=IMAGE,
        vision_feature_layer=[-2, 1],
        image_seq_length=4,
    )
    model = transformers.VipLlavaForConditionalGeneration(config)
    return model, batch(4, pixel_values=pictures(3, 3, 16, 16))


def video_llava():
    "Two vision parts, of which a batch of pictures reaches one."
    config = transformers.VideoLlavaConfig(
        vision_config=CLIP_VIT | dict(num_hidden_layers=3),
        text_config=LLAMA | SMALL,
        image_token_index=IMAGE,
        video_token_index=6,
        image_seq_length=5,
        vision_feature_select_strategy="full",
    )
    model = transformers.VideoLlavaForConditionalGeneration(config)
    given = batch(5, pixel_values_images=pictures(3, 3, 16, 16))
    given["pixel_values_videos"] = pictures(1, 8, 3, 16, 16)
    ids = given["input_ids"]  # a video in the row without picture
    film = torch.full((1, 40), 6)
    rest = ids[2:, 1:10]
    third = torch.cat([ids[2:, :1], film, rest], 1)
    longest = third.shape[1]
    ids = torch.nn.functional.pad(ids, (0, longest - ids.shape[1]))
    ids[2] = third
    given["input_ids"] = ids
    given["attention_mask"] = (ids != 0).long()
    given["labels"] = ids.masked_fill(ids < FIRST_WORD, -100)
    return model, given


def cohere2_vision():
    config = transformers.Cohere2VisionConfig(
        vision_config=SIGLIP_VIT,
        text_config=TEXT | SMALL | dict(model_type="cohere2", head_dim=8),
        alignment_intermediate_size=32,
        image_token_id=IMAGE,
    )
    model = transformers.Cohere2VisionForConditionalGeneration(config)
    return model, batch(1, pixel_values=pictures(3, 3, 16, 16))


def aya_vision():
    config = transformers.AyaVisionConfig(
        vision_config=SIGLIP_VIT,
        text_config=TEXT | SMALL | dict(model_type="cohere2", head_dim=8),
        image_token_index=IMAGE,
        downsample_factor=2,
    )
    model = transformers.AyaVisionForConditionalGeneration(config)
    return model, batch(1, pixel_values=pictures(3, 3, 16, 16))


def deepseek_vl():
    config = transformers.DeepseekVLConfig(
        vision_config=SIGLIP_VIT, text_config=LLAMA | SMALL, image_token_id=IMAGE
    )
    model = transformers.DeepseekVLForConditionalGeneration(config)
    return model, batch(4, pixel_values=pictures(3, 3, 16, 16))


def glm4v():
    "Pictures of two sizes in one row of patches."
    vision = dict(
        depth=2,
        hidden_size=16,
        num_heads=2,
        intermediate_size=32,
        out_hidden_size=16,
        patch_size=4,
        image_size=32,
        initializer_range=0.2,
    )
    rope = dict(rope_type="default", mrope_section=[1, 1, 2], rope_theta=10000.0)
    config = transformers.Glm4vConfig(
        vision_config=vision,
        text_config=TEXT
        | SMALL
        | dict(rope_parameters=rope, partial_rotary_factor=1.0),
        image_token_id=IMAGE,
        video_token_id=6,
        image_start_token_id=3,
        image_end_token_id=AFTER_PICTURE,
        video_start_token_id=6,
        video_end_token_id=7,
    )
    model = transformers.Glm4vForConditionalGeneration(config)
    grid = torch.tensor([[1, 4, 4], [1, 4, 4], [1, 4, 4]])
    given = batch(
        4,
        pixel_values=pictures(int(grid.prod(1).sum()), 3 * 2 * 4 * 4),
        image_grid_thw=grid,
    )
    given["mm_token_type_ids"] = (given["input_ids"] == IMAGE).int()
    return model, given


def ovis2():
    "Its pictures become words of a vocabulary of their own."
    vision = VIT | dict(vocab_size=20, hidden_stride=2, num_visual_indicator_tokens=2)
    config = transformers.Ovis2Config(
        vision_config=vision,
        text_config=QWEN | SMALL,
        image_token_id=IMAGE,
        visual_indicator_token_ids=[3, 7],
        vocab_size=VOCABULARY,
        hidden_size=16,
    )
    model = transformers.Ovis2ForConditionalGeneration(config)
    return model, batch(1, pixel_values=pictures(3, 3, 16, 16))


def janus():
    "It draws pictures too; what draws is not reached by questions."
    vision = dict(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        mlp_ratio=2.0,
        projection_dim=16,
        num_image_tokens=4,
        initializer_range=0.2,
    )
    drawing = dict(
        embed_dim=4,
        num_embeddings=16,
        latent_channels=8,
        base_channels=32,
        channel_multiplier=[1, 1],
        num_res_blocks=1,
        projection_dim=16,
        image_token_embed_dim=16,
    )
    config = transformers.JanusConfig(
        vision_config=vision,
        vq_config=drawing,
        text_config=LLAMA | SMALL,
        image_token_id=IMAGE,
    )
    model = transformers.JanusForConditionalGeneration(config)
    return model, batch(4, pixel_values=pictures(3, 3, 16, 16))


def kosmos_2():
    "One picture in each example, and a mask of its places."
    words = dict(
        vocab_size=VOCABULARY,
        max_position_embeddings=128,
        embed_dim=16,
        layers=2,
        ffn_dim=32,
        attention_heads=2,
        dropout=0.0,
        attention_dropout=0.0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        init_std=0.2,
    )
    config = transformers.Kosmos2Config(
        text_config=words, vision_config=VIT, latent_query_num=3
    )
    model = transformers.Kosmos2ForConditionalGeneration(config)
    given = batch(3, ONE_EACH, pixel_values=pictures(3, 3, 16, 16))
    given["image_embeds_position_mask"] = given["input_ids"] == IMAGE
    return model, given


def lfm2_vl():
    "Convolutions and attention take turns; patches are padded and have a mask."
    words = (
        TEXT
        | SMALL
        | dict(
            model_type="lfm2",
            layer_types=["conv", "full_attention"],
            block_auto_adjust_ff_dim=False,
        )
    )
    config = transformers.Lfm2VlConfig(
        vision_config=VIT
        | dict(
            model_type="siglip2_vision_model", num_patches=16, vision_use_head=False
        ),
        text_config=words,
        image_token_id=IMAGE,
        projector_hidden_size=32,
        downsample_factor=2,
    )
    model = transformers.Lfm2VlForConditionalGeneration(config)
    return model, batch(
        1,
        pixel_values=pictures(3, 4, 3 * 8 * 8),
        pixel_attention_mask=torch.ones(3, 4, dtype=torch.long),
        spatial_shapes=torch.tensor([[2, 2]] * 3),
    )


def got_ocr2():
    "Blocks with windows, and one that sees the whole picture."
    vision = dict(
        hidden_size=16,
        output_channels=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=4,
        window_size=4,
        global_attn_indexes=[1],
        mlp_dim=32,
        initializer_range=0.2,
    )
    config = transformers.GotOcr2Config(
        vision_config=vision,
        text_config=QWEN | SMALL,
        image_token_index=IMAGE,
        image_seq_length=4,
    )
    model = transformers.GotOcr2ForConditionalGeneration(config)
    return model, batch(4, pixel_values=pictures(3, 3, 32, 32))


def idefics():
    "Its first version: gated cross-attention, a resampler, and a mask of its own."
    config = transformers.IdeficsConfig(
        **TEXT
        | dict(
            vocab_size=VOCABULARY,
            cross_layer_interval=1,
            alpha_initializer="ones",
            use_resampler=True,
            freeze_text_layers=False,
            freeze_vision_layers=False,
            perceiver_config=dict(
                use_resampler=True,
                resampler_n_latents=3,
                resampler_depth=1,
                resampler_n_heads=2,
                resampler_head_dim=8,
            ),
            vision_config=dict(
                embed_dim=16,
                image_size=16,
                intermediate_size=32,
                patch_size=8,
                num_hidden_layers=2,
                num_attention_heads=2,
                initializer_range=0.2,
            ),
        )
    )
    model = transformers.IdeficsForVisionText2Text(config)
    given = batch(0, ONE_EACH, pixel_values=pictures(3, 2, 3, 16, 16))
    sees = torch.ones(*given["input_ids"].shape, 2, dtype=torch.long)
    sees[0, :, 1] = 0  # one picture
    sees[2, :] = 0  # none
    return model, given | dict(image_attention_mask=sees)


def donut():
    "A Swin encoder that reads pages, and a decoder that writes them out."
    swin = transformers.DonutSwinConfig(
        image_size=32,
        patch_size=4,
        embed_dim=8,
        depths=[1, 1],
        num_heads=[2, 2],
        window_size=4,
        drop_path_rate=0.0,
        initializer_range=0.2,
    )
    words = transformers.MBartConfig(
        **SMALL,
        d_model=16,
        decoder_layers=2,
        decoder_attention_heads=2,
        decoder_ffn_dim=32,
        is_decoder=True,
        add_cross_attention=True,
        is_encoder_decoder=False,
        max_position_embeddings=32,
        dropout=0.0,
        init_std=0.2,
        pad_token_id=0,
    )
    config = transformers.VisionEncoderDecoderConfig(
        encoder=swin.to_dict(), decoder=words.to_dict()
    )
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    model = transformers.VisionEncoderDecoderModel(config)
    labels = text(0, NO_PICTURE).labels[:, 1:]
    return model, dict(pixel_values=pictures(3, 3, 32, 32), labels=labels)


def owl_v2():
    "It finds objects: several queries for each picture, and no words are written."
    config = transformers.Owlv2Config(
        vision_config=VIT,
        text_config=tiny_models.WIDTH
        | SMALL
        | dict(
            max_position_embeddings=16, pad_token_id=0, bos_token_id=1, eos_token_id=2
        ),
        projection_dim=16,
    )
    model = transformers.Owlv2ForObjectDetection(config)
    ids = torch.randint(FIRST_WORD, 60, (6, 7))  # two queries for each picture
    return model, dict(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=pictures(3, 3, 16, 16),
    )


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
    words = dict(
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
        vision_config=vision, text_config=words, image_token_id=IMAGE
    )
    model = transformers.Florence2ForConditionalGeneration(config)
    ids = torch.randint(FIRST_WORD, 60, (3, 21))
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0
    ids[:, :17] = IMAGE
    labels = torch.randint(6, 60, (3, 21))
    labels[1, 3:] = -100
    pixels = pictures(3, 3, 32, 32)
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
        vision_config=VIT,
        text_config=TEXT | SMALL | dict(model_type="mistral", head_dim=8),
        perceiver_config=perceiver,
        image_token_id=IMAGE,
    )
    model = transformers.Idefics2ForConditionalGeneration(config)
    return model, batch(4, ONE_EACH, pixel_values=pictures(3, 1, 3, 16, 16))


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


def vit_gpt_2():
    "A ViT and a GPT-2, whose linear layers are stored as (in, out)."
    vit = transformers.ViTConfig(**VIT)
    gpt2 = transformers.GPT2Config(
        **SMALL,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=32,
        add_cross_attention=True,
        is_decoder=True,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    both = transformers.VisionEncoderDecoderConfig
    config = both.from_encoder_decoder_configs(vit, gpt2)
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    labels = text(0, NO_PICTURE).labels[:, 1:]
    return transformers.VisionEncoderDecoderModel(config), dict(
        pixel_values=pictures(3, 3, 16, 16), labels=labels
    )


ODD = {
    "Florence-2": florence_2,
    "Idefics2": idefics_2,
    "Pix2Struct": pix2struct,
    "ViT and GPT-2": vit_gpt_2,
    "Aria": aria,
    "VipLlava": vipllava,
    "Video-LLaVA": video_llava,
    "Cohere2Vision": cohere2_vision,
    "AyaVision": aya_vision,
    "DeepseekVL": deepseek_vl,
    "Glm4v": glm4v,
    "Ovis2": ovis2,
    "Janus": janus,
    "Kosmos-2": kosmos_2,
    "LFM2-VL": lfm2_vl,
    "GotOcr2": got_ocr2,
    "Idefics": idefics,
    "Donut": donut,
    "OWLv2": owl_v2,
}
FINDING = ("OWLv2",)  # they write no words


def odd(name):
    "A model of a class, and its batch; the same each time."
    torch.manual_seed(0)
    model, given = ODD[name]()
    for weight in model.parameters():
        # a gate or a projection that is zero at the start would let nothing through
        if not weight.any() and (weight.dim() > 1 or weight.numel() == 1):
            torch.nn.init.normal_(weight, std=0.3)
    return model.eval(), given


# What has an entry for each picture, in a batch whose examples differ in pictures.
OF_PICTURES = (
    "pixel_values",
    "pixel_values_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "image_grid_thw",
)


def alone(given, i):
    "Example i of a batch of three, without padding and with its own pictures."
    counts = pictures_in_each(given)
    before = sum(counts[:i])
    own = {}
    for name, value in given.items():
        if name == "pixel_values_videos":  # there is one, in the last example
            start, end = 0, max(0, i - 1)
        elif name == "pixel_values" and "image_grid_thw" in given:  # a row of patches
            patches = given["image_grid_thw"].prod(1)
            start = patches[:before].sum()
            end = start + patches[before : before + counts[i]].sum()
        elif name in OF_PICTURES and len(value) == sum(counts):
            start, end = before, before + counts[i]
        else:
            each = len(value) // 3  # several queries for a picture
            start, end = each * i, each * (i + 1)
        if end > start:
            own[name] = value[start:end]
    return without_padding(own)


def pictures_in_each(given):
    "How many pictures each of three examples has."
    ids = given.get("input_ids")
    if ids is None or not (ids == AFTER_PICTURE).any():
        return [1, 1, 1]
    return (ids == AFTER_PICTURE).sum(1).tolist()


def without_padding(own):
    "An example cut to its tokens, and its answer to its own tokens."
    ids, labels = own.get("input_ids"), own.get("labels")
    mask = own.get("attention_mask")
    if ids is None:
        own["labels"] = labels[:, labels[0] != -100]
        return own
    is_token = mask.bool().any(0)
    one = {
        name: value[:, is_token] if value.shape[:2] == ids.shape else value
        for name, value in own.items()
    }
    is_answer = (labels if labels is not None else ids) != -100
    if labels is not None and not torch.equal(labels[is_answer], ids[is_answer]):
        one["labels"] = labels[:, is_answer[0]]  # of a decoder
    return one
