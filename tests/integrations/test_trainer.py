"""The Trainer's option for CUDA graphs, on the CPU: the graph is replaced by a step that runs what would be recorded."""

from __future__ import annotations

import warnings

import pytest
import torch

pytest.importorskip("accelerate")

import transformers
from transformers import TrainingArguments

import moefx
from moefx.analysis.report import ShortfallWarning
from moefx.integrations import trainer
from moefx.integrations import transformers as hf
from tests.support.families import batch, build

pytestmark = pytest.mark.usefixtures("cached_captures")


class Step:
    """As GraphedStep to the Trainer; notes what it is called with."""

    def __init__(self, model, forward_backward):
        self.model, self.run, self.seen, self.closed = model, forward_backward, [], False

    def __call__(self, **given):
        self.seen.append(given)
        return self.run(**hf.count_as_tensor((), given))

    def close(self):
        self.closed = True


def trained(folder, steps=None, **options):
    torch.manual_seed(0)
    model = moefx.optimize(build("qwen3_moe"), compile=False)
    rows = [{k: v[0] for k, v in batch(1, 16, seed=s).items()} for s in range(10)]
    arguments = TrainingArguments(
        str(folder),
        num_train_epochs=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        train_sampling_strategy="sequential",
        **options.pop("arguments", {}),
    )
    made = trainer.Trainer(model, arguments, train_dataset=rows, **options)
    made.train()
    return [h["loss"] for h in made.state.log_history if "loss" in h], dict(model.named_parameters()), made


@pytest.mark.parametrize("smoothing", [0.0, 0.1], ids=["loss of the model", "label smoothing"])
def test_what_is_recorded_is_the_trainers_own_step(tmp_path, monkeypatch, smoothing):
    made = []

    def make(model, *, forward_backward):
        made.append(Step(model, forward_backward))
        return made[-1]

    monkeypatch.setattr(trainer, "make_step", make)
    arguments = {"label_smoothing_factor": smoothing}
    wanted, weights, _ = trained(tmp_path, arguments=arguments)
    assert not made
    found, same, run = trained(tmp_path, cuda_graph=True, arguments=arguments)
    assert found == wanted and len(found) == 3
    assert all(torch.equal(p, weights[n]) for n, p in same.items())
    (step,) = made
    assert step.closed and run._step is None
    # five micro-batches: the last optimizer step has one
    assert [g["accumulated"] for g in step.seen] == [2, 2, 2, 2, 1]
    assert all({"input_ids", "labels", "num_items_in_batch"} <= set(g) for g in step.seen)


def padded(rows):
    """A batch padded on the right, longer than its longest row."""
    length = max(len(r) for r in rows) + 2
    fill = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    given = {
        k: [([1] * len(r) if k == "attention_mask" else r) + [v] * (length - len(r)) for r in rows] for k, v in fill.items()
    }
    return {k: torch.tensor(v) for k, v in given.items()}


def test_one_row_at_a_time(tmp_path):
    """The Trainer's usual call: a number of items, a padded row; then evaluation and prediction with labels."""
    rows = [batch(1, length)["input_ids"][0].tolist() for length in (5, 9, 7, 12, 5, 6)]
    found = []
    for optimized in (False, True):
        model = build("qwen3_moe", num_hidden_layers=1)
        model = moefx.optimize(model, compile=False, strict=True) if optimized else model
        arguments = TrainingArguments(
            str(tmp_path),
            max_steps=3,
            per_device_train_batch_size=1,
            per_device_eval_batch_size=1,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            average_tokens_across_devices=True,
            label_names=["labels"],
            train_sampling_strategy="sequential",
            remove_unused_columns=False,
        )
        made = transformers.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:2], data_collator=padded)
        with warnings.catch_warnings():
            warnings.simplefilter("error", ShortfallWarning)
            made.train()
            evaluated = made.evaluate()["eval_loss"]
            predicted = torch.tensor(made.predict(rows[2:3]).predictions)
        found.append(([h["loss"] for h in made.state.log_history if "loss" in h] + [evaluated], predicted))
    (wanted, logits), (losses, same) = found
    assert len(wanted) == 4 and losses == pytest.approx(wanted, rel=1e-5)
    torch.testing.assert_close(same, logits, rtol=1e-3, atol=1e-3)
    assert not moefx.report(model).fallbacks
    heads = [f for f in moefx.report(model).program if f.name.startswith("head")]
    assert len(heads) == 3  # as optimize records it, with a number of items, in evaluation


def test_on_the_cpu_and_with_arguments_that_cannot_be_recorded_it_says_so(tmp_path):
    with pytest.raises(moefx.MoefxError, match="a CUDA graph needs a model on a CUDA device, this one is on cpu"):
        trained(tmp_path, cuda_graph=True)
    with pytest.raises(moefx.MoefxError, match="torch_empty_cache_steps=5: memory cannot be freed while a step is recorded"):
        trained(tmp_path, cuda_graph=True, arguments={"torch_empty_cache_steps": 5})
