"""The peer's side of the side-by-side benchmark: TRL's RLOO trainer with two reward models. Prints one JSON line.

python -m benchmarks.peer W2 FOLDER STEPS [--bf16]        FOLDER: where benchmarks.workloads.make wrote
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.workloads import KL_COEF, PER_STEP, SAMPLES, WORKLOADS

WARM_UP = 1


def main() -> None:
    name, world, steps = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    threads = len(os.sched_getaffinity(0))
    os.environ.update(OMP_NUM_THREADS=str(threads), HF_HUB_OFFLINE="1", WANDB_DISABLED="true")

    import torch
    from datasets import Dataset
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        TrainerCallback,
    )
    from trl import RLOOConfig, RLOOTrainer

    torch.set_num_threads(threads)
    workload = WORKLOADS[name]
    tokenizer = AutoTokenizer.from_pretrained(world / "policy", padding_side="left")
    prompts = [json.loads(line)["prompt"] for line in (world / "prompts.jsonl").read_text().splitlines()]
    rewards = [
        AutoModelForSequenceClassification.from_pretrained(world / n, num_labels=1) for n in ("rm0", "rm1")
    ]
    stamps: list[float] = []
    lengths: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: object, **__: object) -> None:
            stamps.append(time.perf_counter())

        def on_log(self, _args, _state, _control, logs=None, **__) -> None:  # type: ignore[no-untyped-def]
            if logs and "completions/mean_length" in logs:
                lengths.append(float(logs["completions/mean_length"]))

    with tempfile.TemporaryDirectory() as output:
        trainer = RLOOTrainer(
            model=AutoModelForCausalLM.from_pretrained(world / "policy"),
            reward_funcs=rewards,
            reward_processing_classes=[tokenizer, tokenizer],
            train_dataset=Dataset.from_list([{"prompt": p} for p in prompts]),
            processing_class=tokenizer,
            args=RLOOConfig(
                output_dir=output,
                per_device_train_batch_size=PER_STEP * SAMPLES,
                num_generations=SAMPLES,
                max_completion_length=workload.new,
                max_steps=steps + WARM_UP,
                bf16="--bf16" in sys.argv,
                use_cpu=True,
                report_to=[],
                logging_steps=1,
                save_strategy="no",
                beta=KL_COEF,
                learning_rate=0.0,
                disable_tqdm=True,
                gradient_checkpointing=False,
            ),
        )
        trainer.add_callback(Clock())
        trainer.train()
    seconds = [b - a for a, b in zip(stamps[WARM_UP - 1 :], stamps[WARM_UP:], strict=False)]
    print(
        json.dumps(
            {
                "step_s": [round(s, 4) for s in seconds],
                "samples_per_s": PER_STEP * SAMPLES / statistics.fmean(seconds),
                "response_tokens": statistics.fmean(lengths[WARM_UP:]),
            }
        )
    )


if __name__ == "__main__":
    main()
