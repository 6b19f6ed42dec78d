"""Tiny random models of transformers' own classes, each with its own processor; nothing is downloaded."""

import functools
import sys
from unittest import mock

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ressa.data.encoding import number_of_images

WORDS = "what color is the shape ? red blue green circle square a picture of two"
TOKENS = [
    "<pad>",
    "<bos>",
    "<eos>",
    "<unk>",
    "<image>",
    "<video>",
    "<fake_token_around_image>",
    "<end_of_utterance>",
    "<global-img>",
    *[f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7)],
    "<|image_pad|>",
    "<|video_pad|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<img>",
    "</img>",
    "<IMG_CONTEXT>",
    "[IMG]",
    "[IMG_BREAK]",
    "[IMG_END]",
    "<start_of_image>",
    "<end_of_image>",
    "<image_soft_token>",
    "<|image|>",
    "<|python_tag|>",
    "\n",
    "\n\n",
]
VOCABULARY = {
    word: i for i, word in enumerate([*TOKENS, *dict.fromkeys(WORDS.split())])
}
SIZE = 64 * (len(VOCABULARY) // 64 + 3)  # room for the tokens that processors add


def token_id(token):
    "The id of a token."
    return VOCABULARY[token]


def tokenizer(**named):
    "One token a word; `named` are special tokens that a processor asks its tokenizer for."
    made = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        "<bos> $A", special_tokens=[("<bos>", token_id("<bos>"))]
    )
    made.add_special_tokens(TOKENS)
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        extra_special_tokens=named,
    )


def without_video(cls, *args, **kwargs):
    "A processor for images alone; its video processor would need torchvision."
    check = cls.check_argument_for_proper_class

    def images_only(self, name, argument):
        return None if argument is None else check(self, name, argument)

    with mock.patch.object(cls, "check_argument_for_proper_class", images_only):
        return cls(*args, video_processor=None, **kwargs)


def images(kind, **options):
    "An image processor of transformers that needs no torchvision, by its kind: `CLIP`."
    return getattr(transformers, f"{kind}ImageProcessorPil")(**options)


SQUARE = {"height": 16, "width": 16}
SPECIAL = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
VIT = dict(
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=16,
    patch_size=8,
    initializer_range=0.2,
)
WIDTH = dict(
    vocab_size=SIZE,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    initializer_range=0.2,
)
TEXT = WIDTH | SPECIAL | dict(num_key_value_heads=2, max_position_embeddings=256)
LLAMA = TEXT | dict(model_type="llama")
QWEN = TEXT | dict(model_type="qwen2")
OPT = SPECIAL | dict(
    model_type="opt",
    vocab_size=SIZE,
    hidden_size=16,
    ffn_dim=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=256,
    word_embed_proj_dim=16,
    dropout=0.0,
    init_std=0.2,
)
T5 = dict(
    model_type="t5",
    vocab_size=SIZE,
    d_model=16,
    d_kv=8,
    d_ff=32,
    num_layers=2,
    num_heads=2,
    dropout_rate=0.0,
    feed_forward_proj="gated-gelu",
    tie_word_embeddings=False,
    pad_token_id=0,
    eos_token_id=2,
    decoder_start_token_id=0,
    initializer_factor=1.0,
)
QFORMER = dict(
    vocab_size=SIZE,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    encoder_hidden_size=16,
    max_position_embeddings=64,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
CLIP_VIT = VIT | dict(model_type="clip_vision_model")
SIGLIP_VIT = VIT | dict(model_type="siglip_vision_model", vision_use_head=False)


def instructblip(text):
    T = transformers
    config = T.InstructBlipConfig(
        vision_config=VIT,
        qformer_config=QFORMER,
        text_config=text,
        num_query_tokens=4,
        image_token_index=token_id("<image>"),
    )
    return config, T.InstructBlipProcessor(
        images("Blip", size=SQUARE), tokenizer(), tokenizer(), num_query_tokens=4
    )


def blip_2(text):
    T = transformers
    config = T.Blip2Config(
        vision_config=VIT,
        qformer_config=QFORMER,
        text_config=text,
        num_query_tokens=4,
        image_token_index=token_id("<image>"),
    )
    return config, T.Blip2Processor(
        images("Blip", size=SQUARE), tokenizer(), num_query_tokens=4
    )


def blip():
    T = transformers
    text = dict(
        max_position_embeddings=256,
        sep_token_id=2,
        encoder_hidden_size=16,
        hidden_act="gelu",
    )
    config = T.BlipConfig(vision_config=VIT, text_config=WIDTH | SPECIAL | text)
    return config, T.BlipProcessor(images("Blip", size=SQUARE), tokenizer())


def llava(vision_feature_layer=-2):
    T = transformers
    config = T.LlavaConfig(
        vision_config=CLIP_VIT | dict(num_hidden_layers=3),
        text_config=LLAMA,
        image_token_index=token_id("<image>"),
        vision_feature_layer=vision_feature_layer,
    )
    pictures = images("CLIP", size={"shortest_edge": 16}, crop_size=SQUARE)
    return config, T.LlavaProcessor(
        pictures,
        tokenizer(),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def llava_next():
    T = transformers
    grid = [[16, 32], [32, 16], [32, 32]]
    config = T.LlavaNextConfig(
        vision_config=CLIP_VIT | dict(num_hidden_layers=3),
        text_config=LLAMA,
        image_token_index=token_id("<image>"),
        image_grid_pinpoints=grid,
    )
    pictures = images(
        "LlavaNext",
        size={"shortest_edge": 16},
        crop_size=SQUARE,
        image_grid_pinpoints=grid,
    )
    return config, T.LlavaNextProcessor(
        pictures,
        tokenizer(),
        patch_size=8,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
    )


def llava_onevision():
    T = transformers
    grid = [[16, 16], [16, 32], [32, 16], [32, 32]]
    config = T.LlavaOnevisionConfig(
        vision_config=SIGLIP_VIT,
        text_config=QWEN,
        image_token_index=token_id("<image>"),
        video_token_index=token_id("<video>"),
        image_grid_pinpoints=grid,
    )
    pictures = images("LlavaOnevision", size=SQUARE, image_grid_pinpoints=grid)
    return config, without_video(
        T.LlavaOnevisionProcessor,
        pictures,
        tokenizer(),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
    )


def paligemma():
    T = transformers
    config = T.PaliGemmaConfig(
        vision_config=SIGLIP_VIT | dict(projection_dim=16),
        image_token_index=token_id("<image>"),
        text_config=TEXT | dict(model_type="gemma", head_dim=8),
        projection_dim=16,
        hidden_size=16,
    )
    return config, T.PaliGemmaProcessor(
        images("Siglip", size=SQUARE, image_seq_length=4),
        tokenizer(image_token="<image>"),
    )


def idefics3():
    T = transformers
    config = T.Idefics3Config(
        vision_config=VIT,
        text_config=LLAMA,
        scale_factor=2,
        image_token_id=token_id("<image>"),
    )
    pictures = images(
        "Idefics3", size={"longest_edge": 32}, max_image_size={"longest_edge": 16}
    )
    return config, T.Idefics3Processor(pictures, tokenizer(), image_seq_len=1)


def smolvlm():
    T = transformers
    config = T.SmolVLMConfig(
        vision_config=VIT,
        text_config=LLAMA,
        scale_factor=2,
        image_token_id=token_id("<image>"),
    )
    pictures = images(
        "SmolVLM", size={"longest_edge": 32}, max_image_size={"longest_edge": 16}
    )
    with mock.patch(
        "transformers.models.smolvlm.processing_smolvlm.num2words", str
    ):  # for videos alone
        return config, without_video(
            T.SmolVLMProcessor, pictures, tokenizer(), image_seq_len=1
        )


ROPE = dict(rope_type="default", mrope_section=[1, 1, 2], rope_theta=10000.0)


def qwen_vl(kind, vision, **text):
    T = transformers
    every_vision = dict(
        depth=2,
        num_heads=2,
        patch_size=4,
        spatial_merge_size=2,
        temporal_patch_size=2,
        in_channels=3,
        initializer_range=0.2,
    )
    ids = dict(
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
    )
    config = getattr(T, f"{kind}Config")(
        vision_config=every_vision | vision,
        text_config=TEXT | dict(rope_parameters=ROPE) | text,
        **ids,
    )
    pictures = images(
        "Qwen2VL",
        patch_size=4,
        merge_size=2,
        size={"shortest_edge": 256, "longest_edge": 1024},
    )
    named = dict(image_token="<|image_pad|>", video_token="<|video_pad|>")
    cls = getattr(T, f"{kind.removesuffix('Moe')}Processor")
    return config, without_video(cls, pictures, tokenizer(**named))


def qwen2_vl():
    return qwen_vl("Qwen2VL", dict(embed_dim=16, hidden_size=16, mlp_ratio=2))


def qwen2_5_vl():
    return qwen_vl(
        "Qwen2_5_VL",
        dict(
            hidden_size=16,
            intermediate_size=32,
            out_hidden_size=16,
            window_size=16,
            fullatt_block_indexes=[1],
        ),
    )


DEEP = dict(
    hidden_size=16, intermediate_size=32, out_hidden_size=16, num_position_embeddings=16
)


def qwen3_vl():
    return qwen_vl(
        "Qwen3VL",
        DEEP | dict(depth=3, deepstack_visual_indexes=[0, 1]),
        num_hidden_layers=3,
        head_dim=8,
    )


def qwen3_vl_moe():
    return qwen_vl(
        "Qwen3VLMoe",
        DEEP | dict(deepstack_visual_indexes=[0]),
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        decoder_sparse_step=1,
        mlp_only_layers=[0],
    )


def internvl():
    T = transformers
    vision = VIT | dict(image_size=[16, 16], patch_size=[4, 4])
    config = T.InternVLConfig(
        vision_config=vision,
        text_config=QWEN,
        image_token_id=token_id("<IMG_CONTEXT>"),
        image_seq_length=4,
    )
    pictures = images("GotOcr2", size=SQUARE, crop_to_patches=True, max_patches=2)
    named = dict(
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    return config, without_video(
        T.InternVLProcessor, pictures, tokenizer(**named), image_seq_length=4
    )


def pixtral_processor(*args, **kwargs):
    "Its module imports one function from the image processor that needs torchvision; that of PIL has it too."
    from transformers.models.pixtral import image_processing_pil_pixtral as pil

    with mock.patch.dict(
        sys.modules, {"transformers.models.pixtral.image_processing_pixtral": pil}
    ):
        from transformers.models.pixtral.processing_pixtral import PixtralProcessor
    return PixtralProcessor(*args, **kwargs)


def mistral3():
    T = transformers
    vision = VIT | dict(
        model_type="pixtral",
        image_size=32,
        patch_size=4,
        rope_parameters=dict(rope_type="default", rope_theta=1e4),
    )
    config = T.Mistral3Config(
        vision_config=vision,
        text_config=TEXT | dict(model_type="mistral", head_dim=8),
        image_token_index=token_id("[IMG]"),
        spatial_merge_size=2,
    )
    pictures = images("Pixtral", patch_size=4, size={"longest_edge": 32})
    return config, pixtral_processor(
        pictures, tokenizer(), patch_size=4, spatial_merge_size=2
    )


def gemma3():
    T = transformers
    text = TEXT | dict(model_type="gemma3_text", head_dim=8, sliding_window=32)
    config = T.Gemma3Config(
        vision_config=SIGLIP_VIT | dict(vision_use_head=True),
        text_config=text,
        mm_tokens_per_image=4,
        boi_token_index=token_id("<start_of_image>"),
        eoi_token_index=token_id("<end_of_image>"),
        image_token_index=token_id("<image_soft_token>"),
    )
    named = dict(
        image_token="<image_soft_token>",
        boi_token="<start_of_image>",
        eoi_token="<end_of_image>",
    )
    return config, T.Gemma3Processor(
        images("Gemma3", size=SQUARE), tokenizer(**named), image_seq_length=4
    )


def mllama():
    T = transformers
    vision = dict(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_global_layers=1,
        attention_heads=2,
        image_size=16,
        patch_size=8,
        max_num_tiles=4,
        vision_output_dim=32,
        intermediate_layers_indices=[1],
        initializer_range=0.2,
    )
    text = TEXT | dict(
        num_hidden_layers=3,
        cross_attention_layers=[1],
        rope_parameters=dict(rope_type="default", rope_theta=1e4),
    )
    config = T.MllamaConfig(
        vision_config=vision, text_config=text, image_token_index=token_id("<|image|>")
    )
    return config, T.MllamaProcessor(
        images("Mllama", size=SQUARE, max_image_tiles=4),
        tokenizer(image_token="<|image|>"),
    )


def clip():
    T = transformers
    text = WIDTH | SPECIAL | dict(max_position_embeddings=64)
    config = T.CLIPConfig(vision_config=VIT, text_config=text, projection_dim=16)
    pictures = images("CLIP", size={"shortest_edge": 16}, crop_size=SQUARE)
    return config, T.CLIPProcessor(pictures, tokenizer())


def siglip():
    T = transformers
    text = WIDTH | SPECIAL | dict(max_position_embeddings=64)
    config = T.SiglipConfig(vision_config=VIT, text_config=text)
    return config, T.SiglipProcessor(images("Siglip", size=SQUARE), tokenizer())


GENERATING = {
    "InstructBLIP, Llama": functools.partial(instructblip, LLAMA),
    "InstructBLIP, T5": functools.partial(instructblip, T5),
    "InstructBLIP, OPT": functools.partial(instructblip, OPT),
    "BLIP-2, OPT": functools.partial(blip_2, OPT),
    "BLIP-2, T5": functools.partial(blip_2, T5),
    "BLIP": blip,
    "LLaVA": llava,
    "LLaVA-NeXT": llava_next,
    "LLaVA-OneVision": llava_onevision,
    "PaliGemma": paligemma,
    "Idefics3": idefics3,
    "SmolVLM": smolvlm,
    "Qwen2-VL": qwen2_vl,
    "Qwen2.5-VL": qwen2_5_vl,
    "Qwen3-VL": qwen3_vl,
    "Qwen3-VL-MoE": qwen3_vl_moe,
    "InternVL": internvl,
    "Mistral3": mistral3,
    "Gemma3": gemma3,
    "Mllama": mllama,
}
RETRIEVING = {"CLIP": clip, "SigLIP": siglip}
TINY = GENERATING | RETRIEVING


def tiny(name, folder):
    "A tiny model of a class and its processor, saved in `folder` and read again by the class's Auto class."
    torch.manual_seed(0)
    config, processor = TINY[name]()
    if name in RETRIEVING:
        auto_class = transformers.AutoModel
    else:
        auto_class = transformers.AutoModelForImageTextToText
    model = auto_class.from_config(config)
    for weight in model.parameters():
        # A gate or a projection that is zero at the start would let nothing through.
        if not weight.any() and (weight.dim() > 1 or weight.numel() == 1):
            torch.nn.init.normal_(weight, std=0.5)
    model.save_pretrained(folder)
    return auto_class.from_pretrained(folder).eval(), processor


# Classes of which an example has exactly one image.
ONE_IMAGE = [name for name in TINY if "BLIP" in name] + list(RETRIEVING)
# Classes of which all examples of a batch have the same number of images.
SAME_NUMBER = ["Mllama"]


def picture(height, width, seed=0):
    "A picture of noise."
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def examples(name, processor):
    "Three examples with images of different sizes: one, two and none, where the class can take that."
    first, second, third = picture(20, 24), picture(40, 16, 1), picture(16, 30, 2)
    mark = "" if name in ONE_IMAGE else getattr(processor, "image_token", "")
    if "Qwen" in name:
        mark = f"<|vision_start|>{mark}<|vision_end|>"
    images = [first, [second, third], None]
    if name in ONE_IMAGE + SAME_NUMBER:
        images = [first, second, third]
    questions = [
        ("what is the color ?", "red"),
        ("what shape is the circle ?", "blue circle"),
        ("what shape is two ?", "green"),
    ]
    rows = []
    for image, (question, answer) in zip(images, questions):
        marks = [mark] * number_of_images({"image": image})
        prompt = " ".join([*marks, question])
        rows.append({"image": image, "prompt": prompt, "answer": answer})
    return rows
