"""A small repair that may be cut over several processes: `torchrun fsdp_processes.py FOLDER BATCH_SIZE`.

Accelerate cuts models on GPUs only. On a CPU it is told that its processes have GPUs; all that follows is its own code.
"""

import json
import os
import sys
from pathlib import Path

from accelerate import DistributedType, PartialState
from peft import get_peft_model
from same_repair import long_answers, pruned_and_dense, three_steps
from transformers import set_seed

from ressa.adaptation.sparse_lora import SparseLoraConfig
from ressa.adaptation.teachers import CachedTeacher, cache_targets
from ressa.adaptation.trainer import RessaTrainer


def main(folder, batch_size):
    folder, state = Path(folder), PartialState(cpu=True)
    model, dense, processor, train = pruned_and_dense()
    rows = long_answers(train.select(range(24)))
    rows = cache_targets(
        dense, rows, processor, folder / f"targets{state.process_index}.arrow"
    )
    set_seed(0)
    student = get_peft_model(model, SparseLoraConfig(r=2))
    whole = sum(p.numel() for p in student.parameters())
    cut = "ACCELERATE_USE_FSDP" in os.environ
    args = three_steps(folder, batch_size, gradient_checkpointing=cut)
    if cut:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    trainer = RessaTrainer(
        student, args, CachedTeacher(), processor, train_dataset=rows
    )
    trainer.train()
    held = sum(
        getattr(p, "to_local", lambda p=p: p)().numel() for p in student.parameters()
    )
    trainer.save_model(str(folder / "adapter"))
    found = dict(
        kind=trainer.accelerator.distributed_type.value,
        share=held / whole,
        cut=sum(type(m).__name__.startswith("FSDP") for m in student.modules()),
        log=[row for row in trainer.state.log_history if "loss" in row],
    )
    if state.is_main_process:
        (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
