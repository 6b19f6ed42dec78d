"""Every public function, called rightly, then with one argument made odd: the result is right or the refusal is a clear one.

An odd argument is of the right type: no rows, another length, NaN, a number below 0, a name that is not there, a folder that is
a file. Refused means `ValueError`, `TypeError`, `KeyError` or `OSError`; an error from deep inside, such as `IndexError`, is lost."""

import functools
import importlib
import math
import pkgutil
import sys
import tempfile
import types
import warnings
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset

import ressa

REFUSED = (ValueError, TypeError, KeyError, OSError)
FROM_TORCH = (
    "size of tensor",
    "shapes cannot be",
    "Expected size",
    "evice string",
    "out of bounds for dimension",
)  # clear as they are
MEANT = {  # number or text → why a function takes it
    ("won_back", "repaired"): "any two accuracies have a ratio",
    ("won_back", "start"): "likewise",
    ("won_back", "dense"): "likewise",
    ("max_shard_size",): "infinity is one file",
    ("seed",): "a generator takes any",
    ("ria", "power"): "a power may be negative",
    ("solve_increasing", "low"): "any bracket",
    ("solve_increasing", "high"): "any bracket",
    ("solve_increasing", "wanted"): "its nearest end is the answer",
    ("random_slope", "step"): "backwards is the same slope, and NaN is seen",
    ("cheapest_first", "limit"): "no step may be taken",
    ("take_examples", "n"): "no tensor has so few rows",
    ("pieces_of", "n"): "likewise",
    ("cheapest_first", "wanted"): "none, or as many as there are",
    ("nth_question", "number"): "counted from the end, as in a list",
    ("per_layer", "setting"): "ranks too",
    ("target_keywords", "target"): "checked where a weight is",
    ("take_examples", "start"): "as a slice",
    ("take_examples", "end"): "as a slice",
    ("examples_between", "start"): "as a slice",
    ("examples_between", "end"): "as a slice",
    ("validate_target", "in_features"): "a width that a weight has",
    ("splits_of_sum", "total"): "there are none",
    ("splits_of_sum", "step"): "likewise",
    ("ressa_loss", "weight"): "checked where the loss is asked for",
    ("title",): "a text",
    ("question",): "a text",
    ("purpose",): "a text",
    ("answer",): "a text",
    ("text",): "a text",
    ("last_whole_checkpoint", "folder"): "there is none",
    ("open_out", "out"): "is made",
    ("repair", "folder"): "is made",
    ("save_sparse", "folder"): "is made",
    ("pack", "folder"): "is made",
    ("unpack", "folder"): "is made",
    ("save_model", "folder"): "is made",
    ("write_json", "path"): "is made, or replaced when whole",
    ("cache_targets", "file"): "is made",
}
LEFT_OUT_MODULES = {  # name → why
    "ressa.models.real": "reads a large language model, see models/test_real",
    "ressa.course.real_training": "trains for hours, see course/test_real_training",
    "ressa.course.few_labels": "trains for hours, see course/test_few_labels",
    "ressa.adaptation.adapter_checks": "see adaptation/test_adapter_checks",
    "ressa.adaptation.kept_masks": "see adaptation/test_kept_masks",
    "ressa.course.checks": "see nbs/test_exercises",
}
LEFT_OUT = {  # name → why
    "perplexity": "needs a language model, see evaluation/test_perplexity",
    "topics_text": "no argument",
    **dict.fromkeys(
        (
            "evaluation_mode",
            "stored_settings_aside",
            "leaving_at_head",
            "leaving_when_called",
            "noting_calls",
        ),
        "context managers, see models/test_inputs and pruning/test_passes",
    ),
    "pretrain_vision": "trains for minutes",
    "train_answers": "trains for minutes",
    "train_bundled": "trains for minutes",
    "training_examples": "no argument, all rows",
    "bench": "encodes all questions",
    "Bench": "what bench returns",
    **dict.fromkeys(
        ("add_options", "run", "main", "parse", "explained", "main_job"),
        "given a command line, see the tests in cli",
    ),
    **dict.fromkeys(
        (
            "add_fields",
            "add_key",
            "add_recipe_options",
            "given_keys",
            "read_options",
            "validate_options",
            "pruning_target",
            "rivals_of",
            "stored_in",
            "plan_of",
            "dtype_of",
            "open_model",
            "test_batch_of",
            "pruned",
            "settings_of",
            "draw_calibration",
            "require_calibration",
            "load_tests",
            "load_training",
            "separate",
        ),
        "given options of a command line, see cli/test_options and cli/test_main_job",
    ),
    **dict.fromkeys(
        ("canonical", "nearest", "ranks_of", "columns_of", "read_recipe", "written"),
        "given texts of a command line, see cli/test_options and cli/test_read_recipe",
    ),
    **dict.fromkeys(
        ("recipe_names", "training_keys", "describe_training"), "take no argument"
    ),
    **dict.fromkeys(
        (
            "load_of_batch",
            "memory_needed",
            "available_bytes",
            "advice",
            "require_memory",
            "short_size",
            "stored_results",
            "require_pictures",
            "failure_of",
        ),
        "given what the command has checked, see cli/test_memory and others",
    ),
    **dict.fromkeys(
        ("print_safely", "quiet_libraries", "lines_off_a_terminal", "progress_bar"),
        "set the terminal, see test_progress",
    ),
    **dict.fromkeys(
        ("answer_form", "render_turns", "tokenizer_key", "without_bos"),
        "see data/test_prompts",
    ),
    **dict.fromkeys(("as_read", "longest_input"), "see cli/test_data"),
    **dict.fromkeys(("ask", "open_picture"), "see cli/test_ask"),
    **dict.fromkeys(("batch_rules",), "see models/test_inputs"),
    **dict.fromkeys(("chosen", "options_of", "with_options"), "see data/test_choices"),
    **dict.fromkeys(
        ("claims", "difference"), "read stored results, see course/test_claims"
    ),
    **dict.fromkeys(
        ("comparison_rows", "comparison_table", "conclusion"), "see cli/test_compare"
    ),
    **dict.fromkeys(
        (
            "conversation_column",
            "conversation_table",
            "read_conversation",
            "standard_conversations",
        ),
        "see data/test_conversations",
    ),
    **dict.fromkeys(
        (
            "dense_model",
            "examples_written",
            "measured",
            "pairs",
            "real_run",
            "real_settings",
            "run_real_study",
            "run_real_writing",
            "study_windows",
            "text_pieces",
        ),
        "runs of minutes, see course/test_real_study",
    ),
    **dict.fromkeys(
        ("dequantize", "quantize", "require_bits", "kept_count"),
        "see checkpoints/test_quantized and test_packing",
    ),
    **dict.fromkeys(
        (
            "device_name",
            "models_of",
            "peak_device_memory_mb",
            "show_interval",
            "show_score",
            "sparsity_rows",
            "summary_table",
            "target_text",
            "weight_counts",
            "draw_layers",
            "fates_of",
            "layer_place",
            "places_for",
            "two_uris",
        ),
        "given the results of a run, see cli/test_results and cli/test_report",
    ),
    **dict.fromkeys(
        ("dsnot_as_published", "takes_group"),
        "see pruning/test_dsnot and pruning/test_methods",
    ),
    **dict.fromkeys(
        ("fast_masked_weight", "mask_update_"),
        "given what sparse_lora_linear took, see adaptation/test_fast_mask",
    ),
    **dict.fromkeys(
        (
            "find_licence",
            "loading_code",
            "model_card",
            "push_to_hub",
            "recipe_text",
            "write_products",
        ),
        "see cli/test_model_card",
    ),
    **dict.fromkeys(
        ("free_layers", "loss_pieces", "require_judged", "unjudged"),
        "see allocation/test_rules",
    ),
    **dict.fromkeys(
        ("images_of", "json_rows", "number_of_images"),
        "see data/test_columns, test_tables and test_encoding",
    ),
    **dict.fromkeys(
        ("picture_token_of", "unmask_gradients"),
        "see pruning/test_engine and adaptation/test_adapters",
    ),
    **dict.fromkeys(
        ("require_files", "write_text", "require_finite"),
        "see test_files and models/test_weights",
    ),
    **dict.fromkeys(
        ("text_windows", "window_losses"), "see evaluation/test_perplexity"
    ),
    **dict.fromkeys(
        ("require_same_run", "settings_of", "train_or_resume", "weights_hash"),
        "see adaptation/test_resume and test_repair_safety",
    ),
    **dict.fromkeys(
        ("require_choices", "require_turns"), "see data/test_load_data, test_choices"
    ),
    "calibration_of": "see cli/test_run_data",
    "image_bytes": "see adaptation/test_repair_safety",
    **dict.fromkeys(("validate_training",), "see cli/test_options"),
    "OneLineParser": "a parser of argparse, see cli/test_parsing",
    "Interrupts": "takes no argument",
    "load_empty": "as load_model, see models/test_load_model",
    **dict.fromkeys(("whole_folder", "flush_to_disk"), "see test_files"),
    **dict.fromkeys(
        ("expect", "same", "shown", "start_page"), "serve the pages of the course"
    ),
    **dict.fromkeys(("pruned_count", "kth_lowest"), "given what validate_target took"),
    "require_training_data": "given arguments of a trainer, see adaptation/test_trainer",
    "RessaArguments": "see wrong_calls and transformers",
    "SparseLoraModel": "made by PEFT",
    "SparseLoraLinear": "made by PEFT",
    "new_bundled": "a seed is all it takes",
    "pruned_model": "a run of minutes",
    "rate_of": "looks up a rate of the study",
    "repair_run": "a run of minutes",
    **dict.fromkeys(
        ("load_model", "load_checkpoint", "load_whole", "require_whole", "WeightError"),
        "see models/test_load_model and models/test_weights",
    ),
    **dict.fromkeys(
        ("open_packed", "open_adapter"), "see checkpoints/test_adapter_folders"
    ),
    **dict.fromkeys(
        ("hub_answers", "is_hub_id", "cache_alone_if_unreachable"),
        "see data/test_hub_access",
    ),
    **dict.fromkeys(("read_csv", "read_json_rows", "table_of"), "see data/test_tables"),
    **dict.fromkeys(
        ("as_rgb", "converts_exactly", "picture_key", "picture_of_row"),
        "see data/test_pictures",
    ),
    **dict.fromkeys(
        ("hold_out", "without_pictures_of", "count_seen"), "see data/test_held_out"
    ),
    "default_split": "see data/test_held_out",
    "load_data": "see data/test_hub",
    "standard_examples": "see data/test_columns",
    "embed": "needs towers, see evaluation/test_retrieval",
    "retrieval": "needs towers, see evaluation/test_retrieval",
    "metric_of": "reads names of columns",
    "references_of": "reads names of columns",
    "StagedModel": "see test_allocation_study",
    "draw_explorer": "see test_allocation_study",
    "StoredPoints": "see test_allocation_study",
    "error_bars": "given stored points, see test_allocation_study",
    "search": "see test_search",
    "SelfTeacher": "see test_distillation",
    "advice": "see data/test_hub_errors",
    "Advice": "a row of a table, see data/test_hub_errors",
    "model_batch": "see models/test_inputs",
    "accelerate_24": "needs a CUDA device, see checkpoints/test_semi_structured",
    **dict.fromkeys(
        ("before_first_call", "in_pieces", "one_look_per_image"),
        "context managers, see test_prune and test_allocation",
    ),
    **dict.fromkeys(
        ("bundled_config", "easy_vqa_processor", "signed_distances"),
        "how the bundled model was made",
    ),
    "collate_targets": "given rows by the trainer, see test_distillation",
    "deduce": "one call on a published file",
    **dict.fromkeys(
        (
            "draw_accuracy",
            "draw_training",
            "html_report",
            "picture_uri",
            "summary_rows",
            "table_head",
            "verdict",
            "plain_row",
            "measure",
        ),
        "given results of the command, see cli/test_results and cli/test_report",
    ),
    **dict.fromkeys(
        ("draw_mask", "draw_surface", "sensitivity"), "see test_allocation_study"
    ),
    "peak_memory_mb": "no argument",
    **dict.fromkeys(
        ("explorer", "small_multiples"),
        "see course/test_explorers",
    ),
    **dict.fromkeys(("meet_budget", "lmms_command"), "see wrong_calls"),
    "LayerSteps": "what meet_budget counts in, see test_budgets",
    "run_study": "see course/test_studies",
    "draw_stored_answers": "given stored answers, see course/test_before_after",
    "inputs_of_layers": "needs a model, see course/test_layer_inputs",
    **dict.fromkeys(
        ("is_first_process", "wait_for_all", "return_large_blocks"), "take no argument"
    ),
    "copies_fit": "given weights of a model, see test_devices",
    **dict.fromkeys(
        ("no_autocast", "not_a_view", "to_autocast"),
        "steps of a layer, see adaptation/test_fast_mask",
    ),
}


@functools.cache
def house():
    from ressa.data.easy_vqa import load_easy_vqa
    from ressa.models.bundled import load_bundled

    model, processor = load_bundled("cpu")
    return model, processor, load_easy_vqa("test").select(range(8))


def fresh():
    import copy

    return copy.deepcopy(house()[0])


@functools.cache
def a_batch():
    from ressa.data.collate import collate

    return collate([house()[2][i] for i in range(4)], house()[1])


def right_calls(folder):
    "Name of a public function → arguments with which it works; callables are made anew for each call."
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from ressa.adaptation.loss_terms import Targets
    from ressa.checkpoints.packing import pack_tensor
    from ressa.checkpoints.sparse import save_sparse
    from ressa.parts import modality_map
    from ressa.pruning.methods import method_of
    from ressa.pruning.statistics import Statistics

    torch.manual_seed(0)
    model, processor, rows = house()
    batch, mmap = a_batch(), modality_map(model)
    layers = dict(list(mmap.layers.items())[:3])
    weight, x = torch.randn(4, 8), torch.randn(12, 8)
    stats, logits, labels = (
        Statistics.of(x),
        torch.randn(2, 5, 7),
        torch.randint(7, (2, 5)),
    )
    packed, plain = folder / "packed", folder / "plain"
    if not packed.exists():
        save_sparse(model, processor, packed)
        from ressa.files import save_model

        save_model(model, processor, plain)
    sizes = {"a": (4, 8), "b": (8, 16)}
    ones = dict(a=1.0, b=2.0)
    rows_of_a_run = ("blind", "pruned", "plain_lora", "repaired", "dense")
    results = {row: dict(accuracy=0.5 + 0.1 * i) for i, row in enumerate(rows_of_a_run)}

    def new(name):
        "A path where nothing is."
        return folder / f"{name}{np.random.randint(10**9)}"

    return dict(
        select=dict(score=weight.abs(), sparsity=0.5),
        real_tokens=dict(x=torch.randn(2, 6, 8), mask=torch.ones(2, 6).bool()),
        validate_inputs=dict(weight=weight, stats=stats),
        validate_target=dict(sparsity=0.5, pattern=None, in_features=8),
        apply_mask=dict(weight=weight, mask=weight > 0),
        parse_pattern=dict(pattern="2:4"),
        require_scores=dict(score=weight.abs()),
        sparsity_of=dict(weight=weight),
        has_pattern=dict(weight=weight, pattern="2:4"),
        reconstruction_error=dict(x=x, weight=weight, pruned=weight * 0.5),
        masked_weight=dict(weight=weight, A=torch.randn(2, 8), B=torch.randn(4, 2)),
        zeros_of=dict(target=0.5, shape=(4, 8)),
        achieved_sparsity=dict(allocation=dict(a=0.5, b=0.5), shapes=sizes),
        solve_increasing=dict(
            function=lambda: lambda t: t, wanted=0.5, low=0.0, high=1.0
        ),
        shapes_of=dict(model=model),
        uniform=dict(model=model, sparsity=0.5),
        zeros_by_part=dict(model=model, allocation={name: 0.5 for name in layers}),
        by_modality=dict(model=model, vision=0.5, language=0.5),
        allocate=dict(
            model=model, preferred={n: 0.5 for n in mmap.layers}, sparsity=0.5
        ),
        outlier_share=dict(weights=[weight], stats=[stats], factor=5.0),
        input_statistics=dict(model=model, batch=batch),
        layer_groups=dict(model=model, names=list(layers), by="block"),
        owl=dict(model=model, batch=batch, sparsity=0.5, factor=5.0, spread=0.08),
        random_slope=dict(
            loss=lambda: lambda: float(weight.sum()),
            weights=[weight],
            generator=lambda: torch.Generator().manual_seed(0),
            step=1e-3,
        ),
        proportional_sparsity=dict(
            worth=ones, sizes=dict(a=32, b=128), sparsity=0.5, max_sparsity=0.9
        ),
        ecoflap=dict(model=fresh, batch=batch, sparsity=0.5, pieces=2, step=1e-3),
        calibration_loss=dict(model=model, batch=batch),
        cheapest_first=dict(
            loss=lambda: lambda counts: sum(counts.values()),
            sizes=dict(a=4, b=4),
            counts=dict(a=0, b=0),
            wanted=4.0,
            limit=4,
        ),
        before_language=dict(model=model, batch=batch),
        language_with_head=dict(model=model),
        TrialModel=dict(model=model, batch=batch, method="wanda"),
        named_allocation=dict(name="uniform", model=model, batch=batch, sparsity=0.5),
        splits_of_sum=dict(total=100, step=10),
        setting_key=dict(setting=dict(vision=0.5)),
        anatomy=dict(model=model),
        read_layers=dict(model=model, batch=batch, layers=layers),
        looks_ahead=dict(model=model, batch=batch),
        fates=dict(dense=[1, 1, 0], pruned=[0, 1, 0], repaired=[1, 0, 1]),
        draw_answers=dict(
            example=rows[0], answers=dict(dense="red", pruned="blue"), title="t"
        ),
        nth_question=dict(
            fate=np.array(["kept", "lost", "kept"]), wanted="lost", number=0
        ),
        grey_images=dict(batch=batch),
        noise_images=dict(batch=batch),
        open_out=dict(out=lambda: new("out"), settings=dict(seed=0)),
        part_sparsity=dict(model=model),
        question_type=dict(question="what color is it?", answer="red"),
        load_easy_vqa=dict(split="test", task="vqa"),
        word_tokenizer=dict(texts=["a red circle"]),
        collate=dict(examples=[rows[0], rows[1]], processor=processor),
        draw_examples=dict(data=rows, n=4, seed=0),
        write_prompt=dict(question="what?"),
        pick_dtype=dict(dtype="float32"),
        calibration_batch=dict(data=rows, processor=processor, n=4, seed=0),
        pick_device=dict(device="cpu"),
        to_device=dict(batch=batch, device="cpu"),
        cost_of=dict(step=lambda: lambda: 1, device=torch.device("cpu")),
        answer_logits=dict(logits=logits, labels=labels),
        top_targets=dict(logits=logits[0], k=3),
        kl_sum=dict(student_logits=logits[0], targets=Targets(logits[1])),
        answer_places=dict(labels=labels),
        require_positions=dict(positions="all"),
        require_preset=dict(preset="paper"),
        picture_tokens=dict(model=model),
        is_text=dict(batch=batch, pictures=[4]),
        distilled_tokens=dict(
            batch=batch, labels=batch["labels"], positions="text", pictures=[4]
        ),
        require_temperature=dict(temperature=1.0),
        flat_logits=dict(logits=logits, labels=labels),
        ressa_loss=dict(task=weight.sum(), divergence=weight.sum(), weight=0.5),
        sum_in_chunks=dict(function=lambda: lambda z, *_: z.sum(), logits=logits[0]),
        loss_terms=dict(
            student_logits=logits,
            teacher=logits + 1,
            labels=labels,
            temperature=1.0,
            positions="answer",
        ),
        distillation_loss=dict(
            student_logits=logits,
            teacher=logits + 1,
            labels=labels,
            weight=0.5,
            temperature=1.0,
        ),
        model_inputs=dict(batch=batch),
        ModelTeacher=dict(model=model),
        cache_targets=dict(
            data=rows,
            teacher=model,
            processor=processor,
            file=lambda: new("targets.arrow").with_suffix(".arrow"),
            k=4,
            temperature=1.0,
            batch_size=4,
        ),
        without_prompt=dict(
            generated=torch.arange(6)[None], prompt=torch.arange(3)[None]
        ),
        answer=dict(
            model=model,
            data=rows,
            processor=processor,
            batch_size=4,
            max_new_tokens=3,
            progress=False,
        ),
        evaluate=dict(
            model=model, data=rows, processor=processor, batch_size=4, progress=False
        ),
        interval=dict(values=[0.0, 1.0, 1.0], draws=10, level=0.95),
        cider=dict(answers=["a red circle"], references=[["a red circle"]]),
        exact_match=dict(model=model, batches=[batch]),
        blind=dict(train=rows, test=rows),
        won_back=dict(repaired=0.5, start=0.2, dense=0.9),
        png=dict(figure=lambda: plt.figure(figsize=(1, 1))),
        control=dict(choice=(0.0, 1.0), start=0.5),
        training_bytes=dict(model=model),
        kept_bytes=dict(
            forward=lambda: lambda: weight.clone().requires_grad_().exp(), model=None
        ),
        find_columns=dict(names=["image", "question", "answer"]),
        as_texts=dict(value=["a", "b"]),
        has_towers=dict(model=model),
        is_causal=dict(model=model),
        agreement=dict(agreeing=2, people=3),
        normalise_answer=dict(text="A Dog."),
        vqa_accuracy=dict(answer="red", people=["red", "blue"]),
        score=dict(answers=[row["answer"] for row in rows], data=rows),
        recall_at=dict(similarity=torch.randn(2, 4), image_of=[0, 0, 1, 1], ks=(1, 5)),
        part_roots=dict(model=model),
        modality_map=dict(model=model),
        linear_shape=dict(layer=torch.nn.Linear(4, 8)),
        output_head=dict(model=model),
        input_device=dict(model=model),
        is_placed=dict(model=model),
        stored_parameters=dict(model=model),
        require_bare=dict(model=model, purpose="a trial"),
        require_unwrapped=dict(model=model),
        require_in_memory=dict(model=model, purpose="a trial"),
        require_matching_batch=dict(model=model, batch=batch),
        caption_options=dict(model=model),
        greedy_config=dict(model=model, processor=processor, max_new_tokens=3),
        tokenizer_of=dict(processor=processor),
        reserved_tokens=dict(processor=processor),
        end_token_ids=dict(processor=processor),
        ends_each_text=dict(tokenizer=processor.tokenizer),
        answer_ids=dict(answers=["red"], prompts=["what?"], processor=processor),
        decoder_ids=dict(answers=["red"], processor=processor),
        encode=dict(examples=[rows[0], rows[1]], processor=processor),
        set_lengths=dict(processor=processor, model=model),
        examples_hash=dict(data=rows),
        examples_between=dict(batch=batch, start=0, end=1, picture_token=None),
        picture_counts=dict(batch=batch),
        per_layer=dict(setting=0.5, mmap=mmap),
        packed_bytes=dict(how="bitmask", n=64, kept=32, size=2),
        bits_of=dict(tensor=weight),
        pack_tensor=dict(tensor=weight),
        unpack_tensor=dict(
            packed=pack_tensor(weight), dtype=torch.float32, shape=(4, 8)
        ),
        measured_gain=dict(
            weight=weight, convert=lambda: torch.clone, tokens=2, rounds=2
        ),
        convert_where_faster=dict(
            model=fresh, convert=lambda: torch.clone, tokens=(1,), rounds=2
        ),
        shared_inputs=dict(model=model, batch=batch, layers=layers),
        number_of_examples=dict(batch=batch),
        take_examples=dict(value=x, n=12, start=0, end=4),
        blocks_of=dict(model=model, names=list(layers)),
        join_examples=dict(pieces=[x, x]),
        pieces_of=dict(args=(x,), kwargs={}, n=12, size=4),
        inputs_of=dict(
            layers=layers, forward=lambda: model.forward, args=(), kwargs=batch
        ),
        target_keywords=dict(target=0.5),
        method_of=dict(method="wanda"),
        layer_targets=dict(parts=mmap, sparsity=0.5),
        estimated_error=dict(dense=weight, pruned=weight * 0.5, stats=stats),
        unusable=dict(stats=stats),
        prune_weights=dict(
            weights=[weight], stats=stats, target=0.5, method=method_of("wanda")
        ),
        prune_exactly=dict(
            weight=weight, stats=stats, sparsity=0.5, method=method_of("wanda")
        ),
        prune_layers=dict(model=fresh, batch=batch, layers=lambda: {}, targets={}),
        prune=dict(
            model=fresh, batch=batch, method="wanda", sparsity=0.5, progress=False
        ),
        zero_masks=dict(model=model),
        remask=dict(model=fresh, masks=lambda: {}),
        zeros_filled=dict(masks=lambda: {}, model=model),
        adapt=dict(model=fresh, adapter="sparselora", r=4, lora_alpha=16),
        peft_targets=dict(model=model, r=4),
        trainable_weights=dict(model=fresh),
        repair=dict(
            model=fresh,
            data=rows,
            processor=processor,
            teacher=model,
            folder=lambda: new("run"),
            steps=1,
            batch_size=2,
            learning_rate=1e-3,
        ),
        set_up_tokenizer=dict(processor=processor, model=model),
        won_back_shares=dict(results=results),
        inverse_factor=dict(stats=stats, damp=0.01),
        sparse_lora_linear=dict(
            x=x, weight=weight, bias=None, A=torch.randn(2, 8), B=torch.randn(4, 2)
        ),
        wanda=dict(weight=weight, stats=stats, sparsity=0.5),
        magnitude=dict(weight=weight, sparsity=0.5),
        ria=dict(weight=weight, stats=stats, sparsity=0.5, power=0.5),
        sparsegpt=dict(weight=weight, stats=stats, sparsity=0.5),
        dsnot=dict(weight=weight, stats=stats, sparsity=0.5, max_cycles=5),
        packed_tensors=dict(folder=packed),
        save_sparse=dict(
            model=model,
            processor=processor,
            folder=lambda: new("saved"),
            max_shard_size=1e6,
        ),
        load_sparse=dict(folder=packed),
        ordinary_tensors=dict(folder=plain),
        pack=dict(source=plain, folder=lambda: new("pack"), max_shard_size=1e6),
        unpack=dict(source=packed, folder=lambda: new("unpack"), max_shard_size=1e6),
        pack_right=dict(right=np.array([1.0, 0.0, 1.0])),
        unpack_right=dict(text="oA==", n=3),
        write_json=dict(path=lambda: new("x.json"), data={}),
        wilson=dict(right=[1, 0, 1], z=1.96),
        wilson_of_share=dict(share=0.9, n=20),
        score_interval=dict(values=[1.0, 0.0, 1.0]),
        difference_interval=dict(first=[1.0, 0.0, 1.0], second=[0.0, 0.0, 1.0]),
        read_json=dict(path=lambda: packed / "config.json"),
        save_model=dict(model=model, processor=processor, folder=lambda: new("whole")),
        draw_shapes=dict(
            n=2, generator=lambda: torch.Generator().manual_seed(0), size=64
        ),
        mirror=dict(batch=batch, share=0.5),
        last_whole_checkpoint=dict(folder=folder),
        load_bundled=dict(device="cpu"),
        bootstrap_means=dict(values=np.ones((2, 4)), draws=3),
        paired_interval=dict(first=np.ones((2, 4)), second=np.zeros(4), draws=3),
        won_back_interval=dict(
            repaired=np.ones((2, 4)) * 0.8, start=np.zeros((2, 4)), dense=np.ones(4)
        ),
        chosen_examples=dict(kind="true answers", pairs=4),
        examples_of=dict(kind="true answers"),
    )


def odd(value, folder):
    "What an argument might be instead, of the same type; paths stay inside `folder`."
    if isinstance(value, bool) or value is None:
        return []
    if isinstance(value, int):
        return [-1, 0]
    if isinstance(value, float):
        return [math.nan, math.inf, -1.0]
    if isinstance(value, str):
        return ["no such", ""]
    if isinstance(value, Path):
        (folder / "a file").write_text("precious")
        return [folder / "a file", folder / "precious"]
    if isinstance(value, torch.Tensor) and value.ndim:
        return [
            value[:0],
            value[..., :-1],
            value[None, None],
            *([torch.full_like(value, math.nan)] if value.is_floating_point() else []),
        ]
    if isinstance(value, np.ndarray):
        return [value[:0], value[:-1]]
    if isinstance(value, Dataset):
        return [value.select([]), value.remove_columns(["image"])]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return []
    if isinstance(value, (list, tuple)):
        return [type(value)()] if value else []
    if isinstance(value, dict):
        return [
            {},
            *([{k: v for k, v in list(value.items())[1:]}] if len(value) > 1 else []),
        ]
    return []


def made(arguments):
    "Arguments of one call; functions among them make theirs anew."
    return {
        name: value() if isinstance(value, types.FunctionType) else value
        for name, value in arguments.items()
    }


def told(value):
    "A value in a few words."
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return f"tensor {tuple(value.shape)}"
    return f"{type(value).__name__} {str(value)[-30:]}"


def outcome(call):
    "'accepted', 'refused', or 'lost' with an error nobody would understand."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            result = call()
        except Exception as error:
            if isinstance(error, REFUSED):
                clear = bool(str(error))
            else:
                clear = any(words in str(error) for words in FROM_TORCH)
            said = f"{type(error).__name__}: {str(error)[:140]}"
            return "refused" if clear else "lost", said
    return "accepted", told(result)


def judged(name, argument, instead, found):
    """Whether an accepted call was right to be.

    Nothing in, nothing out, and NaN in a tensor is NaN seen: accepted. A number, a
    text or a path that means nothing: lost."""
    if found != "accepted":
        return found
    if (name, argument) in MEANT or (argument,) in MEANT:
        return found
    if isinstance(instead, int) and instead == 0:
        return found
    means_nothing = isinstance(instead, (int, float, str, Path))
    return "lost" if means_nothing else found


def modules():
    "All modules of the library, but those of `LEFT_OUT_MODULES`."
    for found in pkgutil.walk_packages(ressa.__path__, "ressa."):
        private = found.name.rpartition(".")[2].startswith("_")
        if not private and not found.name.startswith(tuple(LEFT_OUT_MODULES)):
            yield importlib.import_module(found.name)


def public():
    "Name → function or class, of all modules; where the course uses a name again, the library's."
    found = {}
    for module in sorted(
        modules(), key=lambda m: m.__name__.startswith("ressa.course")
    ):
        for name in getattr(module, "__all__", ()):
            if callable(getattr(module, name)):
                found.setdefault(name, getattr(module, name))
    return found


def trials(folder, quick=False):
    "(function, argument, odd value, outcome, what was said), every odd argument of every public function; `quick`: without a model."
    functions, calls = public(), right_calls(folder)
    for name, arguments in calls.items():
        if quick and any(
            value is fresh or value is house()[0] for value in arguments.values()
        ):
            continue
        found, said = outcome(lambda: functions[name](**made(arguments)))
        yield (
            name,
            "",
            "as it should be",
            "lost" if found != "accepted" else found,
            said,
        )
        for argument, value in made(arguments).items():
            for instead in odd(value, folder):
                found, said = outcome(
                    lambda: functions[name](**{**made(arguments), argument: instead})
                )
                yield (
                    name,
                    argument,
                    told(instead),
                    judged(name, argument, instead, found),
                    said,
                )
                if (
                    isinstance(value, Path)
                    and name != "write_json"
                    and (folder / "a file").read_text() != "precious"
                ):
                    yield (
                        name,
                        argument,
                        "a file",
                        "lost",
                        "the file is no more what it was",
                    )


def missing(folder):
    "Public functions that are neither tried nor left out for a reason, and names that are no function any more."
    calls = right_calls(folder).keys() | LEFT_OUT.keys()
    objects = {
        name for name, function in public().items() if isinstance(function, type)
    }
    return sorted(public().keys() - objects - calls), sorted(
        right_calls(folder).keys() - public().keys()
    )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        for row in trials(Path(place), quick="--quick" in sys.argv):
            if row[3] == "lost" or "--all" in sys.argv:
                print(row, flush=True)
        print(missing(Path(place)))
